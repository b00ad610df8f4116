"""Timings to look at: tables, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from fxcompress.bench import Timing
from fxcompress.bench_layers import LayerTimes
from fxcompress.errors import MissingExtraError, OptionError
from fxcompress.report import amount


def timing_table(timings: Sequence[Timing], title: str) -> Table:
    """Return a table of engines: milliseconds, their spread over the rounds, and the quality of the output."""
    table = Table("engine", "batch", "ms", "spread", "times as fast", "SQNR dB", title=title)
    for timing in timings:
        if timing.median is None:
            table.add_row(timing.engine, str(timing.batch), "-", "", f"failed: {timing.error}", "")
            continue
        ratio = "" if timing.ratio is None else f"{timing.ratio:.2f}"
        sqnr = "" if timing.sqnr_db is None else f"{timing.sqnr_db:.1f}"
        spread = f"{(max(timing.rounds) - min(timing.rounds)) / timing.median:.0%}"
        table.add_row(timing.engine, str(timing.batch), f"{1e3 * timing.median:.2f}", spread, ratio, sqnr)
    return table


def against_best_lines(ratios: Mapping[int, float], ours: str) -> list[str]:
    """Return one line for each batch size: our time over that of the best other engine."""
    return [f"batch {batch}: {ours} takes {ratio:.2f} of the time of the best other" for batch, ratio in ratios.items()]


def layer_table(times: LayerTimes, title: str) -> Table:
    """Return a table of layers: measured microseconds beside what the arithmetic alone would take."""
    measured = "steps of the kernels" if times.by_kernels else "nodes, each called by Python"
    table = Table(
        "layer", "kind", "MACs", "us", "share", "floor, us", "of the peak",
        title=f"{title}, batch {times.batch}: {measured}; peak {times.peak / 1e9:.0f} GMAC/s",
    )  # fmt: skip
    for layer in times.layers:
        name = layer.layer if layer.layer in ("", layer.name) else f"{layer.layer} ({layer.name})"
        table.add_row(
            name or layer.name, layer.kind, amount(layer.macs) if layer.macs else "", _micro(layer.seconds),
            f"{layer.seconds / times.seconds:.1%}", _micro(layer.floor) if layer.macs else "",
            f"{layer.floor / layer.seconds:.0%}" if layer.macs else "",
        )  # fmt: skip
    table.add_section()
    total = sum(layer.macs for layer in times.layers)
    table.add_row("all layers", "", amount(total), _micro(times.seconds), "", _micro(times.floor),
                  f"{times.floor / times.seconds:.0%}")  # fmt: skip
    table.add_row("a whole call", "", "", _micro(times.call), "", "", f"{times.floor / times.call:.0%}")
    if times.inside is not None and times.outside is not None:
        parts = (("inside kernels", times.inside), ("outside kernels", times.outside))
        for name, part in parts:
            table.add_row(f"of it, {name}", "", "", _micro(part * times.call), f"{part:.1%}", "", "")
    return table


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def plot(timings: Sequence[Timing], path: Path, title: str) -> None:
    """Draw the time of each engine, one panel for each batch size, into a .png, .svg or .pdf file.

    Bars are medians, whiskers reach from the fastest round to the slowest.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: the file cannot be written, or no engine has figures.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "the plot of a benchmark") from None
    batches = list(dict.fromkeys(timing.batch for timing in timings if timing.median is not None))
    if not batches:
        raise OptionError("no engine could run the model: there is nothing to plot")
    most = max(sum(timing.batch == batch for timing in timings) for batch in batches)
    figure = Figure(figsize=(5.2 * len(batches), 1.4 + 0.42 * most), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        shown = [timing for timing in timings if timing.batch == batch and timing.median is not None]
        middle = [1e3 * (timing.median or 0.0) for timing in shown]
        below = [value - 1e3 * min(timing.rounds) for value, timing in zip(middle, shown, strict=True)]
        above = [1e3 * max(timing.rounds) - value for value, timing in zip(middle, shown, strict=True)]
        colours = ["#1f7a8c" if timing.engine.startswith("fxcompress") else "#b8c4cc" for timing in shown]
        axes.barh(range(len(shown)), middle, xerr=[below, above], color=colours, ecolor="#26323f", capsize=2)
        axes.set_yticks(range(len(shown)), [timing.engine for timing in shown])
        axes.invert_yaxis()
        for row, (value, timing) in enumerate(zip(middle, shown, strict=True)):
            quality = "" if timing.sqnr_db is None else f"  {timing.sqnr_db:.0f} dB"
            axes.text(value + above[row], row, f"  {value:.2f} ms{quality}", va="center", fontsize=8)
        axes.margins(x=0.35)
        axes.set_xlim(left=0)
        axes.set_xlabel("ms a call")
        axes.set_title(f"batch {batch}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot write the plot {str(path)!r}: {error}") from error
