"""Memory that 8-bit networks take while they run, beside other engines.

    python benchmarks/memory.py --json benchmarks/results/memory.json     # needs the extra `bench`

Each engine writes its file in one process; another one, which does nothing else, loads it and runs it. What is counted
is the resident memory of that process beyond what it had before the file was loaded, with the engine's own libraries
loaded: at its peak from the start of loading, and at its peak while it runs after some calls (Linux, /proc).
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
from fxcompress.emit.native.library import library
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
    """Return megabytes: `loading`, the peak from the start, and `running`, the peak after some calls."""
    x = torch.randn(1, 3, 224, 224)
    prepare(engine)
    give_back()
    before = status("VmRSS")
    reset_peak()
    with torch.inference_mode():
        call = runner(engine, path, x)
        for _ in range(5):
            call()
        loading = status("VmHWM") - before
        reset_peak()
        for _ in range(20):
            call()
    return {"loading": loading, "running": status("VmHWM") - before}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def status(name: str) -> float:
    """Megabytes of an entry of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{name}:"))


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
    table = Table("model", "engine", "MB, peak from the start of loading", "MB, peak while running")
    for model in options.models:
        for engine in options.engines:
            with tempfile.TemporaryDirectory() as folder:
                path = child("write", engine, folder, model)
                row = {"model": model, "engine": engine, **child("measure", engine, path, model)}
            rows.append(row)
            table.add_row(model, engine, f"{row['loading']:.1f}", f"{row['running']:.1f}")
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
