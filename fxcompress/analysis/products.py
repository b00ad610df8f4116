"""Channels through products of tensors (matrix products, attention) and through recurrent layers."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fxcompress.analysis.channels import Axes, Axis, Floats, Walk, layer, numbers
from fxcompress.analysis.transfer import fixed, freeze_node, note_sizes, only_zero, read, rule_for, shape_of, transfer
from fxcompress.graph import ops
from fxcompress.graph.metadata import info

__all__ = ["fixed", "note_sizes", "rule_for"]


@transfer("matmul", "bmm")
def _matmul(walk: Walk, node: fx.Node) -> Any:
    left, right = node.all_input_nodes[0], node.args[1]
    if not isinstance(right, fx.Node) or min(len(shape_of(left)), len(shape_of(right))) < 2:
        return freeze_node(walk, node)
    rank = max(len(shape_of(left)), len(shape_of(right)))
    batch = list(string.ascii_uppercase[: rank - 2])
    first = [*batch[rank - len(shape_of(left)) :], "i", "k"]
    second = [*batch[rank - len(shape_of(right)) :], "k", "j"]
    return _contract(walk, node, [(left, first), (right, second)], [*batch, "i", "j"])


@transfer("einsum")
def _einsum(walk: Walk, node: fx.Node) -> Any:
    arguments = ops.arguments(node)
    operands = arguments["operands"]
    tensors = list(operands) if isinstance(operands, (tuple, list)) else list(node.args[1:])
    equation = str(arguments["equation"]).replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    labels = [list(part) for part in inputs.split(",")]
    repeated = any(len(set(part)) != len(part) for part in labels)
    if not arrow or "." in equation or repeated or not all(isinstance(tensor, fx.Node) for tensor in tensors):
        return freeze_node(walk, node)
    return _contract(walk, node, list(zip(tensors, labels, strict=True)), list(output))


@transfer("linear_function")
def _linear_function(walk: Walk, node: fx.Node) -> Any:
    """A linear layer whose weight or bias is computed: a product, and a bias that is indexed by its result."""
    arguments = ops.arguments(node)
    source, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node) or len(shape_of(weight)) != 2:
        return freeze_node(walk, node)
    batch = list(string.ascii_uppercase[: len(shape_of(source)) - 1])
    made = _contract(walk, node, [(source, [*batch, "k"]), (weight, ["o", "k"])], [*batch, "o"])
    if not isinstance(bias, fx.Node):
        return made
    axis = walk.tie(made[-1], walk.of(bias)[0], f"its bias is of fixed size in {node.name}")
    if axis is None:
        return (*made[:-1], None)
    zero = (made[-1].constant == 0) & (walk.of(bias)[0].constant == 0)  # type: ignore[union-attr]
    return (*made[:-1], axis.with_constant(np.where(zero, 0.0, np.nan)))


@transfer("conv_function")
def _conv_function(walk: Walk, node: fx.Node) -> Any:
    """A convolution whose weight is computed (standardised, say): a product over the channels of a group."""
    arguments = ops.arguments(node)
    source, weight, bias, groups = (arguments[name] for name in ("input", "weight", "bias", "groups"))
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node) or not isinstance(groups, int):
        return freeze_node(walk, node)
    kernel, given = walk.of(weight), walk.of(source)
    channel = len(given) - len(kernel) + 1
    walk.freeze_all((kernel[2:], given[channel + 1 :]), f"convolved over in {node.name}")
    axis = _convolved(walk, node, given[channel], kernel, shape_of(weight), groups)
    made = shape_of(weight)[0]
    if bias is not None:
        held = walk.of(bias)[0] if isinstance(bias, fx.Node) else None
        joined = walk.tie(axis, held, f"its bias is of fixed size in {node.name}")
        zero = (
            np.zeros(made, dtype=bool) if held is None or axis is None else (axis.constant == 0) & (held.constant == 0)
        )
        axis = joined and joined.with_constant(np.where(zero, 0.0, np.nan))
    for parameter in _tensors_behind(walk, weight):
        walk.producers.add((id(parameter), 0))
    return (*given[:channel], axis, *[None] * (len(kernel) - 2))


def _convolved(
    walk: Walk, node: fx.Node, given: Axis | None, kernel: Axes, shape: tuple[int, ...], groups: int
) -> Axis | None:
    """The output channels: those of the weight, whose input channels are tied to the input's."""
    why = f"convolved in {node.name} with weights of fixed size"
    out = kernel[0]
    if groups == 1:
        inner = walk.tie(given, kernel[1], why)
        if inner is not None and given is not None:
            read(walk, node, inner, given.constant == 0, f"a channel that is not zero is read by {node.name}")
        return out and out.with_constant(only_zero(out.constant))
    if shape[1] == 1 and shape[0] == groups:
        tied = walk.tie(out, given, why)
        zero = np.any([axis.constant == 0 for axis in (out, given) if axis is not None], axis=0)
        return tied and tied.with_constant(np.where(zero, 0.0, np.nan))
    inner = walk.tie(_by_position(walk, given, groups), kernel[1], why)
    if given is not None and inner is not None:
        read(walk, node, given, given.constant == 0, f"a channel that is not zero is read by {node.name}")
    _by_position(walk, out, groups)
    return out and out.with_constant(only_zero(out.constant))


