"""`compile`: the whole compiler, from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from fxcompress import report
from fxcompress.analysis.cost import cost
from fxcompress.emit.compact_module import CompactModule, check_executor
from fxcompress.errors import InputError, OptionError
from fxcompress.graph import compare, opaque, regions
from fxcompress.graph.capture import trace
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import graph_info
from fxcompress.pipeline.base import PassContext
from fxcompress.pipeline.manager import PassManager
from fxcompress.pipeline.progress import progress_bar

TARGETS = ("cpu", "cuda")


def compile(
    model: nn.Module,
    passes: object = "int8",
    example_inputs: object = None,
    *,
    target: str = "cpu",
    verify: bool = True,
    executor: str = "auto",
    calibration: Any = None,
    train_data: Any = None,
    validation: Any = None,
    dump: Callable[[str, fx.GraphModule], None] | None = None,
    progress: bool | None = None,
) -> CompactModule:
    """Make a trained model small and fast.

    Args:
        model: any `nn.Module`; never modified. It is captured as it runs in evaluation mode.
        passes: a list of passes, pipeline text (`"prune-channels{ratio=0.5}, fuse, quantize"`), or a preset's name.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        target: what the result shall run on, "cpu" or "cuda".
        verify: whether to compare outputs across every pass that promises to be exact.
        executor: how a lowered graph runs: "auto", by our own kernels where there are some; "graph", node by node.
        calibration: batches of inputs for passes that quantise (where the pass has none of its own).
        train_data: batches of (input, target) for passes that train (where the pass has none of its own).
        validation: batches of (input, target) on which passes that train look after every epoch how good the model is.
        dump: called as dump(pass name, graph module) after every pass.
        progress: whether to draw a progress bar on standard error; None: if it is a terminal.

    Returns:
        The compiled model in evaluation mode, with `.report`.

    Raises:
        FxCompressError: one of its subclasses says what is wrong, where, and what to do, see `fxcompress.errors`.
    """
    if example_inputs is None:
        raise InputError("compile needs example_inputs, for example example_inputs=(torch.randn(1, 3, 224, 224),)")
    if target not in TARGETS:
        raise OptionError(f"target must be one of {', '.join(map(repr, TARGETS))}, not {target!r}")
    check_executor(executor)
    inputs = ExampleInputs.of(example_inputs)
    manager = PassManager(passes, verify=verify, dump=dump)
    captured = trace(model, inputs, training=False)
    if verify and not isinstance(model, fx.GraphModule):
        compare.require_same_outputs(model, captured, inputs)
    with progress_bar(progress) as manager.progress:
        data = {"calibration": calibration, "train_data": train_data, "validation": validation}
        context = PassContext(inputs, data, target, captured, model=model)
        result = manager.run(captured, inputs, context)
    notes = graph_info(result.graph_module).notes
    after, untraced = cost(result.graph_module), _untraced(result.graph_module)
    summary = report.build(type(model).__name__, result.start, result.rows, after, notes, untraced)
    regions.forget_data(result.graph_module)
    for region in regions.regions(result.graph_module):
        regions.replace(result.graph_module, region.graph_module, CompactModule.of(region.graph_module, None, executor))
    return CompactModule.of(result.graph_module.eval(), summary, executor)


def _untraced(graph_module: fx.GraphModule) -> dict[str, str]:
    """Layers and nodes of a model and its regions that could not be traced, with the reasons."""
    found = opaque.reasons(graph_module)
    for region in regions.regions(graph_module):
        found.update({f"{region.layer}.{name}": why for name, why in opaque.reasons(region.graph_module).items()})
    return found
