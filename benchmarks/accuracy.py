"""What recipes cost in accuracy and save in size and time, over several seeds; and Torch-Pruning beside them.

    python benchmarks/accuracy.py --json benchmarks/results/accuracy.json
    python benchmarks/accuracy.py --data mnist --epochs 1 --samples 256 --json trial.json      # a trial of a minute

Networks are trained from scratch, one for each seed, and every recipe starts with that one. What the file has already
is not run again, so that a benchmark that was stopped goes on; trained networks are kept beside the file, in a folder
`*-networks`. Torch-Pruning (extra `bench`) takes channels out of the same ResNet-20 down to the MACs of `half-macs`,
and its networks are fine-tuned by the same passes on the same batches.

Recipes of several processes are started with torchrun; `several-processes:2` is the recipe with another number of them.
Latency is that of one image on one thread, each network in turn with the float one.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from fxcompress import processes
from fxcompress.bench import write_json
from fxcompress.errors import FxCompressError, MissingExtraError, OptionError
from fxcompress.pipeline.base import Pass
from fxcompress.pipeline.text import print_pipeline
from fxcompress.recipes.catalogue import RECIPES, Recipe, find_recipe, prepared
from fxcompress.recipes.data import load_data
from fxcompress.recipes.figures import Summary, plot, summarise, table
from fxcompress.recipes.networks import NETWORKS, Network, find_network
from fxcompress.recipes.runs import FLOAT, Row, Study, trained

#: Torch-Pruning's pruner of L2 norms: which layers it compares.
PEERS = {"torch-pruning": True, "torch-pruning layer-wise": False}

#: The recipe that Torch-Pruning is compared with.
OPPONENT = "half-macs"

#: A recipe for several processes, what is run with fewer, and what with one.
SHARED, FEWER, ALONE = "several-processes", "several-processes:2", "several-processes:1"

#: What is run on each network unless something else is said.
DEFAULT = {
    "baby-cnn": (FLOAT, *RECIPES, FEWER, ALONE),
    "resnet-20": (FLOAT, OPPONENT, *PEERS, "ptq", "qat"),
}


# Torch-Pruning


def peer(study: Study, name: str, macs: int) -> Row:
    """Prune with Torch-Pruning to a number of MACs, and fine-tune as the recipe does."""
    started = time.perf_counter()
    ratio, pruned = nearest(study, PEERS[name], macs)
    compact = study.compile(pruned, fine_tuning(study))
    text = f"torch_pruning.MagnitudePruner(p=2, global_pruning={PEERS[name]}, pruning_ratio={ratio:.4f})"
    text += behind_peer(study, macs)
    return study.measure(name, text, compact, time.perf_counter() - started, None)


def fine_tuning(study: Study) -> list[Pass]:
    """Return the passes of our recipe, but for the pruning."""
    own = prepared(RECIPES[OPPONENT].passes, seed=study.seed, epochs=study.epochs, teacher=study.model)
    return [item for item in own if item.name != "prune-channels"]


def behind_peer(study: Study, macs: int) -> str:
    """Return how the text of a peer's row goes on behind its pruner."""
    return f" to {macs} MACs, {print_pipeline(fine_tuning(study))}"


def nearest(study: Study, together: bool, macs: int) -> tuple[float, nn.Module]:
    """Return the ratio, by bisection, that leaves as many MACs as wanted or as few more as can be, and the network.

    Never fewer: the network that it is compared with must not have more to work with.
    """
    low, high = 0.0, 0.95
    best = pruned(study, together, low)
    for _ in range(12):
        middle = (low + high) / 2
        found = pruned(study, together, middle)
        if macs_of(study, found) >= macs:
            low, best = middle, found
        else:
            high = middle
    return low, best


def pruned(study: Study, together: bool, ratio: float) -> nn.Module:
    """Return a pruned copy of the trained network, with the options that Torch-Pruning's own examples give."""
    try:
        import torch_pruning
    except ImportError:
        raise MissingExtraError("torch-pruning", "bench", "the comparison with Torch-Pruning") from None
    model = copy.deepcopy(study.model)
    outputs = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == 10]
    torch_pruning.pruner.MagnitudePruner(
        model, study.example_inputs, importance=torch_pruning.importance.MagnitudeImportance(p=2),
        global_pruning=together, pruning_ratio=ratio, ignored_layers=outputs,
    ).step()  # fmt: skip
    return model.eval()


