"""PruneChannels: MaskChannels, then RemoveChannels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcompress.analysis.budget import Budget
from fxcompress.errors import UnsupportedError
from fxcompress.passes.mask_channels import MaskChannels, check_channel_options
from fxcompress.passes.remove_channels import RemoveChannels
from fxcompress.pipeline.base import Contract, Pass, PassContext, PassResult


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Choose channels by importance, and remove them. The options are those of `MaskChannels`.

    Args:
        ratio: share of the channels to remove, 0 <= ratio < 1; of every layer, or of all layers together.
        budget: instead of a ratio, `fxc.Parameters(0.5)`, `fxc.MACs(0.5)` or text such as "macs:0.5"; met within 3 %.
        importance: "l1", "l2", "bn_scale" or "random".
        scope: "global" (all layers ranked together) or "layer" (the same share of every layer).
        round_to: every layer keeps a multiple of this many channels.
        heads: what goes from attention heads: "positions" (every head becomes narrower), "whole" (fewer heads) or
            "both" (a little of each).
        ignore: layers whose channels stay, as dotted paths or patterns ("features.0", "head.*").
        seed: for random importance.
    """

    ratio: float | None = None
    budget: Budget | str | None = None
    importance: str = "l2"
    scope: str = "global"
    round_to: int = 1
    heads: str = "positions"
    ignore: str | tuple[str, ...] = ()
    seed: int = 0

    name: ClassVar[str] = "prune-channels"
    contract: ClassVar[Contract] = Contract.APPROXIMATE

    def __post_init__(self) -> None:
        check_channel_options(self)

    def parts(self) -> tuple[Pass, ...]:
        """Mask, then remove."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(MaskChannels)}
        return (MaskChannels(**options), RemoveChannels())

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """A group is run part by part."""
        raise UnsupportedError("PruneChannels stands for two passes: run it with a PassManager, or run its parts()")
