"""Running passes on a model in pieces: its graph, and each region inside the parts of it that stay Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import fx

from fxcompress.analysis.cost import cost, own_cost, together
from fxcompress.errors import FxCompressError, PassError
from fxcompress.graph import compare, edit
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import graph_info, info
from fxcompress.graph.regions import Region, refresh, regions, replace
from fxcompress.graph.shapes import propagate
from fxcompress.pipeline.base import Note, Pass, PassContext, Piece, Whole

if TYPE_CHECKING:
    from fxcompress.pipeline.manager import PassRow

#: Runs passes on one graph: (graph, inputs, context, passes, their titles) -> (graph, one row per pass).
Runner = Callable[
    [fx.GraphModule, ExampleInputs, PassContext, list[Pass], list[str]], tuple[fx.GraphModule, "list[PassRow]"]
]


def run_in_pieces(
    root: fx.GraphModule,
    inputs: ExampleInputs,
    context: PassContext,
    passes: list[Pass],
    titles: list[str],
    run_graph: Runner,
) -> tuple[fx.GraphModule, list[PassRow]]:
    """Run passes on every piece of a model, those that need the whole model on the whole.

    Exact passes are compared piece by piece. At the end the whole model is run once.

    Raises:
        PassError: the model does not run any more.
    """
    if any(tensor.is_meta for region in regions(root) for tensor in region.inputs.tensors()):
        refresh(root, inputs)  # a compiled module keeps the shapes only
    rows: list[PassRow] = []
    for first, last in _segments(passes):
        segment = passes[first:last]
        if segment[0].whole:
            root, done = run_graph(root, inputs, context, segment, titles[first:last])
            rows += [dataclasses.replace(row, cost=cost(root)) for row in done]
        else:
            root, done = _run_segment(root, inputs, context, segment, titles[first:last], run_graph)
            rows += done
    try:
        compare.run(root, inputs)
    except Exception as error:
        raise PassError(f"the model does not run after {', '.join(map(str, passes))}: {error}") from error
    return root, rows


def _segments(passes: list[Pass]) -> Iterator[tuple[int, int]]:
    """Cut a list of passes where one needs the whole model, or all pieces; each such pass is a segment of its own."""
    first = 0
    for index, item in enumerate(passes):
        if item.whole or item.joins:
            if index > first:
                yield first, index
            yield index, index + 1
            first = index + 1
    if first < len(passes):
        yield first, len(passes)


def _run_segment(
    root: fx.GraphModule,
    inputs: ExampleInputs,
    context: PassContext,
    segment: list[Pass],
    titles: list[str],
    run_graph: Runner,
) -> tuple[fx.GraphModule, list[PassRow]]:
    done: dict[str, list[PassRow]] = {}
    costs = {}
    pieces = [Region("", "", root, inputs), *regions(root)]
    decided = _decided(pieces, root, context, segment, titles)
    for piece in pieces:
        if _is_empty(piece.graph_module):
            _advance(piece.graph_module, segment)
            costs[piece.layer] = own_cost(piece.graph_module)
            continue
        where = f" in {piece.layer}" if piece.layer else ""
        after, done[piece.layer] = run_graph(
            piece.graph_module,
            piece.inputs,
            _context(context, piece, root),
            decided[piece.path],
            [f"{title}{where}" for title in titles],
        )
        if not piece.path:
            root = after
        elif after is not piece.graph_module:
            replace(root, piece.graph_module, after)
    return root, [_merged({layer: rows[index] for layer, rows in done.items()}, costs) for index in range(len(segment))]


def _decided(
    pieces: list[Region], root: fx.GraphModule, context: PassContext, segment: list[Pass], titles: list[str]
) -> dict[str, list[Pass]]:
    """The passes for each piece: those of the segment, unless they decide over all pieces together."""
    there = [piece for piece in pieces if not _is_empty(piece.graph_module)]
    if not segment[0].joins or not there:
        return {piece.path: segment for piece in pieces}
    for piece in there:
        propagate(piece.graph_module, piece.inputs)
    try:
        found = segment[0].decide([Piece(piece.graph_module, _context(context, piece, root)) for piece in there])
    except FxCompressError as error:
        raise type(error)(f"{titles[0]} {error}") from error
    return {piece.path: [item] for piece, item in zip(there, found, strict=True)}


def _is_empty(graph_module: fx.GraphModule) -> bool:
    """Whether a graph does nothing but call one module that stays Python."""
    return all(node.op in ("placeholder", "output") or info(node).opaque for node in graph_module.graph.nodes)


def _advance(graph_module: fx.GraphModule, segment: list[Pass]) -> None:
    """Bring the stage of a graph on which no pass has anything to do in line with that of the regions."""
    known = graph_info(graph_module)
    for item in segment:
        known.stage = item.produces or known.stage
        known.canonical = known.canonical or item.name == "canonicalize"


def _context(context: PassContext, piece: Region, root: fx.GraphModule) -> PassContext:
    reference = context.reference
    if reference is not None and piece.path:
        reference = edit.attribute(reference, piece.path)
    whole = Whole(root, context.example_inputs, piece.path)
    return dataclasses.replace(context, example_inputs=piece.inputs, reference=reference, whole=whole)


def _merged(rows: dict[str, PassRow], costs: dict[str, Any]) -> PassRow:
    """One row for what a pass did on all pieces."""
    gaps = [row.difference for row in rows.values() if row.difference is not None]
    metrics = {layer: row.metrics for layer, row in rows.items() if row.metrics}
    return dataclasses.replace(
        next(iter(rows.values())),
        seconds=sum(row.seconds for row in rows.values()),
        modified=any(row.modified for row in rows.values()),
        edits=sum(row.edits for row in rows.values()),
        cost=together({**costs, **{layer: row.cost for layer, row in rows.items()}}),
        notes=tuple(
            Note(f"{layer}.{note.layer}" if layer else note.layer, note.text)
            for layer, row in rows.items() for note in row.notes
        ),
        metrics=next(iter(metrics.values())) if len(metrics) == 1 else dict(metrics),
        difference=max(gaps) if gaps else None,
    )  # fmt: skip
