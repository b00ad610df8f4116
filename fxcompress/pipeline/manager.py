"""PassManager: checks a list of passes, runs it, and does between two passes what is not the passes' business."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxcompress import processes
from fxcompress.analysis.cost import Cost, cost, own_cost
from fxcompress.errors import FxCompressError, MissingExtraError, OptionError, PassError
from fxcompress.graph import compare, opaque, verify
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import Stage, graph_info
from fxcompress.graph.regions import regions
from fxcompress.graph.shapes import propagate
from fxcompress.graph.snapshot import Snapshot
from fxcompress.pipeline import registry
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult
from fxcompress.pipeline.order import check_order, flatten
from fxcompress.pipeline.pieces import run_in_pieces
from fxcompress.pipeline.presets import read_passes
from fxcompress.train.checkpoint import fingerprint


@dataclass(frozen=True)
class PassRow:
    """One row of the report: what one pass did.

    name: the pass as text. seconds: its own time, without checks. cost: of the graph behind it.
    difference: largest relative difference of the outputs (only for `exact` passes that were checked).
    """

    name: str
    contract: str
    seconds: float
    modified: bool
    edits: int
    cost: Cost
    notes: tuple[Note, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    difference: float | None = None


@dataclass(frozen=True)
class PipelineResult:
    """What `PassManager.run` returns: the final graph, one row per pass, and the cost of the canonical float graph."""

    graph_module: fx.GraphModule
    rows: tuple[PassRow, ...]
    start: Cost


class PassManager:
    """Runs passes over a graph.

    Before the first pass the whole order is checked against the stages. Between two passes: fx lint, the rules of the
    stage, shapes, costs, timing, and for `exact` passes a comparison of the outputs before and after.

    Args:
        passes: passes, pipeline text, or a list of both.
        verify: whether to compare outputs across `exact` passes.
        dump: called as dump(pass name, graph module) after every pass.
        progress: called as progress(description, done, total).
    """

    def __init__(
        self,
        passes: object,
        *,
        verify: bool = True,
        dump: Callable[[str, fx.GraphModule], None] | None = None,
        progress: Callable[[str, int, int | None], None] | None = None,
    ) -> None:
        self.written = read_passes(passes)
        self.passes = [part for item in self.written for part in flatten(item)]
        self.verify = verify
        self.dump = dump
        self.progress = progress

    def run(
        self, graph_module: fx.GraphModule, example_inputs: object, context: PassContext | None = None
    ) -> PipelineResult:
        """Run the passes on a copy of a traced graph.

        Raises:
            PassOrderError: before anything runs, if a pass meets a stage that it does not take.
            PassError: a pass failed. Errors of fxcompress keep their class and gain the pass and its predecessors.
            VerificationError: a pass left a graph that breaks a rule, or an `exact` pass changed the outputs.
        """
        if not isinstance(graph_module, fx.GraphModule):
            raise OptionError(
                f"PassManager.run takes a torch.fx.GraphModule, not {type(graph_module).__name__}; "
                f"make one with fxcompress.trace(model, example_inputs)"
            )
        inputs = ExampleInputs.of(example_inputs)
        passes = self._with_canonicalize(graph_module)
        if passes is not self.passes:
            check_order(passes[:1], graph_info(graph_module).stage)
        check_order(self.written, graph_info(graph_module).stage)
        context = context or PassContext(inputs)
        if self.progress is not None:
            context.progress = self.progress
        if context.reference is None and graph_info(graph_module).stage is Stage.FLOAT:
            context.reference = graph_module  # the passes work on a copy
        current = copy.deepcopy(graph_module)
        _require_same_model(current, passes)
        titles = [_title(index, passes) for index in range(len(passes))]
        if regions(current):
            result, rows = run_in_pieces(current, inputs, context, passes, titles, self.run_graph)
        else:
            result, rows = self.run_graph(current, inputs, context, passes, titles)
        canonicalised = rows and passes[0].name == "canonicalize"
        return PipelineResult(result, tuple(rows), rows[0].cost if canonicalised else cost(graph_module))

    def run_graph(
        self,
        current: fx.GraphModule,
        inputs: ExampleInputs,
        context: PassContext,
        passes: list[Pass],
        titles: list[str],
    ) -> tuple[fx.GraphModule, list[PassRow]]:
        """Run passes on one graph, in place where they work in place, and return the graph and one row per pass."""
        propagate(current, inputs)
        spent = own_cost(current)
        rows: list[PassRow] = []
        before: Snapshot | None = None  # of the graph as it stands, and its outputs, where they are known
        outputs: Any = None
        for index, item in enumerate(passes):
            context.progress(str(item), index, len(passes))
            title = titles[index]
            checked = self.verify and item.contract is Contract.EXACT
            if checked and outputs is None:
                outputs = compare.run(current, inputs)
            before = before or Snapshot(current)
            started = time.perf_counter()
            result = _run_pass(item, current, context, title)
            seconds = time.perf_counter() - started
            current = result.graph_module
            changed = _is_changed(before, result, title)
            if item.produces is not None:
                graph_info(current).stage = item.produces
            verify.verify(current, title)
            gap: float | None = None
            if changed:
                _refresh(current, inputs, title)
                spent = own_cost(current)
                expected, outputs = outputs, None
                if checked:
                    outputs = compare.require_equal(before, current, inputs, expected, title)
                    gap = compare.difference(expected, outputs).relative
                before = None
            rows.append(
                PassRow(
                    str(item),
                    str(item.contract),
                    seconds,
                    result.modified,
                    result.edits,
                    spent,
                    result.notes,
                    result.metrics,
                    gap,
                )
            )
            if self.dump is not None:
                self.dump(item.name, current)
        context.progress("done", len(passes), len(passes))
        return current, rows

    def _with_canonicalize(self, graph_module: fx.GraphModule) -> list[Pass]:
        if graph_info(graph_module).canonical or any(item.name == "canonicalize" for item in self.passes):
            return self.passes
        return [registry.find("canonicalize")(), *self.passes]


def _require_same_model(graph_module: fx.GraphModule, passes: list[Pass]) -> None:
    """Where several processes compile, see that they compile the same."""
    if processes.count() > 1:
        run = fingerprint(graph_module, ", ".join(map(str, passes)), None)
        for name, what in (("pass", "pipeline"), ("graph", "graph of the model"), ("tensors", "weights")):
            processes.require_same(hashlib.sha256(repr(run[name]).encode()).hexdigest(), what)


def _title(index: int, passes: list[Pass]) -> str:
    earlier = ", ".join(str(item) for item in passes[:index])
    return f"pass {index + 1} ({passes[index]})" + (f", after {earlier}," if earlier else "")


def _run_pass(item: Pass, graph_module: fx.GraphModule, context: PassContext, title: str) -> PassResult:
    try:
        result = item.run(graph_module, context)
    except MissingExtraError:
        raise
    except FxCompressError as error:
        raise type(error)(f"{title} {error}") from error
    except Exception as error:
        raise PassError(f"{title} failed with {type(error).__name__}: {error}") from error
    if not isinstance(result, PassResult) or not isinstance(result.graph_module, fx.GraphModule):
        raise PassError(f"{title} must return a PassResult that holds a GraphModule, not {type(result).__name__}")
    return result


def _is_changed(before: Snapshot, result: PassResult, title: str) -> bool:
    """Whether a pass changed the graph, and whether it said so.

    Raises:
        PassError: it changed the graph and reported `modified=False`.
    """
    if result.graph_module is not before.graph_module:
        return True
    difference = before.changed_structure()
    if difference is not None and not result.modified:
        raise PassError(f"{title} reported modified=False, but changed {difference}")
    return result.modified or before.changed_state() is not None


def _refresh(graph_module: fx.GraphModule, inputs: ExampleInputs, title: str) -> None:
    """Bring code and shapes of a changed graph up to date."""
    graph_module.recompile()
    try:
        opaque.propagate(graph_module, inputs)
    except FxCompressError as error:
        raise PassError(f"{title} left a graph that does not run: {error}") from error
