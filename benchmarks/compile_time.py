"""How long compiling takes, and how that grows: seconds of each pass against the number of nodes.

    python benchmarks/compile_time.py --json benchmarks/results/compile_time.json

Runs `trace`, `PruneChannels(0.5)` and `Fuse` on ResNet-50, on chains of residual blocks and on layers with
up to a million channels, each size several times, and keeps the medians. Checks between passes (lint, shapes,
comparison of outputs) are part of the total and not of the seconds of a pass.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision import models

import fxcompress as fxc
from fxcompress.bench import write_json

PASSES = "prune-channels{ratio=0.5, scope=layer}, fuse"


class Block(nn.Module):
    """Convolution, batch norm and relu around which the input is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        with torch.no_grad():
            self.conv2.weight.mul_(1e-3)  # thousands of blocks must not blow the values up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv2(F.relu(self.bn1(self.conv1(x))))
        return x + y


def chain(blocks: int, channels: int = 8) -> nn.Module:
    """Return a chain of residual blocks."""
    return nn.Sequential(*(Block(channels) for _ in range(blocks))).eval()


class GroupedBlock(nn.Module):
    """Grouped and depthwise convolutions around which the input is added: few weights for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, groups=channels // 4, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv2(F.relu(self.bn1(self.conv1(x))))
        return x + 1e-2 * y


def wide(channels: int, blocks: int = 50) -> nn.Module:
    """Return a chain of blocks whose layers make `channels` channels in all."""
    width = channels // (2 * blocks)
    return nn.Sequential(nn.Conv2d(3, width, 1), *(GroupedBlock(width) for _ in range(blocks))).eval()


def measure(name: str, model: nn.Module, inputs: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Return medians: seconds of the trace, of each pass, and of everything together."""
    traces: list[float] = []
    totals: list[float] = []
    passes: dict[str, list[float]] = {}
    nodes = 0
    for _ in range(repeats):
        gc.collect()  # what the last model left is not this one's business
        start = time.perf_counter()
        graph_module = fxc.trace(model, inputs)
        traces.append(time.perf_counter() - start)
        nodes = len(graph_module.graph.nodes)
        result = fxc.PassManager(PASSES).run(graph_module, inputs)
        totals.append(time.perf_counter() - start)
        for row in result.rows:
            passes.setdefault(row.name, []).append(row.seconds)
    return {
        "name": name,
        "nodes": nodes,
        "trace": statistics.median(traces),
        "passes": {word: statistics.median(seconds) for word, seconds in passes.items()},
        "total": statistics.median(totals),
    }


def doublings(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for every two models of a kind of which one has twice the size of the other, the ratio of total times."""
    by_size = {(row["name"].split()[0], int(row["name"].split()[1])): row for row in rows if " " in row["name"]}
    return [
        {"kind": kind, "sizes": [size, 2 * size], "ratio": by_size[kind, 2 * size]["total"] / row["total"]}
        for (kind, size), row in by_size.items()
        if (kind, 2 * size) in by_size
    ]


def show(rows: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> None:
    """Print the figures as a table."""
    names = list(rows[0]["passes"])
    table = Table("model", "nodes", "trace", *(name.partition("{")[0] for name in names), "total")
    for row in rows:
        seconds = [row["trace"], *(row["passes"].get(name, 0.0) for name in names), row["total"]]
        table.add_row(row["name"], str(row["nodes"]), *(f"{value:.2f}" for value in seconds))
    Console(width=160).print(table)
    for entry in ratios:
        print(f"{entry['kind']} {entry['sizes'][0]} -> {entry['sizes'][1]}: {entry['ratio']:.2f} times the time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, nargs="*", default=[100, 200, 400, 800, 1250, 2500, 5000])
    parser.add_argument("--channels", type=int, nargs="*", default=[250_000, 500_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    resnet = models.get_model("resnet50", weights=None).eval()
    measure("warm-up", chain(3), torch.randn(1, 8, 8, 8), 1)
    rows = [measure("resnet50", resnet, torch.randn(1, 3, 224, 224), options.repeats)]
    for blocks in options.blocks:
        rows.append(measure(f"chain {blocks}", chain(blocks), torch.randn(1, 8, 8, 8), options.repeats))
    for channels in options.channels:
        rows.append(measure(f"channels {channels}", wide(channels), torch.randn(1, 3, 2, 2), options.repeats))
    ratios = doublings(rows)
    show(rows, ratios)
    if options.json is not None:
        write_json(options.json, {"rows": rows, "doublings": ratios, "passes": PASSES})


if __name__ == "__main__":
    main()
