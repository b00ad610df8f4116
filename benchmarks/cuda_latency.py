"""Latency of torchvision's networks on a GPU: eager, torch.compile and others in fp16 against fxcompress.

    python benchmarks/cuda_latency.py --seconds 1500 --json benchmarks/results/cuda_latency.json --plot cuda.png
    python benchmarks/cuda_latency.py --seconds 600 --json benchmarks/results/cuda_latency.json  # goes on where it was

Every engine runs in a process of its own with a time limit, and writes a row for each batch size at once: stopped and
started again, the program measures what is missing. Figures are medians of groups of calls between two events on the
device, after a warm-up; inputs lie on the device, in fp16 and channels last. SQNR is that of each engine's output
against the float32 model on a few images, so that no engine is fast by being wrong. Weights are random (see
`networks.py`): latency does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fxcompress.bench import channels_last, command, document
from fxcompress.errors import FxCompressError

MODELS = ("resnet50", "vit_b_16", "mobilenet_v2", "efficientnet_b0")
BATCHES = (256, 32, 1)

#: What the results are compared with, and what counts as ours.
BASELINES = ("eager fp16", "torch.compile fp16")
OURS = ("fxcompress fp16", "fxcompress int8")

#: Images that outputs are compared on.
_COMPARED = 8

Call = Callable[[torch.Tensor], Any]


@dataclass
class Row:
    """One engine at one batch size. milliseconds: median of a call. prepared: seconds until it could run.

    details: what an engine says of itself.
    """

    model: str
    engine: str
    batch: int
    milliseconds: float | None = None
    sqnr_db: float | None = None
    prepared: float | None = None
    megabytes: float | None = None
    error: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        """What makes it one row among others."""
        return self.model, self.engine, self.batch


# Engines: build(model in float32 on the device, example in fp16) -> a call, and what is worth telling


def eager(model: nn.Module, x: torch.Tensor) -> tuple[Call, dict[str, Any]]:
    """PyTorch as it is."""
    return model.to(x.dtype).to(memory_format=torch.channels_last), {}


def with_torch_compile(model: nn.Module, x: torch.Tensor, mode: str) -> tuple[Call, dict[str, Any]]:
    """torch.compile, which fuses, picks among kernels and replays CUDA graphs."""
    torch._dynamo.reset()
    return torch.compile(model.to(x.dtype).to(memory_format=torch.channels_last), mode=mode), {"mode": mode}


def torchao(model: nn.Module, x: torch.Tensor, mode: str) -> tuple[Call, dict[str, Any]]:
    """torchao's int8 for linear layers (it has none for convolutions on GPUs), with torch.compile."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    if not any(isinstance(module, nn.Linear) and module.in_features > 512 for module in model.modules()):
        raise FxCompressError("this network has no linear layers to speak of")
    model = model.to(x.dtype)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    torch._dynamo.reset()
    return torch.compile(model, mode=mode), {"mode": mode}


def onnx_runtime(model: nn.Module, x: torch.Tensor, provider: str) -> tuple[Call, dict[str, Any]]:
    """ONNX Runtime with its CUDA or TensorRT provider; inputs and outputs stay on the device."""
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise FxCompressError(f"ONNX Runtime is installed without {provider}")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(model.to(x.dtype), (x,), path, dynamo=True, verbose=False)
        options = {"trt_fp16_enable": "1"} if provider.startswith("Tensorrt") else {"enable_cuda_graph": "0"}
        session = onnxruntime.InferenceSession(path, providers=[(provider, options), "CUDAExecutionProvider"])
    given, made = session.get_inputs()[0].name, session.get_outputs()[0].name
    with torch.no_grad():
        result = torch.empty_like(model(x))

    def call(value: torch.Tensor) -> torch.Tensor:
        binding = session.io_binding()
        value = value.contiguous()
        binding.bind_input(given, "cuda", 0, "float16", tuple(value.shape), value.data_ptr())
        binding.bind_output(made, "cuda", 0, "float16", tuple(result.shape), result.data_ptr())
        session.run_with_iobinding(binding)
        return result

    return call, {}


