"""Latency of torchvision's networks on the CPU: float, torch.compile, torch.ao's FX int8, and fxcompress int8.

    python benchmarks/cpu_int8.py --json benchmarks/results/cpu_int8.json

Every engine runs in a process of its own, the engines take turns, and figures are medians over the rounds, see
`fxcompress.bench`. Weights are random: latency does not depend on them. SQNR is that of each engine's output against
the float model, so that no engine is fast by being wrong.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fxcompress.bench import (
    Builder,
    Timing,
    Workload,
    channels_last,
    compare,
    compiled,
    eager,
    result,
    with_torch_compile,
    write_json,
)
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.pipeline.progress import progress_bar

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large")


def torch_ao(model: nn.Module, inputs: ExampleInputs) -> Callable[[], Any]:
    """torch.ao's graph mode quantisation with its default numbers for x86, calibrated with the inputs."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "x86"
    prepared = prepare_fx(model.eval(), get_default_qconfig_mapping("x86"), inputs.args)
    inputs.call(prepared)
    converted = convert_fx(prepared)
    return functools.partial(inputs.map(channels_last).call, converted)


ENGINES: dict[str, Builder] = {
    "float": eager,
    "torch.compile": with_torch_compile,
    "torch.ao int8": torch_ao,
    "fxcompress int8": functools.partial(compiled, passes="fuse, quantize"),
    "fxcompress half int8": functools.partial(
        compiled, passes="prune-channels{budget='macs:0.5', round_to=8}, fuse, quantize"
    ),
}


def show(model: str, timings: list[Timing]) -> None:
    """Print one model's figures as a table."""
    table = Table("engine", "batch", "ms", "times as fast as float", "SQNR dB", title=model)
    for timing in timings:
        if timing.median is None:
            table.add_row(timing.engine, str(timing.batch), "-", str(timing.error), "")
            continue
        sqnr = "" if timing.sqnr_db is None else f"{timing.sqnr_db:.1f}"
        table.add_row(timing.engine, str(timing.batch), f"{1e3 * timing.median:.2f}", f"{timing.ratio:.2f}", sqnr)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engines = {name: ENGINES[name] for name in options.engines}
    results = []
    for model in options.models:
        workload = Workload(model, (), tuple(options.batches), options.threads)
        with progress_bar() as progress:
            timings = compare(workload, engines, options.rounds, options.seconds, progress)
        show(model, timings)
        results.append(result(workload, timings))
        if options.json is not None:
            write_json(options.json, results)  # after each model: what has been measured is not lost


if __name__ == "__main__":
    main()