def _by_position(walk: Walk, axis: Axis | None, groups: int) -> Axis | None:
    """Tie equal positions of all groups, which have to stay of one size; return those of the first."""
    if axis is None:
        return None
    rows = axis.atoms.reshape(len(axis.atoms), groups, -1)
    walk.link(np.broadcast_to(rows[:, :1], rows.shape), rows)
    return axis.take(slice(0, rows.shape[2]))


def _tensors_behind(walk: Walk, node: fx.Node) -> list[torch.Tensor]:
    """The parameters of a weight's own shape that it is computed from."""
    found: list[torch.Tensor] = []
    front, seen = [node], {node}
    while front:
        one = front.pop()
        if one.op == "get_attr" and shape_of(one) == shape_of(node):
            held: Any = walk.graph_module
            for name in str(one.target).split("."):
                held = getattr(held, name)
            found += [held] if isinstance(held, torch.nn.Parameter) else []
        new = [source for source in one.all_input_nodes if source not in seen]
        seen.update(new)
        front += new
    return found


def _contract(walk: Walk, node: fx.Node, operands: Sequence[tuple[Any, list[str]]], output: Sequence[str]) -> Axes:
    """A sum of products: dimensions of one label are tied; those that the result lacks are summed over."""
    sizes: dict[str, int] = {}
    for tensor, labels in operands:
        for label, size in zip(labels, shape_of(tensor), strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    found = {label: _meet(walk, node, operands, label, size) for label, size in sizes.items()}
    for label, axis in found.items():
        if axis is not None and label not in output:
            why = f"a channel that is not zero is summed over in {node.name}"
            read(walk, node, axis, axis.constant == 0, why)
    _make_weights(walk, operands, output)
    walk.products.append((node, math.prod(sizes.values()), tuple(found.values())))
    return tuple(found[label] for label in output)


def _meet(walk: Walk, node: fx.Node, operands: Sequence[tuple[Any, list[str]]], label: str, size: int) -> Axis | None:
    """The axis of one label: equal indices of all operands that have it live and die together."""
    axis: Axis | None = None
    constants: list[Floats] = []
    met = False
    for tensor, labels in operands:
        if label not in labels or shape_of(tensor)[labels.index(label)] != size:
            continue
        other = walk.of(tensor)[labels.index(label)]
        axis = walk.tie(axis, other, f"multiplied in {node.name} with a dimension of fixed size") if met else other
        met = True
        if other is not None:
            constants.append(other.constant)
    zero = np.any([constant == 0 for constant in constants], axis=0) if constants else np.zeros(size, dtype=bool)
    return axis and axis.with_constant(np.where(zero, 0.0, np.nan))


def _make_weights(walk: Walk, operands: Sequence[tuple[Any, list[str]]], output: Sequence[str]) -> None:
    """A parameter that is multiplied makes the channels of the result that only it has."""
    for position, (tensor, labels) in enumerate(operands):
        if not isinstance(tensor, fx.Node) or tensor.op != "get_attr" or len(labels) < 2:
            continue
        elsewhere = {label for other, (_, found) in enumerate(operands) if other != position for label in found}
        weight: Any = walk.graph_module
        for name in str(tensor.target).split("."):
            weight = getattr(weight, name)
        for dimension, label in enumerate(labels):
            if label in output and label not in elsewhere:
                walk.producers.add((id(weight), dimension))


@transfer("attention")
def _attention(walk: Walk, node: fx.Node) -> Any:
    """Heads are tied among query, key and value; positions of a head among query and key, and within value."""
    arguments = ops.arguments(node)
    query, key, value, mask = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
    rank = len(shape_of(query))
    if rank < 3 or not all(isinstance(one, fx.Node) and len(shape_of(one)) == rank for one in (query, key, value)):
        return freeze_node(walk, node)
    given = [list(walk.of(one)) for one in (query, key, value)]
    _repeat_heads(given, [shape_of(one) for one in (query, key, value)], rank)
    why = f"attention ({node.name}) ties it to a dimension of fixed size"
    batch: list[Axis | None] = []
    for dimension in range(rank - 2):
        axis = walk.tie(walk.tie(given[0][dimension], given[1][dimension], why), given[2][dimension], why)
        zero = given[2][dimension]
        batch.append(
            axis and axis.with_constant(np.full(len(axis), np.nan) if zero is None else only_zero(zero.constant))
        )
    walk.freeze_all((given[1][-2], given[2][-2]), f"attended over in {node.name}")
    if isinstance(mask, fx.Node):
        _tie_mask(walk, node, mask, batch, shape_of(node))
    inner = walk.tie(given[0][-1], given[1][-1], why)
    if inner is not None:
        zero_products = (given[0][-1].constant == 0) | (given[1][-1].constant == 0)  # type: ignore[union-attr]
        read(walk, node, inner, zero_products, f"a channel that is not zero is summed over in {node.name}")
    outer = given[2][-1]
    pairs = math.prod(shape_of(query)[:-1]) * shape_of(key)[-2]
    heads = batch[-1] if batch else None
    walk.products.append((node, pairs * shape_of(query)[-1], (heads, inner)))
    walk.products.append((node, pairs * shape_of(value)[-1], (heads, outer)))
    rows = given[0][-2]
    return (*batch, rows and rows.varying(), outer and outer.with_constant(only_zero(outer.constant)))


def _repeat_heads(given: list[list[Axis | None]], shapes: Sequence[tuple[int, ...]], rank: int) -> None:
    """Grouped-query attention: every head of key and value serves several heads of the query, side by side."""
    heads = rank - 3
    if heads < 0:
        return
    for position in (1, 2):
        axis, times = given[position][heads], shapes[0][heads] // max(shapes[position][heads], 1)
        if axis is not None and times > 1:
            given[position][heads] = axis.take(np.repeat(np.arange(len(axis)), times))


def _tie_mask(walk: Walk, node: fx.Node, mask: fx.Node, batch: list[Axis | None], shape: tuple[int, ...]) -> None:
    """A mask, or a table of biases, of one entry per head follows the heads; all else about it is fixed."""
    axes, sizes = walk.of(mask), shape_of(mask)
    walk.freeze_all(axes[-2:], f"a mask of {node.name}")
    for back in range(3, len(sizes) + 1):
        if sizes[-back] != 1:
            walk.tie(batch[len(batch) + 2 - back], axes[-back], f"masked head by head with a fixed mask in {node.name}")


# -- recurrent layers -----------------------------------------------------------------------------------------------


@transfer("lstm", "gru", "rnn")
def _recurrent(walk: Walk, node: fx.Node) -> Any:
    """One choice of hidden units for all layers and directions, whose states are stacked.

    A unit whose weights and biases are all zero stays at zero from a zero state: all gates are 1/2, the candidate is 0.
    """
    module: Any = layer(node)
    source = node.all_input_nodes[0]
    given = walk.of(source)
    if module.proj_size or shape_of(source) == () or len(given) not in (2, 3):
        return freeze_node(walk, node)
    hidden = int(module.hidden_size)
    units = walk.fresh(hidden)
    directions = 2 if module.bidirectional else 1
    both = units.take(np.tile(np.arange(hidden), directions))
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[ops.kind(node)]
    rows = units.take(np.tile(np.arange(hidden), gates))
    shared = f"weights of {node.target}, used in two ways"
    for name, tensor in module.named_parameters():
        walk.parameter(tensor, 0, rows, shared, producer=name.startswith("weight"))
        if name.startswith("weight_hh"):
            walk.parameter(tensor, 1, units, shared)
        elif name.startswith("weight_ih"):
            walk.parameter(tensor, 1, given[-1] if name.startswith("weight_ih_l0") else both, shared)
    if given[-1] is not None:
        read(walk, node, given[-1], given[-1].constant == 0, f"a channel that is not zero is read by {node.target}")
    for initial in node.all_input_nodes[1:]:
        walk.freeze_all(walk.axes.get(initial), f"an initial state of {node.target}")
    dead = _dead_units(module, hidden, gates) if walk.follow_constants else np.zeros(hidden, dtype=bool)
    if len(node.all_input_nodes) > 1:
        walk.freeze(units, f"its initial state is given ({node.target})")
    made = np.where(dead, 0.0, np.nan)
    read(walk, node, units, dead, f"a unit that varies is read by the next step of {node.target}")
    output = (*[None] * (len(given) - 1), both.with_constant(np.tile(made, directions)))
    state = (*[None] * (len(given) - 1), units.with_constant(made))
    return (output, (state, state)) if ops.kind(node) == "lstm" else (output, state)


def _dead_units(module: Any, hidden: int, gates: int) -> Any:
    """Units that stay at zero in every layer and direction: nothing drives them."""
    dead = np.ones(hidden, dtype=bool)
    for tensor in module.parameters():
        rows = tensor.detach().reshape(gates, hidden, -1)
        dead &= ~(rows != 0).any(2).any(0).cpu().numpy()
    return dead


@transfer("rms_norm")
def _rms_norm(walk: Walk, node: fx.Node) -> Axes:
    """Every entry is read by the mean square; zeros can go if the layer remembers how many (`PartialRMSNorm`)."""
    module: Any = layer(node)
    given = walk.of(node.all_input_nodes[0])
    axis = given[-1] if given else None
    if len(getattr(module, "normalized_shape", (1,))) != 1:
        walk.freeze_all(given[-len(module.normalized_shape) :], f"normalised together with positions by {node.target}")
        return fixed(info(node).value)  # type: ignore[no-any-return]
    walk.parameter(module.weight, 0, axis, f"normalisation {node.target}, used in two ways")
    if axis is None:
        return given
    read(
        walk,
        node,
        axis,
        (axis.constant == 0) & walk.called_once(node),
        f"a channel that varies is part of {node.target}",
    )
    weight = numbers(module.weight, len(axis), 1.0)
    zero = (axis.constant == 0) | ((weight == 0) & walk.follow_constants)
    return (*given[:-1], axis.with_constant(np.where(zero, 0.0, np.nan)))


def scaled(node: fx.Node) -> float:
    """The number that attention multiplies its scores with."""
    given = ops.arguments(node)["scale"]
    query: Any = node.args[0]
    return float(given) if given is not None else 1.0 / math.sqrt(shape_of(query)[-1])


def reduces_one_dimension(node: fx.Node) -> int | None:
    """The dimension that a mean is taken over, or None if there are several."""
    dim = ops.arguments(node).get("dim")
    dims = [dim] if isinstance(dim, int) else list(dim or ())
    rank = len(shape_of(node.args[0]))
    return int(dims[0]) % rank if len(dims) == 1 and rank else None
