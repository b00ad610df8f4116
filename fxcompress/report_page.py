"""The report as one HTML page: tables, and plots drawn by matplotlib as SVG inside the page. It loads nothing."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxcompress import processes
from fxcompress.errors import MissingExtraError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fxcompress.report import Report

Draw = Callable[["Axes"], None]

_BEFORE, _AFTER, _INK = "#9aa7b8", "#1f6f8b", "#26323f"
_SERIES = (_BEFORE, "#3f8f6b", _AFTER, "#b8653a", "#7a5aa6")

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #26323f; background: #f5f7f9; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 40px 0 12px; }
p.about { color: #5b6b7b; margin: 0 0 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; }
.tile { background: #fff; border: 1px solid #dde3e9; border-radius: 8px; padding: 14px 16px; }
.tile b { display: block; font-size: 24px; } .tile span { color: #5b6b7b; font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 16px; }
figure { background: #fff; border: 1px solid #dde3e9; border-radius: 8px; margin: 0; padding: 12px; }
figure.wide { grid-column: 1 / -1; } figure svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; background: #fff; border: 1px solid #dde3e9; border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: 6px 12px; border-bottom: 1px solid #edf0f3; vertical-align: top; }
th { background: #fafbfc; font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr:last-child td { border-bottom: 0; } code { font-size: 12px; overflow-wrap: anywhere; }
"""


def write_page(report: Report, path: Path) -> Path:
    """Write the report as an HTML page and return its path. Of several processes only the first one writes.

    `report.measurements` may hold "rows": a list of dicts with "name" and any of "accuracy" (0 to 1), "parameters",
    "macs", "file_bytes" and "milliseconds" (batch size -> ms), and "layers": layer -> [ms before, ms after]. They are
    shown as a table and plots.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UnsupportedError: the file cannot be written.
    """
    if not processes.is_main():
        return path
    text = page(report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UnsupportedError(f"cannot write the report {str(path)!r}: {error}") from error
    return path


def page(report: Report) -> str:
    """Return the HTML page."""
    sections = [
        f"<h1>{html.escape(report.model)}, compiled</h1>",
        f'<p class="about">{html.escape(_about(report))}</p>',
        _tiles(report),
        _measurements(report),
        _plots(report),
        _passes(report),
        _layers(report),
        _notes(report),
    ]
    title = f"fxcompress: {html.escape(report.model)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main>\n{''.join(section for section in sections if section)}\n</main></body></html>\n"
    )


def _about(report: Report) -> str:
    seconds = sum(line.seconds for line in report.passes)
    return f"{len(report.passes)} passes, {seconds:.2f} s of their own time"


# Tables


