"""Helpers for people who write passes: compare modules, compare graph texts, and hold a pass to its promises."""

from __future__ import annotations

import copy
import textwrap

from torch import fx, nn

from fxcompress.graph import compare
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.printer import print_graph
from fxcompress.pipeline.base import Pass, parameters_equal
from fxcompress.pipeline.manager import PassManager, PipelineResult


def assert_equivalent(
    before: nn.Module, after: nn.Module, example_inputs: object, relative: float | None = None
) -> float:
    """Check that two modules compute the same in evaluation mode, and return the largest relative difference.

    Args:
        before, after: the modules; `before` is the reference.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        relative: largest difference allowed, relative to the largest output; None: what rounding explains for the
            dtype of the outputs and the size of the graph (see `fxcompress.graph.compare.tolerance`).

    Raises:
        AssertionError: they differ by more, or in structure, shape, dtype or NaN.
    """
    inputs = ExampleInputs.of(example_inputs)
    expected = compare.run(before, inputs)
    gap = compare.difference(expected, compare.run(after, inputs))
    operations = len(after.graph.nodes) if isinstance(after, fx.GraphModule) else len(list(after.modules()))
    limit = compare.tolerance(compare.coarsest_dtype(expected), operations) if relative is None else relative
    if gap.relative > limit:
        raise AssertionError(f"outputs differ: {gap.where} (relative {gap.relative:.3g}, allowed {limit:.3g})")
    return gap.relative


def assert_graph(graph_module: fx.GraphModule, expected: str, shapes: bool = True) -> None:
    """Check the text of a graph (see `fxcompress.graph.printer`); indentation of `expected` does not count.

    Raises:
        AssertionError: the texts differ; shows both.
    """
    found, wanted = print_graph(graph_module, shapes), textwrap.dedent(expected).strip()
    if found != wanted:
        raise AssertionError(f"the graph is not as expected.\n--- expected\n{wanted}\n--- found\n{found}")


def check_pass(item: Pass, graph_module: fx.GraphModule, example_inputs: object) -> PipelineResult:
    """Run a pass twice and hold it to what every pass promises; return the first result.

    - The graph given to the manager is not modified.
    - `modified=False` means a graph that prints byte-identically, with equal parameters and buffers.
    - A second run reports `modified=False`.
    - An exact pass keeps the outputs (checked by the manager).

    Raises:
        AssertionError: a promise is broken.
        FxCompressError: the pass failed.
    """
    before = _Snapshot(graph_module)
    first = PassManager([item]).run(graph_module, example_inputs)
    if not before.equals(graph_module):
        raise AssertionError(f"{item} changed the graph module that the caller gave")
    start = first.graph_module if len(first.rows) == 1 else None
    if start is not None and not first.rows[0].modified and not before.equals(first.graph_module):
        raise AssertionError(f"{item} reports modified=False, but the graph or its numbers have changed")
    after = _Snapshot(first.graph_module)
    second = PassManager([item]).run(first.graph_module, example_inputs)
    if any(row.modified for row in second.rows) or not after.equals(second.graph_module):
        raise AssertionError(f"a second run of {item} changes the graph again")
    return first


class _Snapshot:
    """Text and numbers of a graph module at one moment."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.text = print_graph(graph_module)
        self.state = {name: tensor.clone() for name, tensor in copy.copy(graph_module.state_dict()).items()}

    def equals(self, graph_module: fx.GraphModule) -> bool:
        return self.text == print_graph(graph_module) and parameters_equal(self.state, graph_module.state_dict())
