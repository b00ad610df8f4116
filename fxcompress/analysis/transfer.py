"""How every kind of operator passes channels on: one rule per kind.

A rule is a function `rule(walk, node) -> axes`. It looks up the axes of the node's inputs with `walk.of(input)`: for
each dimension an `Axis`, or None where the size is fixed. It ties, freezes or reads them, and returns the axes of what
the node produces (a tuple of tuples where it produces several tensors). What is not traceable and has no rule keeps the
channels of its inputs; a function or module class with a rule is kept whole, and need not be traceable.

A function that passes channels on (register it with `torch.fx.wrap`, so that it is not traced into):

    @transfer(gated)                                        # def gated(x, gate): ...
    def gated_rule(walk, node):
        tied = [walk.tie(a, b, "gated") for a, b in zip(*map(walk.of, node.args), strict=True)]
        return tuple(axis and axis.varying() for axis in tied)

A module that mixes channels; `weight` has shape (outputs, inputs), `scale` shape (inputs,):

    @transfer(Mixer, resize=lambda module: setattr(module, "width", len(module.weight)))
    def mixer_rule(walk, node):
        module, given = layer(node), walk.of(node.args[0])  # layer: from fxcompress.analysis.channels
        channels = given[1]
        walk.parameter(module.scale, 0, channels, "scale of the mixer")
        walk.parameter(module.weight, 1, channels, "inputs of the mixer")
        if channels is not None:
            harmless = (channels.constant == 0) | walk.unused(module.weight, 1)
            walk.read(node, channels, harmless, "a channel that is not zero is mixed")
        made = walk.made_here(module.weight, 0)
        walk.parameter(module.bias, 0, made, "bias of the mixer")
        return (given[0], made, *given[2:])

1. `walk.tie(a, b, why)`: equal indices live and die together. `walk.freeze(axis, why)`: all indices stay.
2. `walk.parameter(tensor, dimension, axis, why)`: the dimension of a parameter or buffer is sliced with the axis; every
   dimension that is not named keeps its size. `walk.made_here(tensor, dimension)`: here channels are made.
3. `walk.read(node, axis, harmless, why)`: the values are used up here. harmless, shape (len(axis),), says which indices
   can go without changing the result; for sums of products those that carry zero, or that are multiplied with zeros
   only (`walk.unused(weight, dimension)`). What a rule neither reads, ties nor hands on stays.
4. `axis.take(indices)` cuts, repeats or reorders; `axis.varying()` forgets the constant that an index is known to carry
   (`axis.constant`, NaN where it varies) and has to be called where the operator changes values.
5. `resize` is called with a module whose parameters were sliced, to bring sizes that it keeps in attributes in line.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxcompress.analysis.channels import Axes, Axis, Floats, Walk, layer, numbers, read_outside
from fxcompress.analysis.grouping import Booleans
from fxcompress.analysis.regroup import regroup
from fxcompress.errors import PassError
from fxcompress.graph import ops
from fxcompress.graph.metadata import TensorInfo, info

Rule = Callable[[Walk, fx.Node], Any]
RULES: dict[object, Rule] = {}


#: What brings the attributes of modules of a class in line with their parameters.
RESIZE: dict[object, Callable[[Any], object]] = {}


def transfer(*keys: object, resize: Callable[[Any], object] | None = None) -> Callable[[Rule], Rule]:
    """Register a rule for kinds (words of the operator table), functions or module classes.

    Args:
        keys: what the rule is for.
        resize: for modules: called with each of them whose parameters were sliced.
    """

    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(keys, rule))
        if resize is not None:
            RESIZE.update(dict.fromkeys(keys, resize))
        ops.WHOLE.update(key for key in keys if callable(key) and key not in ops.BY_FUNCTION)
        return rule

    return add


def rule_for(node: fx.Node) -> Rule:
    """Return the rule for a node: by function or module class first, then by kind; the freezing rule otherwise."""
    key: object = type(ops.submodule(node)) if node.op == "call_module" else node.target
    if node.op in ("call_module", "call_function") and key in RULES:
        return _checked(RULES[key])
    kind = ops.kind(node)
    if kind in RULES:
        return RULES[kind]
    return _elementwise if kind in ops.ELEMENTWISE_KINDS else freeze_node


def _checked(rule: Rule) -> Rule:
    """A rule that lets channels stay which it neither reads nor hands on: nobody knows what their absence would do."""

    def run(walk: Walk, node: fx.Node) -> Any:
        reads, edges = len(walk.reads), len(walk.edges)
        made = rule(walk, node)
        _check_sizes(node, made)
        read_here = [one.axis for one in walk.reads[reads:]]
        handed = [axis.atoms.ravel() for axis in (*read_here, *axes_in(made))]
        handed += [atoms for pair in walk.edges[edges:] for atoms in pair]
        name = str(getattr(node.target, "__name__", node.target))
        for source in node.all_input_nodes:
            for axis in axes_in(walk.axes.get(source)):
                if not np.isin(axis.atoms, np.concatenate([np.empty(0, dtype=np.int64), *handed])).any():
                    walk.freeze(axis, f"used up by {name} ({node.name}), whose rule does not say that it reads it")
        return made

    return run


def _check_sizes(node: fx.Node, made: Any) -> None:
    """Refuse axes that are not those of the tensor that a node produces.

    Raises:
        PassError: a rule returned such.
    """
    value = info(node).value
    sizes = tuple(len(axis) if isinstance(axis, Axis) else None for axis in made) if isinstance(made, tuple) else None
    if not isinstance(value, TensorInfo) or sizes is None:
        return
    fits = len(sizes) == len(value.shape) and all(
        one in (None, size) for one, size in zip(sizes, value.shape, strict=True)
    )
    if not fits:
        name = str(getattr(node.target, "__name__", node.target))
        raise PassError(
            f"the channel rule for {name} ({node.name}) returned axes of the sizes {sizes}, but {node.name} has shape "
            f"{value.shape}: it must return one axis, or None, for each dimension"
        )


def axes_in(axes: Any) -> list[Axis]:
    """Return every axis in a nest of axes."""
    if isinstance(axes, Axis):
        return [axes]
    items = axes.values() if isinstance(axes, dict) else axes if isinstance(axes, (tuple, list)) else ()
    return [found for item in items for found in axes_in(item)]


def freeze_node(walk: Walk, node: fx.Node) -> Any:
    """The rule for what is not understood: every input keeps its channels, every output has fixed sizes."""
    name = str(getattr(node.target, "__name__", node.target))
    for source in node.all_input_nodes:
        walk.freeze_all(walk.axes.get(source), f"read by {name} ({node.name}), which the channel rules do not know")
    module = ops.submodule(node)
    for tensor in module.parameters() if module is not None else ():
        for dimension in range(tensor.ndim):
            walk.parameter(tensor, dimension, None, f"a parameter that {name} uses too")
    return fixed(info(node).value)


def fixed(value: Any) -> Any:
    """Return axes for a value of which every size is fixed."""
    if isinstance(value, TensorInfo):
        return (None,) * len(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(fixed(item) for item in value)
    return {name: fixed(item) for name, item in value.items()} if isinstance(value, dict) else ()


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the shape of a tensor node, () for everything else."""
    value = info(node).value if isinstance(node, fx.Node) else None
    return value.shape if isinstance(value, TensorInfo) else ()


