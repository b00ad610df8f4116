"""What recipes gave, over seeds: a summary, a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from fxcompress.errors import MissingExtraError, OptionError
from fxcompress.recipes.runs import FLOAT, Row
from fxcompress.report import amount


@dataclass(frozen=True)
class Summary:
    """One recipe on one network and data set, over all seeds; means, in the units of `Row`.

    lowest, highest: accuracies. lost: mean over the seeds of the accuracy of the float network minus this one's; None
    where the float network was not measured. ratio: median of the time of the float network over this one's.
    """

    recipe: str
    network: str
    data: str
    seeds: int
    accuracy: float
    lowest: float
    highest: float
    lost: float | None
    parameters: float
    sparsity: float
    macs: float
    file_bytes: float
    milliseconds: float
    ratio: float

    @property
    def spread(self) -> float:
        """Half of the distance between the best and the worst seed."""
        return (self.highest - self.lowest) / 2


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Return one summary for each recipe, network and data set, in the order in which they first come."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.network, row.data, row.recipe), []).append(row)
    references = {
        (row.network, row.data, row.seed): row.accuracy
        for group in groups.values() for row in group if row.recipe == FLOAT
    }  # fmt: skip
    return [_summary(group, references) for group in groups.values()]


def _summary(rows: Sequence[Row], references: dict[tuple[str, str, int], float]) -> Summary:
    first = rows[0]
    accuracies = [row.accuracy for row in rows]
    lost = [
        references[place] - row.accuracy
        for row in rows
        if (place := (row.network, row.data, row.seed)) in references
    ]  # fmt: skip
    return Summary(
        first.recipe, first.network, first.data, len(rows), statistics.fmean(accuracies), min(accuracies),
        max(accuracies), statistics.fmean(lost) if lost else None, statistics.fmean(row.parameters for row in rows),
        statistics.fmean(row.sparsity for row in rows), statistics.fmean(row.macs for row in rows),
        statistics.fmean(row.file_bytes for row in rows), statistics.fmean(row.milliseconds for row in rows),
        statistics.median(row.float_milliseconds / row.milliseconds for row in rows),
    )  # fmt: skip


def table(summaries: Iterable[Summary]) -> Table:
    """Return the table that a terminal shows."""
    made = Table("recipe", "on", "seeds", "accuracy", "lost, points", "zeros", "parameters", "MACs", "file", "batch 1",
                 "times as fast")  # fmt: skip
    for one in summaries:
        made.add_row(
            one.recipe,
            f"{one.network}, {one.data}",
            str(one.seeds),
            percent(one),
            "" if one.lost is None or one.recipe == FLOAT else f"{100 * one.lost:+.2f}",
            f"{one.sparsity:.0%}" if one.sparsity >= 0.005 else "",
            amount(round(one.parameters)),
            amount(round(one.macs)),
            f"{one.file_bytes / 1e3:.1f} kB",
            f"{one.milliseconds:.3f} ms",
            f"{one.ratio:.2f}",
        )
    return made


def percent(summary: Summary) -> str:
    """Return the accuracy, with its spread where there are several seeds."""
    mean = f"{100 * summary.accuracy:.2f}"
    return f"{mean} ± {100 * summary.spread:.2f} %" if summary.seeds > 1 else f"{mean} %"


def plot(summaries: Sequence[Summary], path: Path) -> None:
    """Draw accuracy against the size of the file, one panel for each network and data set, into .png, .svg or .pdf.

    Bars go from the worst to the best seed.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: the file cannot be written, or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "the plot of the recipes") from None
    panels: dict[tuple[str, str], list[Summary]] = {}
    for summary in summaries:
        panels.setdefault((summary.network, summary.data), []).append(summary)
    if not panels:
        raise OptionError("no recipe has run: there is nothing to plot")
    figure = Figure(figsize=(8.5, 5.2 * len(panels)), layout="constrained")
    for index, ((network, data), shown) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(len(panels), 1, index)
        axes.set_title(f"{network} on {data}: accuracy against size", fontsize=11)
        axes.set_xlabel("size of the file, kB")
        axes.set_ylabel("accuracy, %")
        axes.set_xscale("log")
        axes.grid(color="#e3e7ec", linewidth=0.6)
        axes.set_axisbelow(True)
        _draw(axes, shown)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot write the plot {str(path)!r}: {error}") from error


def _draw(axes: object, shown: Sequence[Summary]) -> None:
    """Draw points with bars and numbers; the legend says which recipe a number is."""
    for number, one in enumerate(sorted(shown, key=lambda one: -one.accuracy), start=1):
        x, y = one.file_bytes / 1e3, 100 * one.accuracy
        colour = "#26323f" if one.recipe == FLOAT else "#2a78b5" if one.sparsity < 0.005 else "#c2703d"
        bars = [[y - 100 * one.lowest], [100 * one.highest - y]]
        axes.errorbar(  # type: ignore[attr-defined]
            x, y, yerr=bars, fmt="o", color=colour, capsize=2, linewidth=1,
            label=f"{number}  {one.recipe}  {percent(one)}",
        )  # fmt: skip
        axes.annotate(  # type: ignore[attr-defined]
            str(number), (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8, color=colour
        )
    axes.legend(  # type: ignore[attr-defined]
        loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False, handlelength=1.2
    )
