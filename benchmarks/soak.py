"""Ten thousand calls of 8-bit networks: whether memory grows, results drift, or calls become slower.

    python benchmarks/soak.py --json benchmarks/results/soak.json

Each network runs in a process of its own, on batches of a few sizes in turn (so that plans and memory change with
every call). Memory is what the process has resident after the first calls and at the end; bits are compared between
the first and the last output of each batch size; times are means over the first and the last part of the calls.
"""

from __future__ import annotations

import argparse
import array
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import networks  # type: ignore[import-not-found]  # beside this file
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fxcompress
from fxcompress.bench import write_json

#: Calls before anything is counted, at most.
_WARM = 200

MODELS = ("mobilenet_v2", "small_vit", "resnet18")


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a network in evaluation mode, and a small image: torchvision's, or a small transformer."""
    if name != "small_vit":
        model, image = networks.conditioned(name)
        return model, image[:, :, :160, :160].contiguous()
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(image_size=64, patch_size=8, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=512)
    nn.init.normal_(model.heads[0].weight, std=0.02)
    return model.eval(), torch.randn(1, 3, 64, 64)


def soak(call: Callable[[torch.Tensor], torch.Tensor], batches: Sequence[torch.Tensor], calls: int) -> dict[str, Any]:
    """Call on the batches in turn.

    Args:
        call: the network. batches: inputs, of sizes that differ. calls: how many in all, at least two of each batch.

    Returns:
        megabytes: resident after the warm-up, and at the end. same_bits: whether each batch gave the same at the end as
        at first. milliseconds: means of a call over the first and the last tenth of the calls.
    """
    first = [call(batch).clone() for batch in batches]
    part = max(len(batches), calls // 10 // len(batches) * len(batches))  # as many calls of each size
    for index in range(min(part, _WARM)):
        call(batches[index % len(batches)])
    seconds = array.array("d", [1.0]) * calls  # its memory is taken now
    before = resident()
    last = list(first)
    for index in range(calls):
        start = time.perf_counter()
        last[index % len(batches)] = call(batches[index % len(batches)])
        seconds[index] = time.perf_counter() - start
    return {
        "calls": calls,
        "batches": [len(batch) for batch in batches],
        "megabytes": [before, resident()],
        "same_bits": all(torch.equal(one, other) for one, other in zip(first, last, strict=True)),
        "milliseconds": [1e3 * statistics.fmean(seconds[:part]), 1e3 * statistics.fmean(seconds[-part:])],
    }


def resident() -> float:
    """Megabytes of this process in memory, exactly (Linux: other figures of the system are rounded for speed)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Rss:"))


def measure(name: str, sizes: Sequence[int], calls: int) -> dict[str, Any]:
    """Compile a network and soak it."""
    model, image = network(name)
    compact = fxcompress.compile(model, "fuse, quantize", image, verify=False, calibration=[image])
    batches = [torch.randn(size, *image.shape[1:]) for size in sizes]
    with torch.inference_mode():
        return soak(compact, batches, calls)


def child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own."""
    sizes = [str(size) for size in options.batches]
    command = [sys.executable, __file__, "--step", name, "--calls", str(options.calls), "--batches", *sizes]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"model": name, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", help=argparse.SUPPRESS)  # what a child process measures
    options = parser.parse_args()
    if options.step:
        print(json.dumps(measure(options.step, options.batches, options.calls)))
        return
    rows = []
    table = Table("model", "batches", "calls", "MB, start", "MB, end", "same bits", "ms, first tenth", "ms, last tenth")
    for model in options.models:
        row = child(model, options)
        rows.append(row)
        if options.json is not None:
            write_json(options.json, rows)  # after each network: what has been measured is not lost
        figures = [f"{number:.1f}" for number in row["megabytes"]], [f"{number:.2f}" for number in row["milliseconds"]]
        sizes = ", ".join(map(str, row["batches"]))
        table.add_row(model, sizes, f"{row['calls']:,}", *figures[0], "yes" if row["same_bits"] else "no", *figures[1])
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
