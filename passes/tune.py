"""Tune: measure how a lowered graph runs fastest on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcompress.emit.native import tuning
from fxcompress.emit.native.executor import Unplannable, positional
from fxcompress.emit.native.library import library, unavailable
from fxcompress.graph.metadata import Stage, graph_info
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult
from fxcompress.rewrite.match import layer_of


@dataclass(frozen=True)
class Tune(Pass):
    """Choose by measuring what would be chosen by rules: which kernels compute a layer, and how batches are taken.

        fxc.compile(model, "int8", x, tune=True)                      # x: as large a batch as will be used
        fxc.compile(model, [P.Fuse(), P.Quantize(), P.Tune()], x)     # the same

    1. Every layer is timed by itself: by the kernels of fxcompress, and by PyTorch's (oneDNN). Those that PyTorch's
       compute faster are left to them, if that makes the model faster.
    2. For a batch, the model is timed with images taken one by one, all together, or the first up to some layer.

    The numbers that the model computes stay the same; where PyTorch's kernels take over, up to the rounding of values
    half way between two integers. The report has the times of every layer, and what was chosen.

    The choices hold for inputs of the shapes of the example, on processors of this name and with as many threads;
    elsewhere rules decide, as they would have without this pass. They are saved with the module. For GPUs nothing is
    left to do: `Lower` measures there in any case.
    """

    name: ClassVar[str] = "tune"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.LOWERED})
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Measure, and note what was chosen."""
        kernels = library() if context.target == "cpu" else None
        if kernels is None:
            why = unavailable() if context.target == "cpu" else "layers for GPUs are measured when they are lowered"
            return PassResult(graph_module, False, notes=(Note("tune", f"nothing to choose: {why}"),))
        try:
            inputs = positional(graph_module, context.example_inputs.args, context.example_inputs.kwargs)
            found = tuning.tune(graph_module, kernels, inputs, context.progress)
        except Unplannable:
            why = "what the graph does depends on more than the shapes of its inputs, so that it runs node by node"
            return PassResult(graph_module, False, notes=(Note("tune", f"nothing to choose: {why}"),))
        graph_info(graph_module).kernels = found.choices
        return PassResult(graph_module, False, notes=(*_of_layers(found), *_of_model(found)))


def _of_layers(found: tuning.Tuning) -> list[Note]:
    notes = []
    for one in found.layers:
        ours, theirs = 1e3 * one.pair.first_ms, 1e3 * one.pair.second_ms
        by = "PyTorch's" if one.node.name in found.choices.calls else "ours"
        notes.append(Note(layer_of(one.node), f"kernels: {by} ({ours:.0f} us by ours, {theirs:.0f} us by PyTorch's)"))
    return notes


def _of_model(found: tuning.Tuning) -> list[Note]:
    return [
        Note("tune", f"{one.what}: {one.ratio:.2f} of the time, {'taken' if one.taken else 'not taken'}")
        for one in found.trials
    ]
