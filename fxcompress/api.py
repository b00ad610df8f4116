"""`compile`: the whole compiler, from top to bottom."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from fxcompress import report
from fxcompress.analysis.cost import cost
from fxcompress.emit.compact_module import CompactModule, check_executor
from fxcompress.emit.cuda import device
from fxcompress.errors import InputError, OptionError
from fxcompress.graph import compare, opaque, regions
from fxcompress.graph.capture import trace
from fxcompress.graph.devices import in_full_float32, moved
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import graph_info
from fxcompress.pipeline.base import PassContext
from fxcompress.pipeline.manager import PassManager
from fxcompress.pipeline.presets import passes_for, read_passes
from fxcompress.pipeline.progress import progress_bar

TARGETS = ("cpu", "cuda")
DTYPES = ("fp16", "bf16", "int8", "fp8")


def compile(
    model: nn.Module,
    passes: object = None,
    example_inputs: object = None,
    *,
    target: str = "cpu",
    dtype: str | None = None,
    verify: bool = True,
    executor: str = "auto",
    tune: bool = False,
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
            None: "int8" for CPUs; for GPUs what `dtype` needs.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        target: what the result shall run on, "cpu" or "cuda". For "cuda" model and inputs may be on the CPU; the result
            is on the current GPU, with every layer computed in the way that measured fastest for the example inputs.
        dtype: for GPUs: "fp16", "bf16", "int8" or "fp8". Layers that are slower in 8 bits stay in fp16. Passes that do
            not say how to compute are followed by those that do: LowerFloat, or Quantize.
        verify: whether to compare outputs across every pass that promises to be exact.
        executor: how a lowered graph runs: "auto", by our own kernels where there are some; "graph", node by node.
        tune: whether to measure at the end how the lowered graph runs fastest on this machine, see `passes.Tune`.
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
    _check_dtype(target, dtype)
    inputs = ExampleInputs.of(example_inputs)
    chosen = [*passes_for(passes, target, dtype), *read_passes("tune" if tune else [])]
    manager = PassManager(chosen, verify=verify, dump=dump)
    captured = trace(model, inputs, training=False)
    if verify and not isinstance(model, fx.GraphModule):
        compare.require_same_outputs(model, captured, inputs)
    if target == "cuda":
        captured, inputs = moved(captured, inputs, device.home())
    precisely = in_full_float32() if target == "cuda" else contextlib.nullcontext()
    with progress_bar(progress) as manager.progress, precisely:
        data = {"calibration": calibration, "train_data": train_data, "validation": validation}
        context = PassContext(inputs, data, target, captured, model=model, dtype=dtype)
        result = manager.run(captured, inputs, context)
    notes = graph_info(result.graph_module).notes
    after, untraced = cost(result.graph_module), _untraced(result.graph_module)
    summary = report.build(type(model).__name__, result.start, result.rows, after, notes, untraced)
    regions.forget_data(result.graph_module)
    for region in regions.regions(result.graph_module):
        regions.replace(result.graph_module, region.graph_module, CompactModule.of(region.graph_module, None, executor))
    return CompactModule.of(result.graph_module.eval(), summary, executor)


def _check_dtype(target: str, dtype: str | None) -> None:
    """Raise an error for a dtype that is none, or that the target has not."""
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, not {dtype!r}")
    if target == "cuda":
        device.require()
    elif dtype not in (None, "int8"):
        raise OptionError(f"dtype={dtype!r} is for target='cuda'; on CPUs there is int8, or float32 without a Quantize")


def _untraced(graph_module: fx.GraphModule) -> dict[str, str]:
    """Layers and nodes of a model and its regions that could not be traced, with the reasons."""
    found = opaque.reasons(graph_module)
    for region in regions.regions(graph_module):
        found.update({f"{region.layer}.{name}": why for name, why in opaque.reasons(region.graph_module).items()})
    return found
