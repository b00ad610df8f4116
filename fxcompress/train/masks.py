"""Masks during training: a masked weight stays zero, whatever momentum and weight decay do."""

from __future__ import annotations

import torch
from torch import fx

from fxcompress.graph import edit
from fxcompress.graph.metadata import graph_info
from fxcompress.graph.regions import regions
from fxcompress.train.sharding import local, split_like


class HeldMasks:
    """The masked weights of a graph and its regions, as a training loop needs them.

    Args:
        module: whose masks are held.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.masked: list[tuple[torch.Tensor, torch.Tensor]] = []  # weights, and True where they are masked
        for graph in (module, *(region.graph_module for region in regions(module))):
            for path, mask in graph_info(graph).masks.items():
                weight = edit.attribute(graph, path)
                self.masked.append((weight, local(split_like(~mask.to(weight.device), weight))))

    def hold_gradients(self) -> None:
        """Set the gradients of masked weights to zero, so that they count neither in norms nor in momentum."""
        for weight, masked in self.masked:
            if weight.grad is not None:
                local(weight.grad).masked_fill_(masked, 0)

    def hold_weights(self) -> None:
        """Set masked weights to zero."""
        with torch.no_grad():
            for weight, masked in self.masked:
                local(weight).masked_fill_(masked, 0)


def hold_masks(module: fx.GraphModule) -> None:
    """Set masked weights back to zero: for training loops of one's own, after every step of the optimiser."""
    HeldMasks(module).hold_weights()