def ours(model: nn.Module, x: torch.Tensor, passes: str, dtype: str) -> tuple[Call, dict[str, Any]]:
    """fxcompress; calibration, where it is asked for, with random images."""
    import fxcompress as fxc

    torch.manual_seed(1)
    images = [torch.randn(16, *x.shape[1:], device=x.device) for _ in range(2)]
    compact = fxc.compile(
        model, passes, x.float(), target="cuda", dtype=dtype, calibration=images, verify=False, progress=False
    )
    with torch.inference_mode():
        for _ in range(3):
            compact(x)
    report = compact.report
    layers = {line.layer: line.notes[-1] for line in report.layers if line.notes} if report is not None else {}
    details = {
        "refused": list(compact._replays.refused.values()),
        "macs": 0 if report is None else report.after.macs,
        "layers": layers,
    }
    return compact, details


_PRUNE = "prune-channels{budget='macs:0.5', round_to=32}, "
_COMPILE = "max-autotune"

ENGINES: dict[str, Callable[[nn.Module, torch.Tensor], tuple[Call, dict[str, Any]]]] = {
    "eager fp16": eager,
    "fxcompress int8": functools.partial(ours, passes="fuse, quantize", dtype="int8"),
    "fxcompress fp16": functools.partial(ours, passes="fuse", dtype="fp16"),
    "torch.compile fp16": functools.partial(with_torch_compile, mode=_COMPILE),
    "fxcompress half int8": functools.partial(ours, passes=f"{_PRUNE}fuse, quantize", dtype="int8"),
    "fxcompress half fp16": functools.partial(ours, passes=f"{_PRUNE}fuse", dtype="fp16"),
    "fxcompress fp8": functools.partial(ours, passes="fuse", dtype="fp8"),
    "torchao int8": functools.partial(torchao, mode=_COMPILE),
    "TensorRT fp16": functools.partial(onnx_runtime, provider="TensorrtExecutionProvider"),
    "ONNX Runtime fp16": functools.partial(onnx_runtime, provider="CUDAExecutionProvider"),
}

#: Engines that are of interest for some networks only.
ONLY = {"fxcompress half int8": ("resnet50",), "fxcompress half fp16": ("resnet50",), "fxcompress fp8": ("vit_b_16",),
        "torchao int8": ("vit_b_16",)}  # fmt: skip


# One engine, in its process


def work(model_name: str, engine: str, batches: Sequence[int], device: str, size: int, seconds: float) -> Iterator[Row]:
    """Measure an engine at each batch size."""
    import networks  # type: ignore[import-not-found]  # beside this file

    torch.set_grad_enabled(False)
    with torch.enable_grad():
        source, _ = networks.conditioned(model_name)
    source = source.to(device).eval()
    for batch in batches:
        row = Row(model_name, engine, batch)
        try:
            _measure(row, source, device, size, seconds)
        except Exception as error:
            row.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300]
        yield row


def _measure(row: Row, source: nn.Module, device: str, size: int, seconds: float) -> None:
    import copy

    generator = torch.Generator().manual_seed(0)
    dtype = torch.float16 if device == "cuda" else torch.float32
    images = torch.randn(row.batch, 3, size, size, generator=generator).to(device)
    x = channels_last(images.to(dtype))
    expected = _in_float32(source, x[:_COMPARED].float())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    call, details = ENGINES[row.engine](copy.deepcopy(source), x)
    with torch.inference_mode():
        output = call(x)
        found = output[:_COMPARED].float().clone()
        _wait(device)
        row.prepared = round(time.perf_counter() - begun, 2)
        row.milliseconds = _milliseconds(lambda: call(x), device, seconds)
    noise = (found - expected).double().square().sum()
    row.sqnr_db = round(float(10 * torch.log10(expected.double().square().sum() / noise.clamp(min=1e-30))), 2)
    row.megabytes = round(torch.cuda.max_memory_allocated() / 2**20, 1) if device == "cuda" else None
    row.details = details


