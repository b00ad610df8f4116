"""Latency of torchvision's networks on the CPU: float, other int8 engines, and fxcompress int8.

    python benchmarks/cpu_int8.py --json benchmarks/results/cpu_int8.json
    python benchmarks/cpu_int8.py --peers --json benchmarks/results/cpu_peers.json     # needs the extra `bench`

Every engine runs in a process of its own, the engines take turns, and figures are medians over the rounds, see
`fxcompress.bench`. Weights are random (see `networks.py`): latency does not depend on them. SQNR is that of each
engine's output against the float model, so that no engine is fast by being wrong.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers  # type: ignore[import-not-found]  # beside this file
from rich.console import Console
from rich.table import Table

from fxcompress.bench import Builder, Timing, Workload, compare, compiled, eager, result, with_torch_compile, write_json
from fxcompress.pipeline.progress import progress_bar

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large")
PEER_MODELS = (
    *MODELS, "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x1_0", "densenet121", "convnext_tiny", "vit_b_16",
    "swin_t",
)  # fmt: skip

OURS = "fxcompress int8"
ENGINES: dict[str, Builder] = {
    "float": eager,
    "torch.compile": with_torch_compile,
    "torch.ao int8": peers.torch_ao,
    OURS: functools.partial(compiled, passes="fuse, quantize"),
    "fxcompress half int8": functools.partial(
        compiled, passes="prune-channels{budget='macs:0.5', round_to=8}, fuse, quantize"
    ),
}
PEERS: dict[str, Builder] = {
    "float": eager,
    "ONNX Runtime int8": peers.onnx_runtime,
    "OpenVINO int8": peers.openvino,
    "torchao int8": peers.torchao,
    "torch.ao int8": peers.torch_ao,
    OURS: functools.partial(compiled, passes="fuse, quantize"),
}


def show(model: str, timings: Sequence[Timing]) -> None:
    """Print one model's figures as a table."""
    table = Table("engine", "batch", "ms", "times as fast as float", "SQNR dB", title=model)
    for timing in timings:
        if timing.median is None:
            table.add_row(timing.engine, str(timing.batch), "-", str(timing.error), "")
            continue
        sqnr = "" if timing.sqnr_db is None else f"{timing.sqnr_db:.1f}"
        table.add_row(timing.engine, str(timing.batch), f"{1e3 * timing.median:.2f}", f"{timing.ratio:.2f}", sqnr)
    Console(width=140).print(table)


def against_peers(timings: Sequence[Timing]) -> dict[int, float]:
    """Return, for each batch size, our time over that of the fastest other int8 engine: median over the rounds."""
    found = {}
    for ours in timings:
        others = [one.rounds for one in timings if one.batch == ours.batch and one.engine.endswith("int8")
                  and not one.engine.startswith("fxcompress") and one.error is None]  # fmt: skip
        if ours.engine == OURS and ours.error is None and others:
            best = [min(turn) for turn in zip(*others, strict=True)]
            found[ours.batch] = statistics.median(a / b for a, b in zip(ours.rounds, best, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--peers", action="store_true", help="other projects' engines, on more networks")
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--engines", nargs="*", choices=sorted({*ENGINES, *PEERS}))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    known = PEERS if options.peers else ENGINES
    engines = {name: {**ENGINES, **PEERS}[name] for name in options.engines or known}
    results: list[dict[str, Any]] = []
    for model in options.models or (PEER_MODELS if options.peers else MODELS):
        workload = Workload(
            f"{Path(__file__).with_name('networks.py')}:{model}", (), tuple(options.batches), options.threads
        )
        with progress_bar() as progress:
            timings = compare(workload, engines, options.rounds, options.seconds, progress)
        show(model, timings)
        made = result(workload, timings)
        made["workload"]["model"] = model
        made["against_best_peer"] = against_peers(timings)
        results.append(made)
        if options.json is not None:
            write_json(options.json, results)  # after each model: what has been measured is not lost
    ratios = [ratio for made in results for ratio in made["against_best_peer"].values()]
    if ratios:
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        print(f"time over that of the best other int8 engine: geometric mean {mean:.2f}, largest {max(ratios):.2f}")


if __name__ == "__main__":
    main()
