"""Memory that 8-bit networks take while they run, beside other engines.

    python benchmarks/memory.py --json benchmarks/results/memory.json     # needs the extra `bench`

Each engine writes its file in one process; another one, which does nothing else, loads it and runs it. What is counted
is the resident memory of that process beyond what it had before the file was loaded, with the engine's own libraries
loaded: at its peak from the start of loading, and at its peak while it runs after some calls (Linux, /proc).

Libraries are mapped, and what is used of them becomes resident when it is first used. So that part of the growth is
code, which a process shares with all others that use the library; it is shown by itself. What a network needs are its
weights and, at the least, the two largest values that its layers make.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks  # type: ignore[import-not-found]  # beside this file
import torch
from rich.console import Console
from rich.table import Table

import fxcompress
from fxcompress import peers
from fxcompress.bench import write_json
from fxcompress.emit.compact_module import CompactModule
from fxcompress.emit.native.executor import record
from fxcompress.emit.native.library import library
from fxcompress.emit.native.memory import extent
from fxcompress.emit.native.paging import give_back
from fxcompress.graph.inputs import ExampleInputs

ENGINES = ("fxcompress", "onnxruntime", "openvino")


def write(engine: str, model: str, folder: Path) -> Path:
    """Write the network as the engine has it; return the file."""
    network, image = networks.conditioned(model)
    inputs = ExampleInputs.of(image)
    if engine == "fxcompress":
        path = folder / "model.fxc"
        fxcompress.compile(network, "fuse, quantize", image, verify=False, calibration=[image]).save(path)
        return path
    if engine == "onnxruntime":
        return peers.quantized_onnx(network, inputs, folder)
    import openvino

    path = folder / "model.xml"
    openvino.save_model(peers.quantized_openvino(network, inputs), str(path))
    return path


def runner(engine: str, path: Path, x: torch.Tensor) -> Callable[[], Any]:
    """Load a file, and return what runs it."""
    if engine == "fxcompress":
        compact = fxcompress.load(path)
        return lambda: compact(x)
    return peers.run_onnx(path, [x]) if engine == "onnxruntime" else peers.run_openvino(str(path), [x])


def prepare(engine: str) -> None:
    """Load the engine's libraries."""
    if engine == "fxcompress":
        library()
    elif engine == "onnxruntime":
        import onnxruntime  # noqa: F401
    else:
        import openvino

        openvino.Core().available_devices  # noqa: B018 - loads the plugin for CPUs


def measure(engine: str, path: Path) -> dict[str, float]:
    """Return megabytes: `loading`, the peak from the start, `running`, the peak after some calls, and `code` of it."""
    x = torch.randn(1, 3, 224, 224)
    prepare(engine)
    give_back()
    before, code = status("VmRSS"), resident_code()
    reset_peak()
    with torch.inference_mode():
        call = runner(engine, path, x)
        for _ in range(5):
            call()
        loading = status("VmHWM") - before
        reset_peak()
        for _ in range(20):
            call()
    return {"loading": loading, "running": status("VmHWM") - before, "code": resident_code() - code}


def needed(compact: CompactModule, x: torch.Tensor) -> float:
    """Megabytes of a network's tensors and of the two largest values that its layers make."""
    values = record(compact, [x])
    made = [extent(value) for node, value in values.items() if node.op == "call_module" and torch.is_tensor(value)]
    weights = sum(tensor.nbytes for tensor in (*compact.parameters(), *compact.buffers()))
    return (weights + sum(sorted(made)[-2:])) / 1e6


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def status(name: str) -> float:
    """Megabytes of an entry of this process's status, which counts in units of 1024 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))


def resident_code() -> float:
    """Megabytes of shared libraries, as far as they are in memory."""
    return code_in(Path("/proc/self/smaps").read_text())


def code_in(maps: str) -> float:
    """Megabytes of resident pages of shared libraries in a process's list of mappings (`man proc_pid_smaps`)."""
    found, inside = 0, False
    for line in maps.splitlines():
        word, *rest = line.split()
        if not word.endswith(":"):  # the first line of a mapping: addresses, and the file, if there is one
            inside = len(rest) > 4 and ".so" in Path(rest[4]).suffixes
        elif inside and word == "Rss:":
            found += int(rest[0])
    return found * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", nargs="*", default=["resnet50", "mobilenet_v3_large"])
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)  # what a child process does: word, engine, path
    options = parser.parse_args()
    if options.step:
        word, engine, place = options.step
        wanted: Any = write(engine, options.models[0], Path(place)) if word == "write" else measure(engine, Path(place))
        print(json.dumps(wanted, default=str))
        return
    rows = []
    table = Table(
        "model", "engine", "MB, peak from the start of loading", "MB, peak while running", "of it, code", "needed"
    )
    for model in options.models:
        for engine in options.engines:
            with tempfile.TemporaryDirectory() as folder:
                path = child("write", engine, folder, model)
                row = {"model": model, "engine": engine, **child("measure", engine, path, model)}
                if engine == "fxcompress":
                    row["needed"] = needed(fxcompress.load(path), torch.zeros(1, 3, 224, 224))
            rows.append(row)
            figures = [f"{row[name]:.1f}" if name in row else "" for name in ("loading", "running", "code", "needed")]
            table.add_row(model, engine, *figures)
    Console(width=120).print(table)
    if options.json is not None:
        write_json(options.json, rows)


def child(word: str, engine: str, place: str, model: str) -> Any:
    """Do one step in a process of its own."""
    command = [sys.executable, __file__, "--models", model, "--step", word, engine, place]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
