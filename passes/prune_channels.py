"""PruneChannels: MaskChannels, then RemoveChannels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcompress.errors import UnsupportedError
from fxcompress.passes.mask_channels import ChannelOptions, MaskChannels
from fxcompress.passes.remove_channels import RemoveChannels
from fxcompress.pipeline.base import Pass, PassContext, PassResult


@dataclass(frozen=True)
class PruneChannels(ChannelOptions):
    """Choose channels by importance, and remove them. The options are those of `MaskChannels`.

    Args:
        ratio: share of the channels to remove, 0 <= ratio < 1; of every layer, or of all layers together.
        budget: instead of a ratio, `fxc.Parameters(0.5)`, `fxc.MACs(0.5)`, `fxc.Bytes(0.5)` or text such as "macs:0.5",
            met within 3 %; or `fxc.Latency(0.5)`, `fxc.Latency(ms=5.0, batch=1)`, "latency:5ms": candidates are pruned
            and timed on this machine, within 10 %, and none is taken that is slower than the model as it is. Layers
            that are slower at their new size get channels back. A budget is that of the whole model, also where parts
            of it stay Python.
        importance: "l1", "l2", "lamp", "fpgm", "bn_scale", "random"; "taylor", "hessian" or "activation", which need
            data; or a function(weight, dimension) -> scores of shape (weight.shape[dimension],), at least 0. What they
            are, and the papers: `fxcompress.analysis.importance`.
        scope: "global" (all layers of the whole model ranked together) or "layer" (the same share of every layer).
        round_to: every layer keeps a multiple of this many channels.
        heads: what goes from attention heads: "positions" (every head becomes narrower), "whole" (fewer heads) or
            "both" (a little of each).
        ignore: layers whose channels stay: dotted paths or patterns ("features.0", "head.*"), modules of the model
            (`model.head`) or types (`nn.Linear`).
        seed: for random importance.
        ratios: shares for single layers, {"features.0": 0.3, "head.*": 0.0}, instead of `ratio`; with the global scope
            the most that a layer loses. Of several patterns that match, the last counts. Without a ratio or budget
            all other layers stay as they are.
        aggregate: how the scores of all indices of a group become one: "mean", "sum" or "max".
        loss: for "taylor" and "hessian": "cross_entropy", "mse", ..., see `Train`; or give `loss_function`.
        batches: how many batches of the data to take at most; None takes all.
        data: batches of (input, target) for "taylor" and "hessian", batches of inputs for "activation"; or
            `fxc.compile(train_data=...)` and `fxc.compile(calibration=...)`.
        loss_function: loss(output, target) -> scalar tensor, the mean over the samples.
    """

    name: ClassVar[str] = "prune-channels"

    def parts(self) -> tuple[Pass, ...]:
        """Mask, then remove."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(ChannelOptions)}
        return (MaskChannels(**options), RemoveChannels())

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """A group is run part by part."""
        raise UnsupportedError("PruneChannels stands for two passes: run it with a PassManager, or run its parts()")
