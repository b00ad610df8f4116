"""Whether a graph computes each image of a batch by itself, so that a plan for one image will do for all of them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_leaves

from fxcompress.graph import ops

#: Kinds that read sizes as sizes, not as numbers to compute with or as indices.
_READ_SIZES = frozenset(
    {"reshape", "flatten", "unflatten", "expand", "expand_as", "view_as", "broadcast_to", "zeros", "ones"}
)

#: Kinds that make the same numbers for every image of a batch.
_FILLED = frozenset({"zeros", "ones"})
_SPREAD = frozenset({*_FILLED, "expand", "expand_as", "broadcast_to"})

#: Kinds that may put something in front of the images, as long as it goes again before anything else is done.
_TURN = frozenset({"permute", "transpose", "getitem", "select", "unbind", "chunk", "split", "squeeze", "unsqueeze"})


def keeps_apart(graph: fx.Graph, whole: dict[fx.Node, Any], single: dict[fx.Node, Any], images: int) -> bool:
    """Return whether running a graph on all images is the same as running it on one after the other.

    That is so if the first dimension of every value counts the images, or windows of one image after those of another,
    and if nothing is computed with how many images there are.

    Args:
        graph: of a lowered module.
        whole: what each node makes of all images; tensors may be without memory.
        single: the same of the first image.
        images: how many images there are.
    """
    constants: set[fx.Node] = set()
    turned: set[fx.Node] = set()  # values with something in front of their images
    for node in graph.nodes:
        if node.op == "output" or not _holds_tensors(whole.get(node)):
            continue
        kind = ops.kind(node)
        (made, form), (part, form_of_one) = (tree_flatten(recorded.get(node)) for recorded in (whole, single))
        if form != form_of_one or (kind not in _READ_SIZES and _differ(node, whole, single)):
            return False
        if node.op == "get_attr" or kind in _FILLED or _is_constant(node, whole, constants):
            constants.add(node)
            if kind not in _SPREAD and any(map(operator.ne, map(_shape, made), map(_shape, part))):
                return False
            continue
        places = {_place(all_, one, images) for all_, one in zip(made, part, strict=True)}
        if None in places or (kind not in _TURN and (places != {0} or turned.intersection(node.all_input_nodes))):
            return False
        if places != {0}:
            turned.add(node)
    return True


def _is_constant(node: fx.Node, whole: dict[fx.Node, Any], constants: set[fx.Node]) -> bool:
    """Whether a node is computed of the model's own tensors, and of sizes."""
    return node.op != "placeholder" and all(
        source in constants or not _holds_tensors(whole.get(source)) for source in node.all_input_nodes
    )


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, torch.Tensor) else value


def _place(whole: Any, part: Any, images: int) -> int | None:
    """The dimension that is `images` times as large in a tensor as in another one; None if that is not all."""
    if not isinstance(whole, torch.Tensor) or not isinstance(part, torch.Tensor) or whole.ndim != part.ndim:
        return None
    others = [i for i, sizes in enumerate(zip(whole.shape, part.shape, strict=True)) if sizes[0] != sizes[1]]
    return others[0] if len(others) == 1 and whole.shape[others[0]] == images * part.shape[others[0]] else None


def _differ(node: fx.Node, whole: dict[fx.Node, Any], single: dict[fx.Node, Any]) -> bool:
    """Whether a node reads a number that is another one for all images than for one."""
    numbers = [source for source in node.all_input_nodes if not _holds_tensors(whole.get(source))]
    return any(tree_leaves(whole.get(source)) != tree_leaves(single.get(source)) for source in numbers)