def _in_float32(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output in full float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode():
            return model(x).float()  # type: ignore[no-any-return]
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _milliseconds(call: Callable[[], Any], device: str, seconds: float) -> float:
    """The median over groups of calls, each group between two events and long enough for their resolution."""
    clock = _between_events if device == "cuda" else _between_looks
    for _ in range(5):
        once = clock(call, 1)
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:  # until clocks are up
        once = clock(call, 3)
    calls = max(1, min(100, int(5.0 / max(once, 1e-3))))
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while len(durations) < 10 or time.perf_counter() < end:
        durations.append(clock(call, calls))
    return round(statistics.median(durations), 4)


def _between_events(call: Callable[[], Any], calls: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls


def _between_looks(call: Callable[[], Any], calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    return 1e3 * (time.perf_counter() - begun) / calls


# The processes


def measure_in_process(
    model: str, engine: str, batches: Sequence[int], options: argparse.Namespace, limit: float
) -> Iterator[Row]:
    """Run an engine in a process of its own, and yield its rows as they come; a row for what it did not get to."""
    job = {"model_name": model, "engine": engine, "batches": list(batches), "device": options.device,
           "size": options.size, "seconds": options.turn}  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job)],
            stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
        done: set[int] = set()
        with _deadline(process, limit) as late:
            assert process.stdout is not None  # for the type checker
            with process.stdout:
                for line in process.stdout:
                    if line.startswith("ROW "):
                        row = Row(**json.loads(line[4:]))
                        done.add(row.batch)
                        yield row
            process.wait()
        log.seek(0)
        last = [line for line in log.read().splitlines() if line.strip()][-1:]
    for batch in batches:
        if batch not in done:
            why = f"not done in {limit:.0f} s" if late else f"the process ended: {' '.join(last)[-200:]}"
            yield Row(model, engine, batch, error=why)


@contextlib.contextmanager
def _deadline(process: subprocess.Popen[str], limit: float) -> Iterator[list[bool]]:
    """End a process, with those that it started, after so many seconds; the list is not empty then."""
    import threading

    late: list[bool] = []

    def end() -> None:
        late.append(True)
        _end(process)

    timer = threading.Timer(max(1.0, limit), end)
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a group of its own, see start_new_session


# What the rows say


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the figures that a reader looks for first.

    against_baselines: our fastest engine's time over that of the fastest baseline, for each network and batch size.
    """
    times = {row.key: row.milliseconds for row in rows if row.milliseconds is not None}
    ratios: dict[str, float] = {}
    for model in dict.fromkeys(row.model for row in rows):
        for batch in sorted({row.batch for row in rows}):
            others = [times[key] for name in BASELINES if (key := (model, name, batch)) in times]
            own = [times[key] for name in OURS if (key := (model, name, batch)) in times]
            if len(others) == len(BASELINES) and own:
                ratios[f"{model}, batch {batch}"] = round(min(own) / min(others), 3)
    found: dict[str, Any] = {"against_baselines": ratios}
    if ratios:
        found["geometric_mean"] = round(math.exp(statistics.fmean(map(math.log, ratios.values()))), 3)
        found["largest"] = max(ratios.values())
    for name, own_engine, other in (
        ("int8_resnet50_256_over_torch_compile", "fxcompress int8", "torch.compile fp16"),
        ("half_resnet50_256_over_whole_int8", "fxcompress half int8", "fxcompress int8"),
        ("half_resnet50_256_over_whole_fp16", "fxcompress half fp16", "fxcompress fp16"),
    ):
        pair = [times.get(("resnet50", engine, 256)) for engine in (own_engine, other)]
        if pair[0] is not None and pair[1] is not None:
            found[name] = round(pair[0] / pair[1], 3)
    return found


def show(rows: Sequence[Row], card: str) -> None:
    """Print rows as a table, networks and batch sizes together."""
    table = Table("network", "batch", "engine", "ms", "images / s", "SQNR dB", "ready in s", title=card)
    group: tuple[str, int] | None = None
    order = list(ENGINES)
    for row in sorted(rows, key=lambda one: (one.model, one.batch, order.index(one.engine))):
        if group is not None and group != (row.model, row.batch):
            table.add_section()
        group = (row.model, row.batch)
        if row.milliseconds is None:
            table.add_row(row.model, str(row.batch), row.engine, "-", f"failed: {row.error}"[:60], "", "")
            continue
        rate = f"{1e3 * row.batch / row.milliseconds:,.0f}"
        table.add_row(row.model, str(row.batch), row.engine, f"{row.milliseconds:.3f}", rate,
                      "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}", f"{row.prepared:.0f}")  # fmt: skip
    Console(width=120).print(table)


def plot(rows: Sequence[Row], path: Path, card: str) -> None:
    """Draw the time of each engine over that of the fastest baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times = {row.key: row.milliseconds for row in rows if row.milliseconds is not None}
    cases = list(dict.fromkeys((row.model, row.batch) for row in sorted(rows, key=lambda one: (one.model, one.batch))))
    engines = [name for name in ENGINES if any(key[1] == name for key in times)]
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.1 * len(cases)), 4.5), layout="constrained")
    width = 0.8 / max(1, len(engines))
    for index, engine in enumerate(engines):
        heights = []
        for model, batch in cases:
            base = [times[key] for name in BASELINES if (key := (model, name, batch)) in times]
            own = times.get((model, engine, batch))
            heights.append(own / min(base) if own is not None and base else math.nan)
        axes.bar([place + index * width for place in range(len(cases))], heights, width, label=engine)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(cases))])
    axes.set_xticklabels([f"{model}\nbatch {batch}" for model, batch in cases], fontsize=7)
    axes.set_ylabel("time over that of the faster of eager and torch.compile")
    axes.set_title(card, fontsize=9)
    axes.legend(fontsize=7, ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def card() -> dict[str, Any]:
    """Return what is known of the GPU and of what drives it."""
    if not torch.cuda.is_available():
        return {"name": "no GPU"}
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "name": properties.name, "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}", "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip
    for name, package in (("triton", "triton"), ("torchvision", "torchvision"), ("torchao", "torchao")):
        with contextlib.suppress(Exception):
            found[name] = __import__(package).__version__
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    return found


def read(path: Path | None, retry: bool) -> dict[tuple[str, str, int], Row]:
    """Return the rows of an earlier run; those that failed are left out if they shall be tried again."""
    if path is None or not path.exists():
        return {}
    rows = [Row(**line) for line in json.loads(path.read_text())["results"]["rows"]]
    return {row.key: row for row in rows if row.error is None or not retry}


def write(path: Path | None, rows: Sequence[Row], gpu: dict[str, Any]) -> None:
    """Write all rows, with what made them, in one go."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {**document({"rows": [asdict(row) for row in rows], "summary": summary(rows)}), "card": gpu}
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(made, indent=1) + "\n")
    beside.replace(path)


def main() -> None:
    options = _options()
    if options.worker:
        for row in work(**json.loads(options.worker)):
            print("ROW " + json.dumps(asdict(row)), flush=True)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"{command()}: PyTorch finds no GPU; --device cpu tries the program, its figures mean nothing")
    end = time.perf_counter() + options.seconds
    gpu = card()
    rows = read(options.json, options.retry)
    for model in options.models:
        for engine in options.engines:
            batches = [batch for batch in options.batches if (model, engine, batch) not in rows]
            left = end - time.perf_counter()
            if not batches or model not in ONLY.get(engine, (model,)) or left < 20:
                continue
            for row in measure_in_process(model, engine, batches, options, min(options.limit, left)):
                told = f"{row.milliseconds:.3f} ms" if row.milliseconds is not None else f"failed: {row.error}"
                print(f"{row.model}, batch {row.batch}, {row.engine}: {told}", flush=True)
                if not (row.error or "").startswith("not done in") or left >= options.limit:
                    rows[row.key] = row  # what the end of the budget cut off is measured another time
                write(options.json, list(rows.values()), gpu)
    show(list(rows.values()), str(gpu["name"]))
    print(json.dumps(summary(list(rows.values())), indent=1))
    if options.plot is not None and rows:
        plot(list(rows.values()), options.plot, str(gpu["name"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--seconds", type=float, default=1500.0, help="for everything; started again, it goes on")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one engine on one network")
    parser.add_argument("--turn", type=float, default=0.5, help="seconds of timing at each batch size")
    parser.add_argument("--size", type=int, default=224, help="height and width of images")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--retry", action="store_true", help="try again what failed before")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