@transfer("placeholder")
def _placeholder(walk: Walk, node: fx.Node) -> Any:
    return fixed(info(node).value)


@transfer("get_attr")
def _attribute(walk: Walk, node: fx.Node) -> Any:
    """A parameter or buffer used without a layer: every dimension wider than 1 is a choice of its own."""
    found: Any = walk.graph_module
    for name in str(node.target).split("."):
        found = getattr(found, name)
    if not isinstance(found, torch.Tensor) or not found.dtype.is_floating_point:
        return fixed(info(node).value)
    axes: list[Axis | None] = []
    for dimension, size in enumerate(found.shape):
        if size == 1:
            axes.append(None)
            continue
        axis = walk.parameters.get((id(found), dimension), walk.fresh(size))
        walk.parameter(found, dimension, axis, "a parameter used in two ways")
        axes.append(axis and axis.with_constant(_slice_constants(walk, found, dimension)))
    return tuple(axes)


def _slice_constants(walk: Walk, tensor: torch.Tensor, dimension: int) -> Floats:
    if not walk.follow_constants:
        return np.full(tensor.shape[dimension], np.nan)
    slices = tensor.detach().double().cpu().movedim(dimension, 0).reshape(tensor.shape[dimension], -1).numpy()
    return np.where((slices == slices[:, :1]).all(axis=1), slices[:, 0], np.nan)


# -- layers ---------------------------------------------------------------------------------------------------------


@transfer("conv")
def _conv(walk: Walk, node: fx.Node) -> Axes:
    module = layer(node)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return _convolution(walk, node, module, module.weight, _is_padded(module))


def _is_padded(module: Any) -> bool:
    """Whether zeros are padded, so that a constant channel does not stay constant (circular and others keep it so)."""
    if module.padding_mode != "zeros":
        return False
    if isinstance(module.padding, str):
        return bool(module.padding == "same" and any(size != 1 for size in module.kernel_size))
    return any(size != 0 for size in module.padding)


@transfer("conv_transpose")
def _conv_transpose(walk: Walk, node: fx.Node) -> Axes:
    """The output of a transposed convolution is made of overlapping kernels: constants are followed only if zero."""
    module = layer(node)
    assert isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    return _convolution(walk, node, module, module.weight, True, out_dimension=1)


def _convolution(
    walk: Walk, node: fx.Node, module: Any, weight: torch.Tensor, padded: bool, out_dimension: int = 0
) -> Axes:
    source = node.all_input_nodes[0]
    given = walk.of(source)
    channel = len(given) - (weight.ndim - 2) - 1
    axis, groups = given[channel], int(module.groups)
    walk.freeze_all(given[channel + 1 :], f"convolved over by {node.target}")
    if groups == 1:
        out = _full(walk, node, module, weight, axis, padded, out_dimension)
    else:
        out = _grouped(walk, node, module, weight, axis, padded, out_dimension)
    _bias(walk, node, module, out)
    return (*given[:channel], out, *[None] * (weight.ndim - 2))


def _bias(walk: Walk, node: fx.Node, module: Any, out: Axis | None) -> None:
    walk.parameter(module.bias, 0, out, f"bias of {node.target}")


def _full(
    walk: Walk, node: fx.Node, module: Any, weight: torch.Tensor, axis: Axis | None, padded: bool, out_dimension: int
) -> Axis | None:
    """A layer that mixes all of its inputs: the input channels are read, the output channels are made here."""
    in_dimension = 1 - out_dimension
    walk.parameter(weight, in_dimension, axis, f"input of {node.target}, whose weights are used elsewhere")
    out = walk.made_here(weight, out_dimension)
    if not walk.follow_constants:
        read(walk, node, axis, np.zeros(weight.shape[in_dimension], dtype=bool), "")
        return out
    matrix = weight.detach().cpu().transpose(0, 1) if out_dimension else weight.detach().cpu()
    kernels = matrix.flatten(2) if matrix.ndim > 2 else matrix.unsqueeze(2)  # [out, in, taps]
    used = (kernels != 0).any(2).numpy()
    constant = axis.constant if axis is not None else np.full(used.shape[1], np.nan)
    foldable = ~np.isnan(constant) & ((constant == 0) | (not padded))
    may_fold = walk.called_once(node)
    harmless = ~used.any(axis=0) | (constant == 0) | (foldable & may_fold)
    why = "a constant, but not zero, channel is read by a padded convolution" if padded else "a channel that varies"
    read(walk, node, axis, harmless, f"{why} ({node.target})")
    if out is None:
        return None
    bias = numbers(module.bias, len(out), 0.0)
    folds = foldable & (constant != 0)
    folded = kernels[:, torch.from_numpy(folds)].double().sum(2).numpy() @ constant[folds]
    return out.with_constant(np.where(used[:, ~foldable].any(axis=1), np.nan, bias + folded))


