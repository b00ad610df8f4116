"""The report: before and after, per pass, per layer and in total, with a reason for every layer left alone."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fxcompress.analysis.cost import Cost, LayerCost
from fxcompress.pipeline.base import Note
from fxcompress.pipeline.manager import PassRow

FORMAT = 1


@dataclass(frozen=True)
class PassLine:
    """What one pass did: its text, contract, own seconds, edits, the totals behind it, and the check's difference."""

    name: str
    contract: str
    seconds: float
    modified: bool
    edits: int
    parameters: int
    macs: int
    bytes: int
    difference: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerLine:
    """What happened to one layer or compute node.

    layer: its path in the caller's model, or the node's name. kind: of operation. parameters, macs (per sample) and
    bytes: (before, after). notes: what every pass said of it, in order.
    """

    layer: str
    kind: str
    parameters: tuple[int, int]
    macs: tuple[int, int]
    bytes: tuple[int, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Totals:
    """Parameters (elements), MACs (per sample), bytes in memory, number of nodes."""

    parameters: int
    macs: int
    bytes: int
    nodes: int


@dataclass(frozen=True)
class Report:
    """What every pass did, what happened to every layer, and what was left alone and why.

    model: name of the model's class. before, after: totals of the captured and of the final graph. file_bytes: size of
    the artefact, once saved. measurements: figures that somebody measured on the result (accuracy, latency), by name.
    """

    model: str
    before: Totals
    after: Totals
    passes: tuple[PassLine, ...] = ()
    layers: tuple[LayerLine, ...] = ()
    notes: tuple[str, ...] = ()
    file_bytes: int | None = None
    measurements: dict[str, Any] = field(default_factory=dict)

    def table(self, layers: bool = True) -> str:
        """Return the report as text, tables of at most 120 columns.

        Args:
            layers: whether to list every layer, or only passes and totals.
        """
        return _render(self, layers)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists, strings and numbers; `Report.from_dict` reads them back."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Report:
        """Build a report from what `to_dict` returned."""
        return cls(
            model=str(given["model"]),
            before=Totals(**given["before"]),
            after=Totals(**given["after"]),
            passes=tuple(PassLine(**line) for line in given["passes"]),
            layers=tuple(_layer_from(line) for line in given["layers"]),
            notes=tuple(given["notes"]),
            file_bytes=given["file_bytes"],
            measurements=dict(given["measurements"]),
        )

    def to_html(self, path: str | pathlib.Path) -> pathlib.Path:
        """Write the report as one HTML page with plots and return its path. Needs the extra `plot`."""
        from fxcompress.report_page import write_page

        return write_page(self, pathlib.Path(path))


def build(
    model: str,
    before: Cost,
    rows: Iterable[PassRow],
    after: Cost,
    notes: Iterable[str] = (),
    opaque: Mapping[str, str] | None = None,
) -> Report:
    """Make the report of a pipeline run.

    Args:
        model: name of the model's class.
        before, after: costs of the canonical graph before the passes and of the final one.
        rows: one per pass.
        notes: remarks of the capture.
        opaque: layers and nodes that could not be traced, with the reasons.
    """
    rows = list(rows)
    untraced = [Note(layer, f"opaque: could not be traced ({why})") for layer, why in (opaque or {}).items()]
    said = _notes_by_layer([*untraced, *(note for row in rows for note in row.notes)])
    names = [*before.layers, *(name for name in after.layers if name not in before.layers and name in said)]
    lines = [_layer_line(name, before.layers.get(name), after.layers.get(name), said.pop(name, ())) for name in names]
    lines += [_layer_line(name, None, None, texts) for name, texts in said.items()]
    return Report(
        model, _totals(before), _totals(after), tuple(_pass_line(row) for row in rows), tuple(lines), tuple(notes)
    )


def _totals(cost: Cost) -> Totals:
    return Totals(cost.parameters, cost.macs, cost.bytes, cost.nodes)


def _pass_line(row: PassRow) -> PassLine:
    return PassLine(
        row.name, row.contract, row.seconds, row.modified, row.edits,
        row.cost.parameters, row.cost.macs, row.cost.bytes, row.difference, row.metrics,
    )  # fmt: skip


def _notes_by_layer(notes: Iterable[Note]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for note in notes:
        texts = found.get(note.layer, ())
        if note.text not in texts:
            found[note.layer] = (*texts, note.text)
    return found


def _layer_line(name: str, before: LayerCost | None, after: LayerCost | None, notes: tuple[str, ...]) -> LayerLine:
    empty = LayerCost("")
    old, new = before or empty, after or empty
    if not notes:
        notes = ("unchanged",) if after is not None else ("part of another node's kernel, or not needed any more",)
    return LayerLine(
        name,
        old.kind or new.kind,
        (old.parameters, new.parameters),
        (old.macs, new.macs),
        (old.bytes, new.bytes),
        notes,
    )


def _layer_from(line: dict[str, Any]) -> LayerLine:
    pairs = {name: (int(line[name][0]), int(line[name][1])) for name in ("parameters", "macs", "bytes")}
    return LayerLine(line["layer"], line["kind"], pairs["parameters"], pairs["macs"], pairs["bytes"],
                     tuple(line["notes"]))  # fmt: skip


def _render(report: Report, layers: bool) -> str:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=io.StringIO(), width=120, color_system=None)
    totals = Table("", "before", "after", "ratio", title=report.model)
    for name in ("parameters", "macs", "bytes"):
        old, new = getattr(report.before, name), getattr(report.after, name)
        ratio = f"{old / new:.2f}x" if new else "-"
        totals.add_row("MACs" if name == "macs" else name, amount(old), amount(new), ratio)
    console.print(totals)
    passes = Table("pass", "contract", "edits", "parameters", "MACs", "bytes", "seconds", "difference", title="passes")
    for line in report.passes:
        checked = "" if line.difference is None else f"{line.difference:.1e}"
        passes.add_row(line.name, line.contract, str(line.edits), amount(line.parameters), amount(line.macs),
                       amount(line.bytes), f"{line.seconds:.3f}", checked)  # fmt: skip
    console.print(passes)
    if layers:
        table = Table("layer", "kind", "parameters", "MACs", "what happened", title="layers")
        for row in report.layers:
            table.add_row(row.layer, row.kind, change(row.parameters), change(row.macs), "; ".join(row.notes))
        console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    output = console.file
    return output.getvalue() if isinstance(output, io.StringIO) else ""


def change(pair: tuple[int, int]) -> str:
    """Return "64 -> 32", or one figure where nothing changed."""
    return amount(pair[0]) if pair[0] == pair[1] else f"{amount(pair[0])} -> {amount(pair[1])}"


def amount(number: float) -> str:
    """Return a number with three digits and k, M or G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}" if isinstance(number, float) else str(number)
