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
    """Choose channels by importance, and remove them: `MaskChannels`, then `RemoveChannels`."""

    name: ClassVar[str] = "prune-channels"

    def parts(self) -> tuple[Pass, ...]:
        """Mask, then remove."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(ChannelOptions)}
        return (MaskChannels(**options), RemoveChannels())

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """A group is run part by part."""
        raise UnsupportedError("PruneChannels stands for two passes: run it with a PassManager, or run its parts()")