def _grouped(
    walk: Walk, node: fx.Node, module: Any, weight: torch.Tensor, axis: Axis | None, padded: bool, out_dimension: int
) -> Axis | None:
    groups = int(module.groups)
    inputs = (weight.shape[1] * groups) if out_dimension == 0 else weight.shape[0]
    outputs = weight.shape[0] if out_dimension == 0 else weight.shape[1] * groups
    if inputs == groups:
        return _depthwise(walk, node, module, weight, axis, padded, out_dimension, outputs // groups)
    return _by_position(walk, node, module, weight, axis, out_dimension, inputs // groups, outputs // groups)


def _depthwise(
    walk: Walk, node: fx.Node, module: Any, weight: torch.Tensor, axis: Axis | None, padded: bool, out_dimension: int,
    multiplier: int,
) -> Axis | None:  # fmt: skip
    """Every input channel makes `multiplier` outputs of its own: they live and die with it."""
    why = f"depthwise convolution {node.target}, whose weights are used elsewhere"
    if axis is None:
        walk.parameter(weight, 0, None, why)
        return None
    out = axis.take(np.repeat(np.arange(len(axis)), multiplier)).varying()
    walk.parameter(weight, 0, out if out_dimension == 0 else axis, why, producer=True)
    if not walk.follow_constants:
        return out
    rows = weight.detach().double().cpu().reshape(len(out), -1).numpy()
    constant = np.repeat(axis.constant, multiplier)
    bias = numbers(module.bias, len(out), 0.0)
    known = ~np.isnan(constant) & ((constant == 0) | (not padded))
    value = np.where(known, rows.sum(axis=1) * np.nan_to_num(constant) + bias, np.nan)
    return out.with_constant(np.where((rows == 0).all(axis=1), bias, value))


def _by_position(
    walk: Walk, node: fx.Node, module: Any, weight: torch.Tensor, axis: Axis | None, out_dimension: int,
    ins: int, outs: int,
) -> Axis | None:  # fmt: skip
    """A grouped convolution keeps its groups of one size: equal positions of all groups live and die together."""
    groups = int(module.groups)
    reused = f"grouped convolution {node.target}, whose weights are used elsewhere"
    if axis is not None:
        rows = axis.atoms.reshape(len(axis.atoms), groups, ins)
        walk.link(np.broadcast_to(rows[:, :1], rows.shape), rows)
        position = Axis(rows[:, 0], np.full(ins, np.nan))
    else:
        position = None
    if out_dimension == 0:
        walk.parameter(weight, 1, position, reused)
        key = (id(weight), 0)
        if key not in walk.parameters:
            walk.parameter(weight, 0, walk.fresh(outs).take(np.tile(np.arange(outs), groups)), reused, producer=True)
        out = walk.parameters[key]
    else:
        walk.parameter(weight, 0, axis, reused)
        made = walk.made_here(weight, 1)
        out = made and made.take(np.tile(np.arange(outs), groups))
    if axis is None or not walk.follow_constants:
        read(walk, node, axis, np.zeros(ins * groups, dtype=bool), "")
        return out and out.varying()
    used = (weight.detach().cpu() != 0).flatten(2).any(2)
    columns = used.reshape(groups, outs, ins).any(1) if out_dimension == 0 else used.any(1).reshape(groups, ins)
    harmless = ~columns.numpy().ravel() | (axis.constant == 0)
    read(walk, node, axis, harmless, f"a channel that is not zero is read by a grouped convolution ({node.target})")
    rows_used = used.reshape(groups * outs, ins).any(1) if out_dimension == 0 else None
    if out is None or rows_used is None:
        return out and out.varying()
    bias = numbers(module.bias, groups * outs, 0.0)
    return out.with_constant(np.where(rows_used.numpy(), np.nan, bias))


def read(walk: Walk, node: fx.Node, axis: Axis | None, harmless: Booleans, why: str) -> None:
    """Record that a node reads the channels of an axis, see `Read`."""
    if axis is not None:
        walk.read(node, axis, harmless, why)


@transfer("linear")
def _linear(walk: Walk, node: fx.Node) -> Axes:
    module = layer(node)
    assert isinstance(module, nn.Linear)
    given = walk.of(node.all_input_nodes[0])
    out = _full(walk, node, module, module.weight, given[-1], False, 0)
    _bias(walk, node, module, out)
    return (*given[:-1], out)


@transfer("embedding")
def _embedding(walk: Walk, node: fx.Node) -> Axes:
    module = layer(node)
    assert isinstance(module, nn.Embedding)
    walk.parameter(module.weight, 0, None, f"rows of the embedding {node.target}")
    out = walk.made_here(module.weight, 1)
    constant = _slice_constants(walk, module.weight, 1)
    return (*walk.of(node.all_input_nodes[0]), out and out.with_constant(constant))


@transfer("batch_norm", "instance_norm")
def _batch_norm(walk: Walk, node: fx.Node) -> Axes:
    module: Any = layer(node)
    given = walk.of(node.all_input_nodes[0])
    is_batch = ops.kind(node) == "batch_norm"
    channel = 1 if is_batch or len(given) == len(shape_of(node)) else 0
    axis = given[channel]
    for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
        walk.parameter(tensor, 0, axis, f"normalisation {node.target}, used in two ways")
    if axis is None or not walk.follow_constants:
        return keep(given, channel, axis and axis.varying())
    size = len(axis)
    weight, bias = numbers(module.weight, size, 1.0), numbers(module.bias, size, 0.0)
    if is_batch and module.running_mean is not None:
        mean, variance = numbers(module.running_mean, size, 0.0), numbers(module.running_var, size, 1.0)
        value = (axis.constant - mean) / np.sqrt(variance + module.eps) * weight + bias
    else:  # normalised by its own statistics: a constant becomes zero
        value = np.where(np.isnan(axis.constant), np.nan, bias)
    return keep(given, channel, axis.with_constant(np.where(weight == 0, bias, value)))


def keep(axes: Axes, position: int, axis: Axis | None) -> Axes:
    """The same axes with another one at one position."""
    return (*axes[:position], axis, *axes[position + 1 :])


@transfer("group_norm")
def _group_norm(walk: Walk, node: fx.Node) -> Axes:
    """Statistics are shared within a group: its channels live and die together, whole groups go exactly.

    A single group is like a LayerNorm: constants can go if the layer remembers them (`PartialGroupNorm`).
    """
    module: Any = layer(node)
    given = walk.of(node.all_input_nodes[0])
    axis = given[1]
    for tensor in (module.weight, module.bias):
        walk.parameter(tensor, 0, axis, f"normalisation {node.target}, used in two ways")
    walk.freeze_all(given[2:], f"normalised over by {node.target}")
    if axis is None:
        return (*given[:2], *[None] * len(given[2:]))
    if getattr(module, "num_groups", 1) == 1:
        return keep((*given[:2], *[None] * len(given[2:])), 1, _normalised_together(walk, node, axis))
    rows = axis.atoms.reshape(len(axis.atoms), module.num_groups, -1)
    walk.link(np.broadcast_to(rows[:, :, :1], rows.shape), rows)
    if not walk.follow_constants:
        return keep(given, 1, axis.varying())
    weight, bias = numbers(module.weight, len(axis), 1.0), numbers(module.bias, len(axis), 0.0)
    grid = axis.constant.reshape(module.num_groups, -1)
    equal = np.repeat((grid == grid[:, :1]).all(axis=1), grid.shape[1])  # a constant group is normalised to zero
    return keep(given, 1, axis.with_constant(np.where((weight == 0) | equal, bias, np.nan)))


@transfer("layer_norm")
def _layer_norm(walk: Walk, node: fx.Node) -> Axes:
    """Every entry is read by the statistics; constants can go if the layer remembers them (`PartialLayerNorm`)."""
    module: Any = layer(node)
    given = walk.of(node.all_input_nodes[0])
    axis = given[-1] if given else None
    dimensions = 1 if not hasattr(module, "normalized_shape") else len(module.normalized_shape)
    if dimensions != 1:
        walk.freeze_all(given[-dimensions:], f"normalised together with positions by {node.target}")
        return fixed(info(node).value)  # type: ignore[no-any-return]
    for tensor in (module.weight, module.bias):
        walk.parameter(tensor, 0, axis, f"normalisation {node.target}, used in two ways")
    if axis is None:
        return given
    return keep(given, len(given) - 1, _normalised_together(walk, node, axis))


def _normalised_together(walk: Walk, node: fx.Node, axis: Axis) -> Axis:
    """What a normalisation over all channels makes of them: constant only where its weight is zero."""
    module: Any = layer(node)
    harmless = ~np.isnan(axis.constant) & walk.called_once(node)
    read(walk, node, axis, harmless, f"a channel that varies is part of the statistics of {node.target}")
    if not walk.follow_constants:
        return axis.varying()
    weight, bias = numbers(module.weight, len(axis), 1.0), numbers(module.bias, len(axis), 0.0)
    return axis.with_constant(np.where(weight == 0, bias, np.nan))


@transfer("prelu")
def _prelu(walk: Walk, node: fx.Node) -> Axes:
    module = layer(node)
    assert isinstance(module, nn.PReLU)
    given = walk.of(node.all_input_nodes[0])
    channel = min(1, len(given) - 1)
    axis = given[channel]
    if module.num_parameters > 1:
        walk.parameter(module.weight, 0, axis, f"{node.target}, used in two ways")
    slope = numbers(module.weight, 1 if module.num_parameters == 1 else module.num_parameters, 0.25)
    found: list[Axis | None] = []
    for position, item in enumerate(given):
        if item is None:
            found.append(None)
            continue
        factor = slope if position == channel or len(slope) == 1 else np.full(1, np.nan)
        value = item.constant
        found.append(item.with_constant(np.where(value >= 0, value, value * factor)))
    return tuple(found)


@transfer("local_response_norm")
def _local_response_norm(walk: Walk, node: fx.Node) -> Axes:
    given = walk.of(node.all_input_nodes[0])
    walk.freeze_all(given, f"normalised over neighbouring channels by {node.name}")
    return tuple(axis and axis.varying() for axis in given)


# -- elementwise ----------------------------------------------------------------------------------------------------

#: Functions of NaN that are not NaN: a constant that is not known would seem to be.
_HIDES_NAN = {"isnan", "logical_not", "nan_to_num", "eq", "ne", "lt", "le", "gt", "ge", "where", "masked_fill",
              "maximum", "minimum", "zeros_like", "ones_like"}  # fmt: skip

#: Functions that make a tensor like another one, full of one number.
_FILLED = {"zeros_like": 0.0, "ones_like": 1.0, "full_like": np.nan}


def _elementwise(walk: Walk, node: fx.Node) -> Any:
    """Every tensor is broadcast to the result's shape; where two have an axis, equal indices are tied."""
    value = info(node).value
    if not isinstance(value, TensorInfo):
        return fixed(value)
    operands = [source for source in node.all_input_nodes if isinstance(info(source).value, TensorInfo)]
    if ops.kind(node) in ("div", "floordiv", "mod", "reciprocal", "rsqrt", "log"):
        _note_divisor(walk, node.args[-1])
    rank, found = len(value.shape), []
    for dimension in range(rank):
        axis: Axis | None = None
        met = False
        for operand in operands:
            position = dimension - (rank - len(shape_of(operand)))
            if position < 0 or (shape_of(operand)[position] == 1 and value.shape[dimension] != 1):
                continue
            other = walk.of(operand)[position]
            why = f"{ops.kind(node)} ({node.name}) ties it to a dimension of fixed size"
            axis = walk.tie(axis, other, why) if met else other
            met = True
        found.append(axis and axis.with_constant(_result_constants(walk, node, dimension, len(axis))))
    return tuple(found)


def _note_divisor(walk: Walk, divisor: Any) -> None:
    """Remember a parameter or buffer that is divided by as it is: masking it would make infinities."""
    while isinstance(divisor, fx.Node) and ops.kind(divisor) in ops.VIEW_KINDS and divisor.all_input_nodes:
        divisor = divisor.all_input_nodes[0]
    if isinstance(divisor, fx.Node) and divisor.op == "get_attr":
        held: Any = walk.graph_module
        for name in str(divisor.target).split("."):
            held = getattr(held, name)
        walk.divisors.add(id(held))


def _result_constants(walk: Walk, node: fx.Node, dimension: int, size: int) -> Floats:
    """Constants of an elementwise result along one dimension, by calling the function on those of its inputs."""
    unknown = np.full(size, np.nan)
    kind = ops.kind(node)
    if kind in _FILLED and node.op == "call_function":
        value = _FILLED[kind] if len(node.args) < 2 else node.args[1]
        return np.full(size, float(value)) if isinstance(value, (int, float)) else unknown
    hides = kind in _HIDES_NAN or (kind == "pow" and not _is_power(node))
    if not walk.follow_constants or hides or (node.op == "call_module" and kind != "dropout"):
        return unknown
    if kind in ("identity", "dropout", "dropout_function", "to"):
        return _operand_constants(walk, node, node.all_input_nodes[0], dimension, size)
    if node.op != "call_function":
        return unknown
    constants = {
        operand: _operand_constants(walk, node, operand, dimension, size)
        for operand in node.all_input_nodes
        if isinstance(info(operand).value, TensorInfo)
    }
    if len(constants) < len(node.all_input_nodes):  # a size that is known only at run time
        return _zero_product(kind, list(constants.values()), unknown)
    call: Any = node.target
    args = fx.map_arg(node.args, lambda n: torch.from_numpy(constants[n]))
    kwargs = fx.map_arg(node.kwargs, lambda n: torch.from_numpy(constants[n]))
    try:
        result = call(*args, **kwargs).double().numpy()
    except (TypeError, RuntimeError):
        return unknown
    return _zero_product(kind, list(constants.values()), np.broadcast_to(result, (size,)).astype(np.float64))


def _is_power(node: fx.Node) -> bool:
    """Whether a tensor is raised to a number other than zero (NaN to the power of zero is 1)."""
    return isinstance(node.args[0], fx.Node) and isinstance(node.args[1], (int, float)) and node.args[1] != 0


def _zero_product(kind: str, constants: Sequence[Floats], result: Floats) -> Floats:
    """Zero times anything finite is zero, also where the other factor varies."""
    if kind == "mul":
        return np.where(np.any([c == 0 for c in constants], axis=0), 0.0, result)
    if kind == "div" and constants:
        return np.where(constants[0] == 0, np.where(np.isnan(result), 0.0, result), result)
    return result


def _operand_constants(walk: Walk, node: fx.Node, operand: fx.Node, dimension: int, size: int) -> Floats:
    rank = len(shape_of(node))
    position = dimension - (rank - len(shape_of(operand)))
    axes = walk.of(operand)
    if position < 0 or axes[position] is None:
        return np.full(size, np.nan)
    axis = axes[position]
    return axis.constant if axis is not None and len(axis) == size else np.full(size, np.nan)


# -- sizes and views ------------------------------------------------------------------------------------------------


@transfer("size", "ndim", "numel", "getattr", "number_int", "number_float", "math_sqrt", "zeros", "ones", "arange",
          "items", "values", "keys", "ordered_dict")  # fmt: skip
def _sizes(walk: Walk, node: fx.Node) -> Any:
    """Sizes carry no channels; containers hand on what is in them."""
    if ops.kind(node) == "ordered_dict":
        for source in node.all_input_nodes:
            walk.freeze_all(walk.axes.get(source), read_outside(walk.graph_module))
    return fixed(info(node).value)


@transfer("cat")
def _cat(walk: Walk, node: fx.Node) -> Any:
    arguments = ops.arguments(node)
    tensors = _parts(walk, arguments["tensors"])
    if tensors is None:
        return freeze_node(walk, node)
    tensors = [(axes, shape) for axes, shape in tensors if shape != (0,)]
    rank = len(shape_of(node))
    along = int(arguments["dim"]) % rank
    found: list[Axis | None] = []
    for dimension in range(rank):
        parts = [axes[dimension] for axes, _ in tensors]
        if dimension == along:
            sizes = [shape[dimension] for _, shape in tensors]
            found.append(_join(walk, parts, sizes, f"concatenated in {node.name} with a tensor of fixed size"))
        else:
            found.append(tie_all(walk, parts, f"concatenated in {node.name} beside a tensor of fixed size"))
    return tuple(found)


def _parts(walk: Walk, tensors: Any) -> list[tuple[Axes, tuple[int, ...]]] | None:
    """Axes and shapes of several tensors, given one by one or as what one node makes; None if they are not known."""
    if not isinstance(tensors, fx.Node):
        return [(walk.of(tensor), shape_of(tensor)) for tensor in tensors]
    values, axes = info(tensors).value, walk.axes.get(tensors)
    if not isinstance(values, (tuple, list)) or not isinstance(axes, tuple) or len(axes) != len(values):
        return None
    if not all(
        isinstance(value, TensorInfo) and len(given) == len(value.shape)
        for value, given in zip(values, axes, strict=True)
    ):
        return None
    return [(given, value.shape) for value, given in zip(values, axes, strict=True)]


def _join(walk: Walk, parts: list[Axis | None], sizes: list[int], why: str) -> Axis | None:
    if all(part is None for part in parts):
        return None
    pieces: list[Axis] = []
    for part, size in zip(parts, sizes, strict=True):
        piece = part
        if piece is None:
            piece = walk.fresh(size)
            walk.freeze(piece, why)
        pieces.append(piece)
    depth = max(len(piece.atoms) for piece in pieces)
    atoms = [np.pad(piece.atoms, ((0, depth - len(piece.atoms)), (0, 0)), mode="edge") for piece in pieces]
    return Axis(np.concatenate(atoms, axis=1), np.concatenate([piece.constant for piece in pieces]))


def tie_all(walk: Walk, parts: list[Axis | None], why: str) -> Axis | None:
    """Let equal indices of several axes live and die together."""
    axis = parts[0]
    for part in parts[1:]:
        axis = walk.tie(axis, part, why)
    if axis is None:
        return None
    constants = np.stack([part.constant for part in parts if part is not None])
    return axis.with_constant(np.where((constants == constants[0]).all(axis=0), constants[0], np.nan))


@transfer("stack")
def _stack(walk: Walk, node: fx.Node) -> Any:
    arguments = ops.arguments(node)
    tensors = _parts(walk, arguments["tensors"])
    if tensors is None:
        return freeze_node(walk, node)
    rank = len(shape_of(node))
    along = int(arguments["dim"]) % rank
    tied = [
        tie_all(walk, [axes[dimension] for axes, _ in tensors], f"stacked in {node.name}")
        for dimension in range(rank - 1)
    ]
    return (*tied[:along], None, *tied[along:])


@transfer("split", "chunk", "tensor_split", "unbind")
def _split(walk: Walk, node: fx.Node) -> Any:
    arguments = ops.arguments(node)
    source = node.all_input_nodes[0]
    given, along = walk.of(source), int(arguments["dim"]) % max(len(shape_of(source)), 1)
    if ops.kind(node) == "unbind":
        walk.freeze(given[along], f"taken apart one by one in {node.name}")
        return tuple((*given[:along], *given[along + 1 :]) for _ in info(node).value)
    pieces, start = [], 0
    for piece in info(node).value:
        stop = start + piece.shape[along]
        axis = given[along]
        pieces.append(keep(given, along, axis and axis.take(slice(start, stop))))
        start = stop
    return tuple(pieces)


@transfer("getitem")
def _getitem(walk: Walk, node: fx.Node) -> Any:
    source: Any = node.args[0]
    index: Any = node.args[1]
    value = info(source).value if isinstance(source, fx.Node) else None
    if not isinstance(value, TensorInfo):
        found = walk.axes.get(source, ()) if isinstance(source, fx.Node) else ()
        known = not isinstance(index, fx.Node) and not (isinstance(index, slice) and _has_nodes(index))
        if isinstance(info(node).value, (TensorInfo, tuple, list, dict)) and known:
            return found[index] if isinstance(found, (tuple, dict)) and found else fixed(info(node).value)
        walk.freeze_all(found, f"selected by an index that is not fixed ({node.name})")
        return fixed(info(node).value)
    items = ops.normalised_index(index, len(value.shape))
    given = walk.of(source)
    if items is None:
        return _gather(walk, node, given, index)
    axes: list[Axis | None] = []
    position = 0
    for item in items:
        if item is None:
            axes.append(None)
            continue
        axis = given[position]
        if isinstance(item, slice):
            axes.append(_slice(walk, axis, item, node))
        else:
            walk.freeze(axis, f"one index of it is selected in {node.name}")
        position += 1
    return tuple(axes)


def _has_nodes(item: slice) -> bool:
    return any(isinstance(bound, fx.Node) for bound in (item.start, item.stop, item.step))


def _gather(walk: Walk, node: fx.Node, given: Axes, index: Any) -> Any:
    """One tensor as index, the first dimensions whole: that dimension stays, the others pass (a table of biases)."""
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    place = next((i for i, item in enumerate(items) if isinstance(item, fx.Node)), 0)
    rest = [item for i, item in enumerate(items) if i != place]
    chosen = info(items[place]).value if isinstance(items[place], fx.Node) else None
    whole = all(isinstance(item, slice) and item == slice(None) for item in rest)
    if not whole or not isinstance(chosen, TensorInfo) or chosen.dtype in (torch.bool, torch.uint8):
        walk.freeze_all(given, f"indexed by tensors ({node.name})")
        return fixed(info(node).value)
    walk.freeze(given[place], f"indexed by a tensor ({node.name})")
    others = [axis and axis.varying() for axis in given]
    return (*others[:place], *[None] * len(chosen.shape), *others[place + 1 :])


def _slice(walk: Walk, axis: Axis | None, item: slice, node: fx.Node) -> Axis | None:
    if axis is None or item == slice(None):
        return axis
    item = with_numbers(item, walk.sizes)
    bounds = (item.start, item.stop, item.step)
    if any(isinstance(bound, fx.Node) for bound in bounds) or item.step not in (None, 1):
        walk.freeze(axis, f"sliced by bounds or steps that cannot be rewritten in {node.name}")
        return None
    return axis.take(slice(*item.indices(len(axis))))


def with_numbers(item: slice, sizes: Collection[fx.Node]) -> slice:
    """Return a slice with the values of those of its bounds that are computed from channel sizes only."""
    bounds = (item.start, item.stop, item.step)
    return slice(*(info(one).value if isinstance(one, fx.Node) and one in sizes else one for one in bounds))


@transfer("narrow", "select", "index_select")
def _narrow(walk: Walk, node: fx.Node) -> Axes:
    arguments = ops.arguments(node)
    given = walk.of(arguments["input"])
    along = int(arguments["dim"]) % len(given)
    walk.freeze(given[along], f"indices of it are selected in {node.name}")
    if ops.kind(node) == "select":
        return (*given[:along], *given[along + 1 :])
    return keep(given, along, None)


@transfer("flatten", "unflatten", "reshape", "view_as", "squeeze", "unsqueeze")
def _reshape(walk: Walk, node: fx.Node) -> Axes:
    """A dimension that is cut is one choice, or several where a product reads its parts (attention heads)."""
    source = node.all_input_nodes[0]
    given = walk.of(source)
    found = regroup(walk, given, shape_of(source), shape_of(node), every_part=_meets_a_product(node))
    if ops.kind(node) == "view_as":
        why = f"given the shape of a tensor of fixed size in {node.name}"
        return tuple(
            None if axis is None and other is None else walk.tie(axis, other, why)
            for axis, other in zip(found, walk.of(node.args[1]), strict=True)
        )
    if ops.kind(node) == "unflatten":
        start = int(ops.arguments(node)["dim"]) % len(given)
        _state_sizes(walk, node, (*[1] * start, *ops.arguments(node)["sizes"]), found, given)
    if ops.kind(node) == "reshape":
        _state_sizes(walk, node, ops.arguments(node)["shape"], found, given)
    return found


def _state_sizes(walk: Walk, node: fx.Node, sizes: Any, made: Axes, given: Axes) -> None:
    """Find out for every size that is computed at run time whether it will be right after removal, and what if not.

    1. A product of sizes of the dimensions at hand follows what happens to them.
    2. One that channels alone decide, or whose dimension holds channels and nothing else, is written as a number.
    3. Otherwise the dimension is frozen, and so is every dimension of channels that the size is computed from.
    """
    stated = sizes if isinstance(sizes, (tuple, list)) else ()
    for dimension, (axis, size) in enumerate(zip(made, stated, strict=False)):
        if not isinstance(size, fx.Node):
            continue
        measured = _measured_axes(walk, size)
        if axis is not None and _follows(walk, size, given, made):
            continue
        if size in walk.sizes or (axis is not None and len(np.unique(axis.atoms, axis=1).T) == len(axis)):
            walk.written.add((node, dimension))
        else:
            walk.freeze_all((axis, *measured), f"its size is computed at run time in {node.name}")


#: Kinds that multiply tensors with one another.
PRODUCTS = frozenset({"matmul", "bmm", "einsum", "attention", "baddbmm"})

#: Kinds behind which a dimension is no longer the one that was cut.
_MIXING = frozenset({"conv", "conv_transpose", "linear", "output"})


def _meets_a_product(node: fx.Node) -> bool:
    """Whether what a reshape makes is read by a matrix product before its channels are mixed."""
    front, seen = list(node.users), set(node.users)
    while front:
        user = front.pop()
        kind = ops.kind(user)
        if kind in PRODUCTS:
            return True
        if kind not in _MIXING:
            new = [one for one in user.users if one not in seen]
            seen.update(new)
            front += new
    return False


def _follows(walk: Walk, size: fx.Node, given: Axes, made: Axes) -> bool:
    """Whether a size is a product of sizes of the axes at hand, and perhaps of numbers that no channel changes."""
    known = {axis.atoms.tobytes() for axis in (*given, *made) if axis is not None}
    met = False
    factors = [size]
    while factors:
        factor = factors.pop()
        axis = _measured_axis(walk, factor)
        if axis is not None:
            met = True
            if axis.atoms.tobytes() not in known:
                return False
        elif ops.kind(factor) == "mul":
            factors += factor.all_input_nodes
        elif _measured_axes(walk, factor):
            return False
    return met


def _measured_axes(walk: Walk, size: fx.Node) -> list[Axis]:
    """Every axis of channels whose size goes into a number."""
    found: list[Axis] = []
    leaves, seen = [size], {size}
    while leaves:
        leaf = leaves.pop()
        axis = _measured_axis(walk, leaf)
        if axis is not None:
            found.append(axis)
        elif ops.kind(leaf) != "size":
            new = [one for one in leaf.all_input_nodes if one not in seen]
            seen.update(new)
            leaves += new
    return found


def _measured_axis(walk: Walk, node: fx.Node) -> Axis | None:
    """The axis whose size a node reads: x.size(1), or x.size()[1]."""
    kind = ops.kind(node)
    if kind == "size" and len(node.args) == 2 and isinstance(node.args[1], int):
        axes = walk.of(node.args[0])
        return axes[node.args[1]] if axes else None
    if kind == "getitem" and isinstance(node.args[0], fx.Node) and ops.kind(node.args[0]) == "size":
        axes, index = walk.of(node.args[0].args[0]), node.args[1]
        return axes[index] if axes and isinstance(index, int) and len(node.args[0].args) == 1 else None
    return None


def note_sizes(walk: Walk, node: fx.Node) -> None:
    """Remember numbers that are computed from sizes of channel dimensions only, which no input changes."""
    value = info(node).value
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    sources = node.all_input_nodes
    computed = ops.kind(node) not in ("size", "getitem") and sources and all(one in walk.sizes for one in sources)
    if computed or _measured_axis(walk, node) is not None:
        walk.sizes.add(node)


@transfer("permute")
def _permute(walk: Walk, node: fx.Node) -> Axes:
    arguments = ops.arguments(node)
    given = walk.of(arguments["input"])
    return tuple(given[dimension] for dimension in arguments["dims"])


@transfer("transpose")
def _transpose(walk: Walk, node: fx.Node) -> Axes:
    arguments = ops.arguments(node)
    given = list(walk.of(arguments["input"]))
    first, second = arguments["dim0"], arguments["dim1"]
    given[first], given[second] = given[second], given[first]
    return tuple(given)


@transfer("flip", "roll")
def _flip(walk: Walk, node: fx.Node) -> Axes:
    arguments = ops.arguments(node)
    given = list(walk.of(arguments["input"]))
    dims = arguments["dims"]
    moved = range(len(given)) if dims is None else dims if isinstance(dims, (tuple, list)) else (dims,)
    for dimension in moved:
        axis = given[dimension]
        if ops.kind(node) == "flip":
            given[dimension] = axis and axis.take(np.arange(len(axis))[::-1])
        else:
            walk.freeze(axis, f"rolled in {node.name}")
    return tuple(given)


@transfer("expand", "expand_as", "broadcast_to")
def _expand(walk: Walk, node: fx.Node) -> Axes:
    source = node.all_input_nodes[0]
    given, shape = walk.of(source), shape_of(node)
    added = len(shape) - len(given)
    kept = (axis if len(axis or ()) == shape[added + i] else None for i, axis in enumerate(given))
    found = (*[None] * added, *kept)
    if ops.kind(node) == "expand":
        _state_sizes(walk, node, node.args[1:], found, given)
    return found


@transfer("repeat")
def _repeat(walk: Walk, node: fx.Node) -> Axes:
    source = node.all_input_nodes[0]
    given, old, new = walk.of(source), shape_of(source), shape_of(node)
    added = len(new) - len(old)
    return (
        *[None] * added,
        *(axis and axis.take(np.tile(np.arange(old[i]), new[added + i] // old[i])) for i, axis in enumerate(given)),
    )


@transfer("repeat_interleave")
def _repeat_interleave(walk: Walk, node: fx.Node) -> Any:
    arguments = ops.arguments(node)
    given, dim, repeats = walk.of(arguments["input"]), arguments["dim"], arguments["repeats"]
    if not isinstance(dim, int):
        return freeze_node(walk, node)
    axis = given[dim]
    if not isinstance(repeats, int):
        walk.freeze(axis, f"repeated as often as is known at run time in {node.name}")
        return keep(given, dim % len(given), None)
    return keep(given, dim % len(given), axis and axis.take(np.repeat(np.arange(len(axis)), repeats)))


@transfer("channel_shuffle")
def _channel_shuffle(walk: Walk, node: fx.Node) -> Axes:
    """Equal positions of all groups are tied, so that the shuffle of what is left is the same shuffle."""
    arguments = ops.arguments(node)
    given, groups = walk.of(arguments["input"]), int(arguments["groups"])
    axis = given[1]
    if axis is None:
        return given
    rows = axis.atoms.reshape(len(axis.atoms), groups, -1)
    walk.link(np.broadcast_to(rows[:, :1], rows.shape), rows)
    return keep(given, 1, axis.take(np.arange(len(axis)).reshape(groups, -1).T.ravel()))


@transfer("pixel_shuffle")
def _pixel_shuffle(walk: Walk, node: fx.Node) -> Axes:
    """r*r channels become one: they live and die together."""
    arguments = ops.arguments(node)
    given = walk.of(arguments["input"])
    channel, block = len(given) - 3, int(arguments["upscale_factor"]) ** 2
    axis = given[channel]
    if axis is not None:
        rows = axis.atoms.reshape(len(axis.atoms), -1, block)
        walk.link(np.broadcast_to(rows[:, :, :1], rows.shape), rows)
        constants = axis.constant.reshape(-1, block)
        equal = (constants == constants[:, :1]).all(axis=1)
        axis = Axis(rows[:, :, 0], np.where(equal, constants[:, 0], np.nan))
    return (*given[:channel], axis, None, None)


@transfer("unfold")
def _unfold(walk: Walk, node: fx.Node) -> Any:
    """Every channel becomes one channel for each place of the window."""
    arguments = ops.arguments(node)
    given, source = walk.of(arguments["input"]), shape_of(arguments["input"])
    walk.freeze_all(given[-2:], f"cut into windows by {node.name}")
    axis, size = given[-3], source[-3]
    if axis is None:
        return (*given[:-3], None, None)
    repeated = axis.take(np.repeat(np.arange(size), shape_of(node)[-2] // size))
    padding = arguments["padding"]
    if any(padding) if isinstance(padding, (tuple, list)) else padding:
        repeated = repeated.with_constant(only_zero(repeated.constant))
    return (*given[:-3], repeated, None)


@transfer("fold")
def _fold(walk: Walk, node: fx.Node) -> Any:
    """The places of a window become one channel: they live and die together."""
    given = walk.of(ops.arguments(node)["input"])
    walk.freeze(given[-1], f"windows that {node.name} puts together")
    axis = given[-2]
    if axis is None:
        return (*given[:-2], None, None, None)
    rows = axis.atoms.reshape(len(axis.atoms), shape_of(node)[-3], -1)
    walk.link(np.broadcast_to(rows[:, :, :1], rows.shape), rows)
    zero = (axis.constant.reshape(rows.shape[1], -1) == 0).all(axis=1)
    return (*given[:-2], Axis(rows[:, :, 0], np.where(zero, 0.0, np.nan)), None, None)


@transfer("glu")
def _glu(walk: Walk, node: fx.Node) -> Any:
    """a * sigmoid(b): equal positions of both halves live and die together."""
    arguments = ops.arguments(node)
    given = walk.of(arguments["input"])
    along = int(arguments["dim"]) % len(given)
    axis = given[along]
    if axis is None:
        return tuple(item and item.with_constant(only_zero(item.constant)) for item in given)
    half = len(axis) // 2
    first = axis.take(slice(0, half))
    walk.link(first.atoms, axis.take(slice(half, None)).atoms)
    others = tuple(item and item.with_constant(only_zero(item.constant)) for item in given)
    return keep(others, along, first.with_constant(only_zero(first.constant)))


@transfer("triu", "tril")
def _triangle(walk: Walk, node: fx.Node) -> Axes:
    given = walk.of(node.all_input_nodes[0])
    walk.freeze_all(given[-2:], f"a triangle of it is kept in {node.name}")
    return (*(axis and axis.with_constant(only_zero(axis.constant)) for axis in given[:-2]), None, None)


@transfer("grid_sample")
def _grid_sample(walk: Walk, node: fx.Node) -> Any:
    """Positions are resampled; channels pass."""
    arguments = ops.arguments(node)
    given = walk.of(arguments["input"])
    walk.freeze_all((walk.of(arguments["grid"]), given[2:]), f"positions that {node.name} samples")
    batch, channel = (axis and axis.with_constant(only_zero(axis.constant)) for axis in given[:2])
    return (batch, channel, *[None] * (len(given) - 2))


@transfer("pixel_unshuffle")
def _pixel_unshuffle(walk: Walk, node: fx.Node) -> Axes:
    arguments = ops.arguments(node)
    given = walk.of(arguments["input"])
    channel, block = len(given) - 3, int(arguments["downscale_factor"]) ** 2
    axis = given[channel]
    repeated = axis and axis.take(np.repeat(np.arange(len(axis)), block))
    return (*given[:channel], repeated, None, None)


# -- pooling, resizing, padding -------------------------------------------------------------------------------------


@transfer("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "interpolate")
def _pool(walk: Walk, node: fx.Node) -> Any:
    arguments = ops.arguments(node)
    source = node.all_input_nodes[0]
    value = info(node).value
    given = walk.of(source)
    if not isinstance(value, TensorInfo):
        return freeze_node(walk, node)
    spatial = len(given) - 2 if ops.kind(node) == "interpolate" else _spatial(node)
    walk.freeze_all(given[len(given) - spatial :], f"pooled or resized in {node.name}")
    kept: list[Axis | None] = list(given[: len(given) - spatial])
    if ops.kind(node) == "avg_pool" and not _averages_constants(arguments):
        kept = [axis and axis.with_constant(only_zero(axis.constant)) for axis in kept]
    return (*kept, *[None] * spatial)


def _spatial(node: fx.Node) -> int:
    return int(str(getattr(node.target, "__name__", "2d"))[-2]) if "d" in str(node.target) else 2


def _averages_constants(arguments: dict[str, Any]) -> bool:
    """Whether the average of a constant is that constant: no zeros are padded in, and it is divided by their count."""
    padding = arguments["padding"]
    padded = any(padding) if isinstance(padding, (tuple, list)) else padding != 0
    return arguments.get("divisor_override") is None and not (padded and arguments["count_include_pad"])


def only_zero(constant: Floats) -> Floats:
    """Return the constants that are zero; the others are not known any more."""
    return np.where(constant == 0, 0.0, np.nan)


@transfer("pad")
def _pad(walk: Walk, node: fx.Node) -> Any:
    """Padded spatial positions hold the padding's value. Padded channels are new, constant channels."""
    arguments = ops.arguments(node)
    given = walk.of(arguments["input"])
    amounts, mode = arguments["pad"], arguments["mode"]
    if not isinstance(amounts, (tuple, list)):
        return freeze_node(walk, node)
    value = float(arguments["value"] or 0.0)
    pairs: list[tuple[Any, Any]] = [(0, 0)] * (len(given) - len(amounts) // 2) + [
        (amounts[i], amounts[i + 1]) for i in range(len(amounts) - 2, -1, -2)
    ]
    spread = mode == "constant" and any(pair != (0, 0) for pair in pairs)
    found: list[Axis | None] = []
    for position, (axis, pair) in enumerate(zip(given, pairs, strict=True)):
        if axis is None or pair == (0, 0):
            others = spread and any(p != (0, 0) for i, p in enumerate(pairs) if i != position)
            if axis is not None and others:
                axis = axis.with_constant(np.where(axis.constant == value, value, np.nan))
            found.append(axis)
        elif mode != "constant" or any(isinstance(amount, fx.Node) or amount < 0 for amount in pair):
            walk.freeze(axis, f"padded by copies, cropped, or padded by an amount known at run time in {node.name}")
            found.append(None)
        else:
            found.append(_join(walk, [_new_channels(walk, pair[0], value), axis, _new_channels(walk, pair[1], value)],
                               [pair[0], len(axis), pair[1]], ""))  # fmt: skip
    return tuple(found)


def _new_channels(walk: Walk, count: int, value: float) -> Axis:
    return walk.fresh(count, np.full(count, value))


# -- reductions -----------------------------------------------------------------------------------------------------


@transfer(
    "mean", "sum", "amax", "amin", "max", "min", "prod", "logsumexp", "var", "std", "softmax", "log_softmax",
    "normalize", "norm", "argmax", "cumsum",
)  # fmt: skip
def _reduce(walk: Walk, node: fx.Node) -> Any:
    """Channels that are reduced over stay, except that zeros can leave a sum or a norm; the others pass."""
    arguments = ops.arguments(node)
    source = node.all_input_nodes[0]
    given, kind = walk.of(source), ops.kind(node)
    dim = arguments.get("dim")
    dims = range(len(given)) if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,)
    reduced = {int(dimension) % len(given) for dimension in dims}
    for dimension in reduced:
        axis = given[dimension]
        if axis is not None and _ignores_zeros(kind, arguments, len(reduced)):
            read(walk, node, axis, axis.constant == 0, f"a channel that is not zero is summed up in {node.name}")
        else:
            walk.freeze(axis, f"{kind} over the channels ({node.name})")
    if kind == "normalize" and _ignores_zeros(kind, arguments, len(reduced)):
        return tuple(axis and axis.with_constant(only_zero(axis.constant)) for axis in given)
    if kind in ("softmax", "log_softmax", "normalize", "cumsum"):
        return tuple(None if i in reduced else axis and axis.varying() for i, axis in enumerate(given))
    keeps = (lambda c: c) if kind in ("mean", "amax", "amin", "max", "min") else only_zero
    keeps = (lambda c: c * np.nan) if kind == "logsumexp" else keeps
    found: list[Axis | None] = []
    for dimension, axis in enumerate(given):
        if dimension not in reduced:
            found.append(axis and axis.with_constant(keeps(axis.constant)))
        elif arguments.get("keepdim"):
            found.append(None)
    if isinstance(info(node).value, tuple):  # values, and where they stood
        return (tuple(found), tuple(axis and axis.varying() for axis in found))
    return tuple(found)


def _ignores_zeros(kind: str, arguments: dict[str, Any], dimensions: int) -> bool:
    """Whether zeros do not count in a reduction. (In a mean they do, but their number can be written down.)"""
    power = arguments.get("ord", arguments.get("p"))
    if kind in ("norm", "normalize"):
        return isinstance(power, (int, float)) and power > 0
    return kind == "sum" or (kind == "mean" and dimensions == 1)