def macs_of(study: Study, model: nn.Module) -> int:
    """Count as for our own networks."""
    report = study.compile(model, "canonicalize").report
    assert report is not None
    return report.after.macs


# Claims


@dataclass(frozen=True)
class Claim:
    """Something that shall hold. found and limit: in points of accuracy or as a share; found must not be above."""

    text: str
    found: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.found <= self.limit


#: Points of accuracy that recipes may lose on Fashion-MNIST.
MAY_LOSE = {"half-macs": 0.3, "quarter-macs": 1.0, "unstructured-60": 0.2, "ptq": 0.3, "qat": 0.1, "qat-w4a8": 1.0,
            "prune-qat-distill": 1.0}  # fmt: skip

#: (better, other, points by which it shall be better)
SHALL_BEAT = (("iterative", "one-shot", 0.0), ("distillation", "student-alone", 0.3))


def claims(summaries: Sequence[Summary]) -> Iterator[Claim]:
    """Yield what shall hold of the figures on Fashion-MNIST, as far as they are there."""
    baby, residual = (
        {one.recipe: one for one in summaries if (one.network, one.data) == (network, "fashion-mnist")}
        for network in ("baby-cnn", "resnet-20")
    )
    if FLOAT in baby:
        yield Claim("float: at least 91 %", 91.0 - 100 * baby[FLOAT].accuracy, 0.0)
    for name, limit in MAY_LOSE.items():
        if name in baby and baby[name].lost is not None:
            yield Claim(f"{name}: points lost", 100 * (baby[name].lost or 0.0), limit)
    for better, other, by in SHALL_BEAT:
        if better in baby and other in baby:
            lead = 100 * (baby[better].accuracy - baby[other].accuracy)
            yield Claim(f"{better}: at least {by} points above {other}", by - lead, 0.0)
    if FLOAT in baby and "prune-qat-distill" in baby:
        yield Claim(
            "prune-qat-distill: share of the bytes", baby["prune-qat-distill"].file_bytes / baby[FLOAT].file_bytes, 0.1
        )
    for name in (SHARED, FEWER):
        if name in baby and ALONE in baby:
            apart = 100 * abs(baby[name].accuracy - baby[ALONE].accuracy)
            seeds = 100 * (baby[ALONE].highest - baby[ALONE].lowest)
            yield Claim(f"{name}: points away from one process, whose seeds are as far from each other", apart, seeds)
    for name in PEERS:
        if name in residual and OPPONENT in residual:
            lead = 100 * (residual[OPPONENT].accuracy - residual[name].accuracy)
            yield Claim(f"resnet-20, {OPPONENT}: not below {name}", -lead, 0.0)


# Running


def recipe_of(name: str) -> Recipe | None:
    """Return the recipe of a name such as "ptq" or "several-processes:2"; None for what is no recipe.

    Raises:
        OptionError: there is none of that name.
    """
    if name in (FLOAT, *PEERS):
        return None
    word, _, count = name.partition(":")
    recipe = find_recipe(word)
    if not count:
        return recipe
    if not count.isdecimal() or int(count) < 1:
        raise OptionError(f"{name!r}: behind the colon stands a number of processes, such as 2, not {count!r}")
    return dataclasses.replace(recipe, name=name, processes=int(count))


