"""Where the pieces of concatenated images can be made in place, so that nothing has to be copied.

Images lie with their channels side by side, so that a piece is a range of the channels of every pixel of the whole. A
concatenation of what another one has side by side as well (the blocks of DenseNet) is a range of that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from fxcompress.graph import ops


@dataclass(frozen=True)
class Slot:
    """Channels of a whole: `whole` is the node of the concatenation, `start` the first channel."""

    whole: fx.Node
    start: int


def find_slots(graph: fx.Graph, recorded: Mapping[fx.Node, Any]) -> dict[fx.Node, Slot]:
    """Return the place of each value that is concatenated, and of each concatenation.

    Args:
        graph: a lowered graph.
        recorded: what each node makes, with tensors in place of tensors.
    """
    found: dict[fx.Node, Slot] = {}
    for node in reversed(graph.nodes):
        pieces = joined(node, recorded)
        if not pieces:
            continue
        starts = [0, *accumulate(recorded[piece].shape[1] for piece in pieces)]
        first = found.get(pieces[0])
        if node not in found and first is not None:
            side_by_side = [Slot(first.whole, first.start + start) for start in starts[:-1]]
            if [found.get(piece) for piece in pieces] == side_by_side and not _leaves(node):
                found[node] = first
                continue
        own = found.setdefault(node, Slot(node, 0))
        for piece, start in zip(pieces, starts, strict=False):
            if not _leaves(piece):
                found.setdefault(piece, Slot(own.whole, own.start + start))
    return found


def joined(node: fx.Node, recorded: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """Return what a node concatenates along the channels of 8-bit images; nothing if it is no such node."""
    if ops.kind(node) != "cat" or not _is_image(recorded.get(node)):
        return []
    given = ops.arguments(node)
    pieces = list(given["tensors"])
    fits = all(isinstance(piece, fx.Node) and _is_image(recorded.get(piece)) for piece in pieces)
    return pieces if fits and given["dim"] in (1, -3) else []


def _is_image(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.dtype == torch.uint8 and value.numel() > 0


def _leaves(node: fx.Node) -> bool:
    """Whether a value is a result of the graph, which should have memory and a layout of its own."""
    return any(user.op == "output" for user in node.users)
