"""What recipes gave, over seeds: a summary, a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fxcompress.errors import MissingExtraError, OptionError
from fxcompress.recipes.runs import FLOAT, Row
from fxcompress.report import amount


@dataclass(frozen=True)
class Summary:
    """One recipe on one network and data set, over all seeds; means, in the units of `Row`.

    lowest, highest: accuracies. lost: mean over the seeds of the accuracy of the float network minus this one's; None
    where the float network was not measured. milliseconds: the shortest of all seeds, as other work on a machine only
    adds to times. ratio: the shortest time of the float network, beside any recipe, over that.
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
    return [_summary(group, references, _fastest_float(group[0], groups.values())) for group in groups.values()]


def _fastest_float(one: Row, groups: Iterable[Sequence[Row]]) -> float:
    """The shortest time of the network as it was trained, in milliseconds."""
    place = (one.network, one.data)
    return min(row.float_milliseconds for group in groups for row in group if (row.network, row.data) == place)


def _summary(rows: Sequence[Row], references: dict[tuple[str, str, int], float], of_float: float) -> Summary:
    first, fastest = rows[0], min(row.milliseconds for row in rows)
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
        statistics.fmean(row.file_bytes for row in rows), fastest, of_float / fastest,
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
            f"{one.sparsity:.0%}" if _is_sparse(one) else "",
            amount(round(one.parameters)),
            amount(round(one.macs)),
            f"{one.file_bytes / 1e3:.1f} kB",
            f"{one.milliseconds:.3f} ms",
            f"{one.ratio:.2f}",
        )
    return made


def _is_sparse(summary: Summary) -> bool:
    """Whether more single weights are zero than come out so by rounding."""
    return summary.sparsity >= 0.005


def percent(summary: Summary) -> str:
    """Return the accuracy, with its spread where there are several seeds."""
    mean = f"{100 * summary.accuracy:.2f}"
    return f"{mean} ± {100 * summary.spread:.2f} %" if summary.seeds > 1 else f"{mean} %"


#: What accuracy is drawn against: the words at the axis, and the figure.
_AGAINST: tuple[tuple[str, Callable[[Summary], float]], ...] = (
    ("size of the file, kB", lambda one: one.file_bytes / 1e3),
    ("millions of MACs for an image", lambda one: one.macs / 1e6),
    ("time of an image, of the float network's", lambda one: 1 / one.ratio),
)

#: Float networks, those with single weights that are zero, and others.
_DARK, _ORANGE, _BLUE = "#26323f", "#c2703d", "#2a78b5"


def plot(summaries: Sequence[Summary], path: Path) -> None:
    """Draw accuracy against size, MACs and time, one row for each network and data set, into .png, .svg or .pdf.

    Bars go from the worst to the best seed.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: the file cannot be written, or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "the plot of the recipes") from None
    rows: dict[tuple[str, str], list[Summary]] = {}
    for summary in summaries:
        rows.setdefault((summary.network, summary.data), []).append(summary)
    if not rows:
        raise OptionError("no recipe has run: there is nothing to plot")
    figure = Figure(figsize=(15, 5 * len(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, ((network, data), shown) in zip(parts, rows.items(), strict=True):
        part.suptitle(f"{network} on {data}", fontsize=11)
        shown.sort(key=lambda one: -one.accuracy)
        panels = part.subplots(1, len(_AGAINST), sharey=True)
        panels[0].set_ylabel("accuracy, %")
        for axes, (words, figure_of) in zip(panels, _AGAINST, strict=True):
            axes.set_xlabel(words)
            _draw(axes, shown, [figure_of(one) for one in shown])
        part.legend(
            *panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False,
            handlelength=1.2, title="orange: single weights are zero" if any(map(_is_sparse, shown)) else None,
            title_fontsize=8,
        )  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot write the plot {str(path)!r}: {error}") from error


def _draw(axes: Any, shown: Sequence[Summary], places: Sequence[float]) -> None:
    """Draw points with bars; the legend says which recipe a number is."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#e3e7ec", linewidth=0.6)
    axes.set_axisbelow(True)
    for number, (one, x) in enumerate(zip(shown, places, strict=True), start=1):
        y = 100 * one.accuracy
        colour = _DARK if one.recipe == FLOAT else _ORANGE if _is_sparse(one) else _BLUE
        bars = [[y - 100 * one.lowest], [100 * one.highest - y]]
        axes.errorbar(
            x, y, yerr=bars, fmt="o", markersize=5, color=colour, capsize=2, linewidth=1,
            label=f"{number}  {one.recipe}  {percent(one)}",
        )  # fmt: skip
    axes.margins(0.1)
    axes.autoscale_view()  # now, not when it is drawn: places on the page are needed
    points = axes.transAxes.inverted().transform(
        axes.transData.transform([(x, 100 * one.accuracy) for one, x in zip(shown, places, strict=True)])
    )
    for numbers in _together([(float(x), float(y)) for x, y in points]):
        first = numbers[0]
        at_the_edge = points[first][0] > 0.8
        axes.annotate(
            ", ".join(str(number + 1) for number in numbers), (places[first], 100 * shown[first].accuracy),
            textcoords="offset points", xytext=(-5 if at_the_edge else 5, 4), fontsize=8,
            ha="right" if at_the_edge else "left",
        )  # fmt: skip


def _together(points: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Group points (shares of the width and height) whose numbers would lie on each other, in their order."""
    groups: list[list[int]] = []
    for index, (x, y) in enumerate(points):
        for group in groups:
            left, top = points[group[0]]
            if abs(left - x) < 0.08 and abs(top - y) < 0.04:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups
