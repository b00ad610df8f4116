"""Running recipes: a trained network, a recipe, and the figures of what comes out."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx, nn

import fxcompress
from fxcompress import processes
from fxcompress.analysis.cost import cost
from fxcompress.bench import median_seconds
from fxcompress.demo import Shuffled, accuracy
from fxcompress.emit.compact_module import CompactModule
from fxcompress.errors import FxCompressError, InputError
from fxcompress.pipeline.text import print_pipeline
from fxcompress.recipes.catalogue import Recipe, prepared
from fxcompress.recipes.data import ImageData
from fxcompress.recipes.networks import Network

#: The name of the network as it was trained, among those of the recipes.
FLOAT = "float"

#: How many images scales are measured on.
_CALIBRATION = 512


@dataclass(frozen=True)
class Row:
    """The figures of one recipe, on one network and data set, with one seed.

    accuracy: share of the test images named right. parameters, macs (per image), file_bytes (as saved): of the result.
    sparsity: share of the weights of layers that are zero. milliseconds: for one image, and float_milliseconds: of the
    network as it was trained, measured in turn with it. seconds: that the passes took. passes: the pipeline's text.
    processes: how many took part.
    """

    recipe: str
    network: str
    data: str
    seed: int
    accuracy: float
    parameters: int
    sparsity: float
    macs: int
    file_bytes: int
    milliseconds: float
    float_milliseconds: float
    seconds: float
    passes: str
    processes: int = 1


@dataclass(frozen=True)
class Study:
    """A trained network with its data, to try recipes on."""

    network: Network
    data: ImageData
    seed: int
    model: nn.Module
    epochs: int | None = None  #: of every training, instead of the recipes' own
    turn: float = 0.1  #: seconds for which a network is timed before another has its turn

    @property
    def example_inputs(self) -> torch.Tensor:
        """One image."""
        return self.data.test.images[:1]

    def loader(self) -> Shuffled:
        """Return the training data, in the same orders for every recipe."""
        return Shuffled(self.data.training, self.data.batch, self.seed + 1)

    def text(self, passes: str) -> str:
        """Return pipeline text as it is run here, but for the seed."""
        return print_pipeline(prepared(passes, epochs=self.epochs))

    def compress(self, recipe: Recipe) -> CompactModule:
        """Return what a recipe makes of the network, or of its student."""
        passes = prepared(
            recipe.passes, seed=self.seed, epochs=self.epochs, teacher=self.model if recipe.student else None
        )
        model = fresh(self.network, self.network.student, self.seed) if recipe.student else self.model
        return self.compile(model, passes)

    def compile(self, model: nn.Module, passes: object) -> CompactModule:
        """Compile a model with this data."""
        return fxcompress.compile(
            model, passes, self.example_inputs, train_data=self.loader(),
            calibration=[self.data.training.images[:_CALIBRATION]],
        )  # fmt: skip

    def run(self, recipe: Recipe, out: Path | None = None) -> tuple[Row, CompactModule]:
        """Run a recipe and measure what it made; save that as `out`/RECIPE.fxc."""
        started = time.perf_counter()
        compact = self.compress(recipe)
        seconds = time.perf_counter() - started
        return self.measure(recipe.name, self.text(recipe.passes), compact, seconds, out), compact

    def float_row(self, out: Path | None = None) -> Row:
        """Measure the network as it was trained."""
        graph = fxcompress.compile(self.model, "canonicalize", self.example_inputs)
        return self.measure(FLOAT, self.text(self.network.passes), graph, 0.0, out)

    def measure(self, name: str, passes: str, compact: CompactModule, seconds: float, out: Path | None) -> Row:
        """Return the figures of a compiled network."""
        found = cost(compact)
        own, of_float = _milliseconds([compact, self.model], self.example_inputs, self.turn)
        return Row(
            recipe=name, network=self.network.name, data=self.data.name, seed=self.seed,
            accuracy=accuracy(compact, self.data.test), parameters=found.parameters, sparsity=sparsity(compact),
            macs=found.macs, file_bytes=_saved(compact, name, out), milliseconds=own, float_milliseconds=of_float,
            seconds=round(seconds, 1), passes=passes, processes=processes.count(),
        )  # fmt: skip


def fresh(network: Network, width: int, seed: int) -> nn.Module:
    """Return a network with the weights that a seed gives; the global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network.build(width).eval()


def trained(network: Network, data: ImageData, seed: int, epochs: int | None = None, path: Path | None = None) -> Study:
    """Train a network from scratch with its own passes, or read it from `path`, where an earlier run has put it.

    Raises:
        InputError: the file holds another network.
    """
    study = Study(network, data, seed, fresh(network, network.width, seed), epochs)
    weights = None
    if path is not None and processes.from_main(path.exists):
        weights = fxcompress.load(path)
    if weights is None:
        weights = study.compile(study.model, prepared(network.passes, seed=seed, epochs=epochs))
        if path is not None:
            _save(weights, path)
    try:
        study.model.load_state_dict(weights.state_dict())
    except RuntimeError as error:
        raise InputError(f"{str(path)!r} holds another network than {network.name}: delete it") from error
    return study


def sparsity(graph_module: fx.GraphModule) -> float:
    """Return the share of the weights of convolutions and linear layers that are zero."""
    weights = [one for one in graph_module.parameters() if one.ndim >= 2]
    zeros = sum(int((one == 0).sum()) for one in weights)
    return zeros / max(1, sum(one.numel() for one in weights))


def _milliseconds(models: Iterable[nn.Module], images: torch.Tensor, turn: float, rounds: int = 5) -> list[float]:
    """Return the time of each model on one thread, the median over rounds in which they take turns."""
    times: list[tuple[nn.Module, list[float]]] = [(model, []) for model in models]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            for model, found in times:
                found.append(1e3 * median_seconds(lambda model=model: model(images), seconds=turn))  # type: ignore[misc]
    finally:
        torch.set_num_threads(threads)
    return [statistics.median(found) for _, found in times]


def _saved(compact: CompactModule, name: str, out: Path | None) -> int:
    """Save a module and return the size of the file."""
    if out is not None:
        _save(compact, out / f"{name}.fxc")
        return processes.from_main(lambda: (out / f"{name}.fxc").stat().st_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fxc"
        compact.save(path)
        return processes.from_main(lambda: path.stat().st_size)


def _save(compact: CompactModule, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FxCompressError(f"cannot write {str(path)!r}: {error}") from error
    compact.save(path)
