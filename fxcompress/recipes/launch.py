"""Recipes from the command line: one after the other, in as many processes as each of them wants."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from fxcompress import processes
from fxcompress.bench import write_json
from fxcompress.errors import MissingExtraError, ProcessError
from fxcompress.recipes.catalogue import Recipe
from fxcompress.recipes.data import load_data
from fxcompress.recipes.figures import plot, summarise, table
from fxcompress.recipes.networks import find_network
from fxcompress.recipes.runs import Row, Study, trained


@dataclass(frozen=True)
class Trial:
    """What recipes are tried on, see `fxcompress recipes --help`."""

    network: str
    data: str
    seed: int
    epochs: int | None
    samples: int | None
    out: Path

    def arguments(self) -> list[str]:
        """Return them as the command line has them."""
        given = ["--network", self.network, "--data", self.data, "--seed", str(self.seed), "--out", str(self.out)]
        for option, value in (("--epochs", self.epochs), ("--samples", self.samples)):
            given += [] if value is None else [option, str(value)]
        return given


def remark(recipe: Recipe) -> str:
    """Say how a recipe of several processes is started by hand; nothing for the others."""
    if recipe.processes == 1:
        return ""
    return f"  [torchrun --standalone --nproc_per_node {recipe.processes} -m fxcompress recipes {recipe.name}]"


def run(recipes: Sequence[Recipe], trial: Trial) -> None:
    """Train the network, run the recipes, print a table, and write artefacts, figures and a plot.

    A recipe of several processes starts them, unless a launcher has done that already.
    """
    network = find_network(trial.network)
    here = [recipe for recipe in recipes if recipe.processes == 1 or processes.count() > 1]
    if here:
        study = trained(network, load_data(trial.data, trial.seed, trial.samples), trial.seed, trial.epochs)
        _run_here(study, here, trial)
    for recipe in recipes:
        if recipe not in here:
            start(recipe, trial)


def start(recipe: Recipe, trial: Trial) -> None:
    """Run a recipe in several processes of this machine.

    Raises:
        ProcessError: they failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(recipe.processes),
               "-m", "fxcompress", "recipes", recipe.name, *trial.arguments()]  # fmt: skip
    _say(f"{recipe.name}{remark(recipe)}")
    if subprocess.run(command, check=False).returncode:
        raise ProcessError(f"the {recipe.processes} processes of {recipe.name!r} ended with an error; see above")


def _run_here(study: Study, recipes: Sequence[Recipe], trial: Trial) -> None:
    rows: list[Row] = [study.float_row(trial.out)]
    for recipe in recipes:
        _say(f"{recipe.name}: {recipe.passes}")
        row, _ = study.run(recipe, trial.out)
        rows.append(row)
    if not processes.is_main():
        return
    summaries = summarise(rows)
    Console(width=160).print(table(summaries))
    stem = f"{recipes[0].name}" if len(recipes) == 1 else "recipes"
    figures, picture = trial.out / f"{stem}.json", trial.out / f"{stem}.png"
    write_json(figures, [asdict(row) for row in rows])
    _say(f"wrote {figures}")
    try:
        plot(summaries, picture)
    except MissingExtraError as error:  # the figures are there without it
        _say(f"no plot: {error}")
    else:
        _say(f"wrote {picture}")


def _say(text: str) -> None:
    if processes.is_main():
        print(text, flush=True)