def read_rows(path: Path) -> list[Row]:
    """Return the rows that a file has; none where there is no file."""
    if not path.exists():
        return []
    try:
        return [Row(**row) for row in json.loads(path.read_text())["results"]["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FxCompressError(f"{str(path)!r} is no file of this benchmark: {error}; name another one") from error


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write all figures, as they are now."""
    summaries = summarise(rows)
    write_json(path, {
        "rows": [asdict(row) for row in rows],
        "summaries": [{**asdict(one), "spread": one.spread} for one in summaries],
        "claims": [{**asdict(one), "holds": one.holds} for one in claims(summaries)],
    })  # fmt: skip


@dataclass
class Benchmark:
    """The rows of one file, and how more of them are made."""

    options: argparse.Namespace

    @property
    def path(self) -> Path:
        """Of the figures."""
        path: Path = self.options.json
        return path

    def run(self, network: Network, seed: int, names: Sequence[str]) -> None:
        """Make the rows of one network that are not there yet."""
        options = self.options
        data = load_data(options.data, seed, options.samples)
        untrained = Study(network, data, seed, nn.Identity(), options.epochs)
        if all(self._has(untrained, name) for name in names):
            return
        digest = hashlib.blake2b(untrained.text(network.passes).encode(), digest_size=4).hexdigest()
        folder = self.path.with_name(f"{self.path.stem}-networks")
        study = trained(network, data, seed, options.epochs, folder / f"{network.name}-{data.name}-{seed}-{digest}.fxc")
        for name in names:
            if self._has(study, name):
                continue
            recipe = recipe_of(name)
            if recipe is not None and recipe.processes > processes.count():
                self._start(recipe, network, seed)
            else:
                self._add(self._row(study, name))

    def _has(self, study: Study, name: str) -> bool:
        """Whether a row is there, made by the same passes, and a peer's with as many MACs as our recipe has left."""
        row, own, recipe = self._find(study, name), self._find(study, OPPONENT), recipe_of(name)
        if row is None:
            return False
        if recipe is not None:
            return (row.passes, row.processes) == (study.text(recipe.passes), recipe.processes)
        if name in PEERS:
            return own is not None and row.passes.endswith(behind_peer(study, own.macs))
        return row.passes == study.text(study.network.passes)

    def _find(self, study: Study, name: str) -> Row | None:
        """Return the row of that name, if the file has it."""
        place = (study.network.name, study.data.name, study.seed, name)
        rows = [one for one in read_rows(self.path) if (one.network, one.data, one.seed, one.recipe) == place]
        return rows[-1] if rows else None

    def _row(self, study: Study, name: str) -> Row:
        if name == FLOAT:
            return study.float_row()
        recipe = recipe_of(name)
        if recipe is not None:
            return study.run(recipe)[0]
        own = self._find(study, OPPONENT)
        if own is None:
            raise OptionError(f"{name!r} is compared with {OPPONENT!r}, which has not run: name both")
        return peer(study, name, own.macs)

    def _add(self, row: Row) -> None:
        """Write a row in the place of an older one, after each: what has been measured is not lost."""
        if not processes.is_main():
            return

        def place(one: Row) -> tuple[str, str, int, str]:
            return one.network, one.data, one.seed, one.recipe

        rows = [one for one in read_rows(self.path) if place(one) != place(row)]
        write_rows(self.path, [*rows, row])
        print(f"{row.network}, {row.data}, seed {row.seed}, {row.recipe}: {100 * row.accuracy:.2f} %, "
              f"{row.seconds:.0f} s", flush=True)  # fmt: skip

    def _start(self, recipe: Recipe, network: Network, seed: int) -> None:
        options = self.options
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(recipe.processes),
            __file__, "--recipes", recipe.name, "--networks", network.name, "--seeds", str(seed),
            "--data", options.data, "--json", str(self.path), "--quiet",
        ]  # fmt: skip
        for option, value in (("--epochs", options.epochs), ("--samples", options.samples)):
            command += [] if value is None else [option, str(value)]
        subprocess.run(command, check=True)

    def show(self) -> None:
        """Print the table and what holds; draw the plot."""
        rows = read_rows(self.path)
        write_rows(self.path, rows)  # with the command that was given to this program
        summaries = summarise(rows)
        Console(width=160).print(table(summaries))
        for claim in claims(summaries):
            print(f"{'holds' if claim.holds else 'FAILS'}  {claim.text}: {claim.found:.3g} (at most {claim.limit:g})")
        plot(summaries, self.options.plot or self.path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--recipes", nargs="*", help=f"names of recipes, 'float', {', '.join(map(repr, PEERS))}")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--data", default="fashion-mnist", help="mnist, fashion-mnist or a folder")
    parser.add_argument("--epochs", type=int, help="of every training, instead of its own; for a trial")
    parser.add_argument("--samples", type=int, help="images to train on at most; for a trial")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quiet", action="store_true", help="no table and no plot at the end")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    benchmark = Benchmark(options)
    try:
        for name in options.recipes or ():
            recipe_of(name)
        for seed in options.seeds:
            for word in options.networks:
                network = find_network(word)
                benchmark.run(network, seed, options.recipes or DEFAULT[word])
        if not options.quiet and processes.is_main():
            benchmark.show()
    except FxCompressError as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from None


if __name__ == "__main__":
    main()