def _tiles(report: Report) -> str:
    from fxcompress.report import amount

    tiles = []
    for name, before, after in (
        ("parameters", report.before.parameters, report.after.parameters),
        ("multiply-accumulates", report.before.macs, report.after.macs),
        ("bytes in memory", report.before.bytes, report.after.bytes),
        ("nodes", report.before.nodes, report.after.nodes),
    ):
        ratio = f"{before / after:.1f}x fewer" if after and before > after else "unchanged"
        if before < after:
            ratio = f"{after / before:.1f}x more" if before else "new"
        tiles.append(
            f'<div class="tile"><span>{name}</span><b>{ratio}</b>'
            f"<span>{amount(before)} &rarr; {amount(after)}</span></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """Return a table. `numbers` are the columns that hold figures."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="number">{text}</{tag}>' if index in numbers else f"<{tag}>{text}</{tag}>"
            for index, text in enumerate(texts)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def _measurements(report: Report) -> str:
    from fxcompress.report import amount

    rows = report.measurements.get("rows") or []
    if not rows:
        return ""
    batches = _batches(rows)
    head = ["", "accuracy", "parameters", "MACs", "file bytes", *(f"ms, batch {batch}" for batch in batches)]
    body = []
    for row in rows:
        figures = [amount(row[name]) if row.get(name) is not None else "" for name in ("parameters", "macs")]
        size = f"{row['file_bytes']:,}" if row.get("file_bytes") is not None else ""
        accuracy = f"{100 * row['accuracy']:.1f} %" if row.get("accuracy") is not None else ""
        times = [f"{row['milliseconds'][batch]:.3f}" for batch in batches]
        body.append([html.escape(str(row["name"])), accuracy, *figures, size, *times])
    return f"<h2>Measured</h2>{_table(head, body, range(1, len(head)))}"


def _batches(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the batch sizes that every row was timed at."""
    timed = [row.get("milliseconds") or {} for row in rows]
    return [batch for batch in timed[0] if all(batch in times for times in timed)]


def _passes(report: Report) -> str:
    from fxcompress.report import amount

    head = ["pass", "contract", "edits", "parameters", "MACs", "bytes", "seconds", "difference"]
    rows = [
        [f"<code>{html.escape(line.name)}</code>", html.escape(line.contract), str(line.edits), amount(line.parameters),
         amount(line.macs), amount(line.bytes), f"{line.seconds:.3f}",
         "" if line.difference is None else f"{line.difference:.1e}"]
        for line in report.passes
    ]  # fmt: skip
    about = (
        '<p class="about">Costs are those behind the pass. Difference: the largest change of the outputs across it, '
        "relative to the largest output; checked for exact passes that changed something.</p>"
    )
    return f"<h2>Passes</h2>{about}{_table(head, rows, range(2, 8))}"


def _layers(report: Report) -> str:
    from fxcompress.report import change

    head = ["layer", "kind", "parameters", "MACs", "what happened"]
    rows = [
        [f"<code>{html.escape(line.layer)}</code>", html.escape(line.kind), change(line.parameters), change(line.macs),
         "<br>".join(html.escape(note) for note in line.notes)]
        for line in report.layers
    ]  # fmt: skip
    return f"<h2>Layers</h2>{_table(head, rows, (2, 3))}"


def _notes(report: Report) -> str:
    if not report.notes:
        return ""
    return (
        f"<h2>Remarks of the capture</h2><ul>{''.join(f'<li>{html.escape(note)}</li>' for note in report.notes)}</ul>"
    )


# Plots


def _plots(report: Report) -> str:
    rows = report.measurements.get("rows") or []
    drawings: list[tuple[str, Draw | None, tuple[float, float]]] = [
        ("", _accuracy_against_size(rows), (5.2, 3.6)),
        ("", _latencies(rows), (5.2, 3.6)),
        ("", _costs_by_pass(report), (5.2, 3.6)),
        ("", _losses(report), (5.2, 3.6)),
        ("", _validations(report), (5.2, 3.6)),
        ("", _learning_rates(report), (5.2, 3.6)),
        ("wide", _layer_times(report.measurements.get("layers") or {}), (10.6, 3.8)),
    ]
    figures = [f'<figure class="{kind}">{_svg(draw, size)}</figure>' for kind, draw, size in drawings if draw]
    return f'<h2>Plots</h2><div class="plots">{"".join(figures)}</div>' if figures else ""


def _svg(draw: Draw, size: tuple[float, float]) -> str:
    """Draw one plot and return it as an SVG element, the same bytes every time."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "the HTML report") from None
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "fxcompress", "font.family": "sans-serif", "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#b9c3cd", "text.color": _INK,
        "axes.labelcolor": _INK, "xtick.color": "#5b6b7b", "ytick.color": "#5b6b7b", "axes.titlesize": 11,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.axisbelow": True, "grid.color": "#e8ecf0",
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        output = io.StringIO()
        FigureCanvasSVG(figure).print_figure(output, format="svg", metadata={"Date": None})
    text = output.getvalue()
    return text[text.index("<svg") :]


def _accuracy_against_size(rows: Sequence[dict[str, Any]]) -> Draw | None:
    points = [row for row in rows if row.get("accuracy") is not None and row.get("file_bytes")]
    if not points:
        return None

    def draw(axes: Axes) -> None:
        for index, row in enumerate(points):
            size, accuracy = row["file_bytes"] / 1e3, 100 * row["accuracy"]
            axes.scatter([size], [accuracy], s=70, color=_SERIES[index % len(_SERIES)], zorder=3)
            axes.annotate(str(row["name"]), (size, accuracy), xytext=(0, 9), textcoords="offset points", ha="center")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
        low, high = axes.get_xlim()
        axes.set_xlim(low / 1.6, high * 1.6)
        lowest = min(100 * row["accuracy"] for row in points)
        axes.set_ylim(max(0.0, lowest - 2), min(100.5, max(100 * row["accuracy"] for row in points) + 1.5))
        axes.grid(visible=True, which="major")
        axes.set(xlabel="file, kB (logarithmic)", ylabel="accuracy, %", title="Accuracy against size")

    return draw


def _latencies(rows: Sequence[dict[str, Any]]) -> Draw | None:
    batches = _batches(rows) if rows else []
    if not batches:
        return None

    def draw(axes: Axes) -> None:
        width = 0.8 / len(rows)
        for index, row in enumerate(rows):
            times = [row["milliseconds"][batch] for batch in batches]
            heights = [time / rows[0]["milliseconds"][batch] for time, batch in zip(times, batches, strict=True)]
            places = [place + (index - (len(rows) - 1) / 2) * width for place in range(len(batches))]
            bars = axes.bar(places, heights, 0.92 * width, color=_SERIES[index % len(_SERIES)], label=str(row["name"]))
            axes.bar_label(bars, [f"{time:.2f} ms" for time in times], fontsize=8, padding=2)
        axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
        axes.margins(y=0.15)
        axes.legend(frameon=False, fontsize=9)
        axes.set(ylabel=f"time, {rows[0]['name']} = 1", title="Latency")

    return draw


def _costs_by_pass(report: Report) -> Draw | None:
    steps = [line for line in report.passes if line.modified]
    if not steps or not report.before.parameters:
        return None

    def draw(axes: Axes) -> None:
        names = ["captured", *(line.name.partition("{")[0] for line in steps)]
        places = range(len(names))
        for word, color in (("parameters", _INK), ("macs", "#3f8f6b"), ("bytes", _AFTER)):
            first = getattr(report.before, word)
            shares = [100.0, *(100 * getattr(line, word) / first if first else math.nan for line in steps)]
            axes.step(places, shares, where="mid", color=color, label="MACs" if word == "macs" else word, linewidth=1.8)
            axes.plot(places, shares, "o", color=color, markersize=3.5)
        axes.set_xticks(places, names, rotation=40, ha="right", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, axis="y")
        axes.legend(frameon=False, fontsize=9)
        axes.set(ylabel="% of the captured model", title="What each pass left")

    return draw


def _losses(report: Report) -> Draw | None:
    return _curves(_by_epoch(report, "loss"), "mean loss", "Training inside the pipeline", from_zero=True)


def _validations(report: Report) -> Draw | None:
    names = {str(line.metrics["metric"]) for line in report.passes if "metric" in line.metrics}
    return _curves(_by_epoch(report, "validation"), ", ".join(sorted(names)), "Evaluation during training")


def _learning_rates(report: Report) -> Draw | None:
    curves = [(name, rates) for name, rates in _by_epoch(report, "learning_rate") if len(set(rates)) > 1]
    return _curves(curves, "learning rate", "Schedule of the learning rate", from_zero=True)


def _by_epoch(report: Report, figure: str) -> list[tuple[str, Sequence[float]]]:
    """Return the passes that have a figure of more than one epoch, and these figures."""
    found = [(line.name, line.metrics.get(figure)) for line in report.passes]
    return [
        (_shortened(name), values) for name, values in found if isinstance(values, (list, tuple)) and len(values) > 1
    ]


def _shortened(name: str) -> str:
    return name if len(name) <= 48 else f"{name[:45]}..."


def _curves(
    curves: Sequence[tuple[str, Sequence[float]]], figure: str, title: str, from_zero: bool = False
) -> Draw | None:
    if not curves:
        return None

    def draw(axes: Axes) -> None:
        for index, (name, values) in enumerate(curves):
            axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3.5, label=name,
                      color=_SERIES[(index + 2) % len(_SERIES)])  # fmt: skip
        axes.grid(visible=True, axis="y")
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        axes.set(xlabel="epoch", ylabel=figure, title=title)

    return draw


def _layer_times(times: dict[str, Sequence[float]]) -> Draw | None:
    shown = {name: pair for name, pair in times.items() if max(pair) > 0.01 * max(map(max, times.values()))}
    if not shown:
        return None

    def draw(axes: Axes) -> None:
        for index, (label, color) in enumerate((("before", _BEFORE), ("after", _AFTER))):
            places = [place + (index - 0.5) * 0.4 for place in range(len(shown))]
            heights = [1e3 * pair[index] for pair in shown.values()]
            axes.bar(places, heights, 0.38, color=color, label=label)
        axes.set_xticks(range(len(shown)), list(shown), rotation=40, ha="right", fontsize=8)
        axes.grid(visible=True, axis="y")
        axes.legend(frameon=False, fontsize=9)
        axes.set(ylabel="microseconds", title="Time per layer")

    return draw
