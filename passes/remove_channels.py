"""RemoveChannels: take out every channel that is dead, whoever masked it, without changing the function."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx, nn

from fxcompress.analysis.channels import Axis, ParameterAxis, analyse
from fxcompress.analysis.grouping import Booleans
from fxcompress.analysis.plans import ChannelPlan, removable
from fxcompress.analysis.products import reduces_one_dimension, scaled
from fxcompress.analysis.transfer import RESIZE, with_numbers
from fxcompress.errors import FxCompressError, UnsupportedError
from fxcompress.graph import edit, opaque, ops
from fxcompress.graph.metadata import TensorInfo, graph_info, info, set_info
from fxcompress.graph.modules import PartialGroupNorm, PartialLayerNorm, PartialRMSNorm
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult


@dataclass(frozen=True)
class RemoveChannels(Pass):
    """Remove dead channels exactly.

    A channel is dead when every place that reads it would not notice its absence:

    1. It carries zero, or the weights that read it are zero: removed.
    2. It carries another constant c (BN's beta, a bias, sigmoid(0)) and is read by a linear layer, or by a convolution
       without zero padding: the bias becomes b + W c, then it is removed.
    3. It carries a constant and is read by a LayerNorm, or a GroupNorm with one group: removed, and the layer remembers
       what it contributed to the statistics (`PartialLayerNorm`, `PartialGroupNorm`).
    4. Anything else stays, with the reason in the ledger: a constant read by a padded convolution, an output of the
       model, an operator that is not understood.

    All sizes written in the graph (`view`, `split`, `pad`, slices, ...) and in the layers (`groups`, `num_groups`, ...)
    are rewritten. Repeated until nothing is dead, since removing rows can leave columns without use.
    """

    name: ClassVar[str] = "remove-channels"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Analyse, remove, and look again."""
        before = _shapes(graph_module)
        edits = 0
        while True:
            plan = removable(graph_module, analyse(graph_module, constants=True))
            if not plan.dead.any():
                break
            edits += int(plan.dead.sum())
            _apply(graph_module, plan)
            try:
                opaque.propagate(graph_module, context.example_inputs)
            except FxCompressError as error:
                raise UnsupportedError(f"a size written in the graph cannot follow the removal: {error}") from error
            _check_shapes(graph_module, plan)
        return PassResult(graph_module, edits > 0, edits, tuple(_ledger(graph_module, plan, before)))


def _shapes(graph_module: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that the graph reads, by path: those inside regions are left to these."""
    regions = tuple(f"{path}." for path in graph_info(graph_module).regions)
    return {
        path: tuple(tensor.shape)
        for path, tensor in graph_module.named_parameters(remove_duplicate=False)
        if not path.startswith(regions)
    }


def _ledger(graph_module: fx.GraphModule, plan: ChannelPlan, before: dict[str, tuple[int, ...]]) -> Iterator[Note]:
    """What happened to every layer with parameters, and to every parameter that is read without a layer, and why."""
    layers = {str(node.target): node for node in graph_module.graph.nodes if node.op == "call_module"}
    after = _shapes(graph_module)
    axes: dict[str, list[ParameterAxis]] = defaultdict(list)
    for parameter in plan.analysis.parameters:
        for path in parameter.paths:
            axes[path].append(parameter)
    said: set[str] = set()
    for path, old in before.items():
        name = _named(path, layers)
        if name in said or path not in after:
            continue
        said.add(name)
        node = layers.get(name)
        width = _width_dimension(node)
        changed = [i for i, (was, now) in enumerate(zip(old, after[path], strict=True)) if was != now]
        made = width if width is not None else next(iter(changed), None)
        if made is not None and old[made] != after[path][made]:
            factor = _module(node).groups if node is not None and ops.kind(node) == "conv_transpose" else 1
            yield Note(name, f"pruned {old[made] * factor} -> {after[path][made] * factor}")
        else:
            yield Note(name, f"not pruned: {_why_not(node, axes[path], plan)}")


def _named(path: str, layers: dict[str, fx.Node]) -> str:
    """The layer that a parameter belongs to, or the parameter itself if it is read without one."""
    parts = path.split(".")
    return next((name for name in (".".join(parts[:i]) for i in range(1, len(parts))) if name in layers), path)


def _width_dimension(node: fx.Node | None) -> int | None:
    """The dimension of a weight along which a layer makes its channels."""
    kind = ops.kind(node) if node is not None else ""
    return {"conv": 0, "linear": 0, "conv_transpose": 1, "embedding": 1}.get(kind)


def _why_not(node: fx.Node | None, parameters: list[ParameterAxis], plan: ChannelPlan) -> str:
    untraced = info(node).opaque if node is not None else None
    if untraced is not None:
        return f"opaque: could not be traced ({untraced.reason})"
    for parameter in sorted(parameters, key=lambda one: not one.producer):
        return plan.why(parameter.axis).replace("no channel was chosen", "no channel is dead")
    return "its channels are fixed"


def _apply(graph_module: fx.GraphModule, plan: ChannelPlan) -> None:
    _pin_sizes(plan)
    _fold_constants(graph_module, plan)
    _slice_parameters(graph_module, plan)
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            _update_layer(ops.submodule(node), node, plan)
    for node in list(graph_module.graph.nodes):
        rewrite = SIZES.get(ops.kind(node))
        if rewrite is not None:
            rewrite(node, plan)
    graph_module.recompile()


# -- constants ------------------------------------------------------------------------------------------------------


def _fold_constants(graph_module: fx.GraphModule, plan: ChannelPlan) -> None:
    """Move what removed channels contribute into the biases and statistics of their readers."""
    for read in plan.analysis.reads:
        removed = ~plan.alive(read.axis)
        constant = np.where(removed, read.axis.constant, 0.0)
        if not removed.any():
            continue
        module = ops.submodule(read.node)
        if ops.kind(read.node) == "layer_norm":
            _shrink_layer_norm(graph_module, read.node, removed, constant)
        elif ops.kind(read.node) == "rms_norm":
            _shrink_rms_norm(graph_module, read.node, int((~removed).sum()))
        elif ops.kind(read.node) == "group_norm":
            _shrink_group_norm(graph_module, read.node, removed, constant)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)) and np.nansum(np.abs(constant)) > 0:
            _fold_into_bias(module, np.nan_to_num(constant))


def _fold_into_bias(module: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear, constant: np.ndarray[Any, Any]) -> None:
    weight = module.weight.detach().double()
    columns = torch.from_numpy(constant).to(weight.device)
    if getattr(module, "groups", 1) != 1:
        return  # a grouped convolution loses only channels that are zero
    shift = torch.einsum("oi...,i->o...", weight, columns).flatten(1).sum(1) if weight.ndim > 2 else weight @ columns
    old = module.bias.detach().double() if module.bias is not None else torch.zeros_like(shift)
    trainable = module.bias.requires_grad if module.bias is not None else module.weight.requires_grad
    module.bias = nn.Parameter((old + shift).to(module.weight.dtype), requires_grad=trainable)


def _shrink_layer_norm(
    graph_module: fx.GraphModule, node: fx.Node, removed: Booleans, constant: np.ndarray[Any, Any]
) -> None:
    """Let a LayerNorm remember the removed entries; its weight and bias are sliced with all other parameters."""
    old: Any = ops.submodule(node)
    width = old.width if isinstance(old, PartialLayerNorm) else int(old.normalized_shape[0])
    stored = int((~removed).sum())
    new = PartialLayerNorm(stored, width, old.eps, affine=False)
    _remember_constants(new, old, info(node).value.dtype, constant)
    edit.add_module(graph_module, str(node.target), new)


def _shrink_group_norm(
    graph_module: fx.GraphModule, node: fx.Node, removed: Booleans, constant: np.ndarray[Any, Any]
) -> None:
    """The same for a GroupNorm of one group; where there are more, whole groups have gone."""
    old: Any = ops.submodule(node)
    width = old.width if isinstance(old, PartialGroupNorm) else int(old.num_channels)
    new = PartialGroupNorm(int((~removed).sum()), width, old.eps, affine=False)
    _remember_constants(new, old, info(node).value.dtype, constant)
    edit.add_module(graph_module, str(node.target), new)


def _remember_constants(
    new: PartialLayerNorm | PartialGroupNorm, old: Any, dtype: torch.dtype, constant: np.ndarray[Any, Any]
) -> None:
    new.weight, new.bias = old.weight, old.bias
    reference = old.weight if old.weight is not None else torch.zeros((), dtype=dtype)
    for name, power in (("missing_sum", 1), ("missing_square", 2)):
        known = getattr(old, name, torch.zeros(())).double().item()
        value = torch.tensor(known + float((constant**power).sum()), dtype=reference.dtype, device=reference.device)
        setattr(new, name, value)
    new.training = old.training


def _shrink_rms_norm(graph_module: fx.GraphModule, node: fx.Node, stored: int) -> None:
    """Let an RMSNorm remember how many entries there were; its weight is sliced with all other parameters."""
    old: Any = ops.submodule(node)
    width = old.width if isinstance(old, PartialRMSNorm) else int(old.normalized_shape[0])
    new = PartialRMSNorm(stored, width, old.eps, affine=False)
    new.weight = old.weight
    new.training = old.training
    edit.add_module(graph_module, str(node.target), new)


# -- parameters and layers ------------------------------------------------------------------------------------------


def _slice_parameters(graph_module: fx.GraphModule, plan: ChannelPlan) -> None:
    masks = graph_info(graph_module).masks
    by_tensor: dict[tuple[str, ...], list[ParameterAxis]] = defaultdict(list)
    for parameter in (*plan.analysis.parameters, *plan.analysis.divisors, *_new_biases(graph_module, plan)):
        by_tensor[parameter.paths].append(parameter)
    for paths, parameters in by_tensor.items():
        tensor = edit.attribute(graph_module, paths[0]).detach()
        known = masks.get(paths[0])
        sliced = False
        for parameter in parameters:
            alive = plan.alive(parameter.axis)
            if alive.all():
                continue
            indices = torch.from_numpy(alive.nonzero()[0])
            tensor = tensor.index_select(parameter.dimension, indices.to(tensor.device))
            known = None if known is None else known.index_select(parameter.dimension, indices.to(known.device))
            sliced = True
        if sliced:
            edit.set_tied(graph_module, list(paths), tensor.contiguous())
            if known is not None:
                masks.update(dict.fromkeys(paths, known))


def _new_biases(graph_module: fx.GraphModule, plan: ChannelPlan) -> list[ParameterAxis]:
    """Biases that folding has made since the analysis."""
    known = {path for parameter in plan.analysis.parameters for path in parameter.paths}
    found = []
    for node in graph_module.graph.nodes:
        path = f"{node.target}.bias"
        if ops.kind(node) in ("conv", "linear") and path not in known and _module(node).bias is not None:
            axis = plan.analysis.axes[node][_channel(node)]
            if axis is not None:
                found.append(ParameterAxis((path,), 0, axis, False))
    return list({parameter.paths: parameter for parameter in found}.values())


def _module(node: fx.Node) -> Any:
    return ops.submodule(node)


def _channel(node: fx.Node) -> int:
    """Which dimension of a layer's output holds the channels."""
    weight: torch.Tensor = _module(node).weight
    return len(info(node).value.shape) - 1 - (weight.ndim - 2)


def _update_layer(module: Any, node: fx.Node, plan: ChannelPlan) -> None:
    """Bring the sizes that a layer states in line with its parameters."""
    kind = ops.kind(node)
    if kind == "conv":
        depthwise = module.groups > 1 and module.in_channels == module.groups
        module.out_channels = module.weight.shape[0]
        module.groups = _input_width(node, plan) if depthwise else module.groups
        module.in_channels = module.weight.shape[1] * module.groups
    elif kind == "conv_transpose":
        depthwise = module.groups > 1 and module.in_channels == module.groups
        module.in_channels = module.weight.shape[0]
        module.groups = module.in_channels if depthwise else module.groups
        module.out_channels = module.weight.shape[1] * module.groups
    elif kind == "linear":
        module.out_features, module.in_features = module.weight.shape
    elif kind == "embedding":
        module.embedding_dim = module.weight.shape[1]
    elif kind in ("batch_norm", "instance_norm"):
        module.num_features = _input_width(node, plan)
    elif kind == "group_norm" and isinstance(module, nn.GroupNorm):
        width = _input_width(node, plan)
        if module.num_channels != width:
            per_group = module.num_channels // module.num_groups
            module.num_channels, module.num_groups = width, width // per_group
    elif kind in ("lstm", "gru", "rnn"):
        module.hidden_size = module.weight_hh_l0.shape[1]
        module.input_size = module.weight_ih_l0.shape[1]
    elif kind == "prelu" and module.num_parameters > 1:
        module.num_parameters = module.weight.shape[0]
    elif type(module) in RESIZE:
        RESIZE[type(module)](module)


def _input_width(node: fx.Node, plan: ChannelPlan) -> int:
    """Number of channels that a layer's input has after removal."""
    source = node.all_input_nodes[0]
    shape = info(source).value.shape
    weight = getattr(ops.submodule(node), "weight", None)
    spatial = weight.ndim - 2 if weight is not None and weight.ndim > 2 else None
    channel = len(shape) - 1 - spatial if spatial is not None else min(1, len(shape) - 1)
    return new_shape(source, plan)[channel]


# -- sizes written in the graph -------------------------------------------------------------------------------------


def new_shape(node: fx.Node, plan: ChannelPlan) -> tuple[int, ...]:
    """Return the shape that a tensor node will have after the removal."""
    return _alive_shape(info(node).value.shape, plan.analysis.axes.get(node), plan)


def _alive_shape(shape: tuple[int, ...], axes: Any, plan: ChannelPlan) -> tuple[int, ...]:
    if not isinstance(axes, tuple) or len(axes) != len(shape):
        return tuple(shape)
    return tuple(size if axis is None else int(plan.alive(axis).sum()) for size, axis in zip(shape, axes, strict=True))


def _check_shapes(graph_module: fx.GraphModule, plan: ChannelPlan) -> None:
    """Compare the shapes that the graph has now with those that the plan foresaw."""
    for node, (old, axes) in plan_shapes(plan).items():
        value = info(node).value
        if isinstance(value, TensorInfo) and value.shape != _alive_shape(old, axes, plan):
            raise UnsupportedError(
                f"a size in the graph did not follow the removal: {node.name!r} has shape {value.shape} "
                f"instead of {_alive_shape(old, axes, plan)}; keep its channels with ignore="
            )


def plan_shapes(plan: ChannelPlan) -> dict[fx.Node, tuple[tuple[int, ...], Any]]:
    """Return the shape before the removal, and the axes, of every tensor node."""
    found: dict[fx.Node, tuple[tuple[int, ...], Any]] = {}
    for node, axes in plan.analysis.axes.items():
        if isinstance(info(node).value, TensorInfo) and isinstance(axes, tuple) and any(axes):
            sizes = tuple(
                len(axis) if axis is not None else size for axis, size in zip(axes, info(node).value.shape, strict=True)
            )
            found[node] = (sizes, axes)
    return found


def _set_sizes(
    node: fx.Node, sizes: Any, old: tuple[int, ...], new: tuple[int, ...], plan: ChannelPlan, first: int = 0
) -> Any:
    """Replace the written sizes of dimensions from `first` that change; -1 and sizes that inputs change stay."""
    if not isinstance(sizes, (tuple, list)):
        return sizes
    found = []
    for dimension, (size, before, after) in enumerate(zip(sizes, old, new, strict=True), start=first):
        changed = isinstance(size, int) and size != -1 and before != after
        found.append(after if changed or (node, dimension) in plan.analysis.written else size)
    return tuple(found)


def _reshape(node: fx.Node, plan: ChannelPlan) -> None:
    sizes = _set_sizes(node, node.args[1], info(node).value.shape, new_shape(node, plan), plan)
    node.args = (node.args[0], sizes)


def _unflatten(node: fx.Node, plan: ChannelPlan) -> None:
    arguments = ops.arguments(node)
    source, dim, sizes = (arguments[name] for name in ("input", "dim", "sizes"))
    start = int(dim) % len(info(source).value.shape)
    stop = start + len(sizes)
    old, new = info(node).value.shape[start:stop], new_shape(node, plan)[start:stop]
    node.args = (source, dim, _set_sizes(node, sizes, old, new, plan, start))


def _expand(node: fx.Node, plan: ChannelPlan) -> None:
    sizes = _set_sizes(node, node.args[1:], info(node).value.shape, new_shape(node, plan), plan)
    node.args = (node.args[0], *sizes)


def _split(node: fx.Node, plan: ChannelPlan) -> None:
    """Sizes of the pieces are written out where they are no longer those of an even split."""
    arguments = ops.arguments(node)
    source = node.all_input_nodes[0]
    along = int(arguments["dim"]) % len(info(source).value.shape)
    pieces = plan.analysis.axes[node]
    old = [value.shape[along] for value in info(node).value]
    new = [_alive_shape(v.shape, axes, plan)[along] for v, axes in zip(info(node).value, pieces, strict=True)]
    if old != new:
        node.target, node.args, node.kwargs = torch.split, (source, tuple(new)), {"dim": along} if along else {}


def _getitem(node: fx.Node, plan: ChannelPlan) -> None:
    """Bounds of slices become numbers of channels that survive before them."""
    source, index = node.args
    value = info(source).value if isinstance(source, fx.Node) else None
    if not isinstance(value, TensorInfo) or not isinstance(source, fx.Node):
        return
    items = ops.normalised_index(index, len(value.shape))
    if items is None:
        return
    position, changed = 0, False
    for place, item in enumerate(items):
        if item is None:
            continue
        axis: Axis | None = plan.analysis.axes[source][position] if plan.analysis.axes.get(source) else None
        position += 1
        if axis is None or not isinstance(item, slice) or item == slice(None):
            continue
        alive = plan.alive(axis)
        if alive.all():
            continue
        start, stop, _ = with_numbers(item, plan.analysis.sizes).indices(len(alive))
        items[place] = slice(int(alive[:start].sum()), int(alive[:stop].sum()))
        changed = True
    if changed:
        node.args = (source, tuple(items))


def _pad(node: fx.Node, plan: ChannelPlan) -> None:
    """Padded channels that are removed are not padded any more."""
    arguments = ops.arguments(node)
    axes, amounts = plan.analysis.axes[node], list(arguments["pad"])
    for place in range(0, len(amounts), 2):
        axis = axes[len(axes) - 1 - place // 2]
        low, high = amounts[place : place + 2]
        if axis is not None and not isinstance(low, fx.Node) and not isinstance(high, fx.Node) and (low or high):
            alive = plan.alive(axis)
            amounts[place : place + 2] = [int(alive[:low].sum()), int(alive[len(alive) - high :].sum())]
    if amounts != list(arguments["pad"]):
        node.args = (node.args[0], tuple(amounts))


def _mean(node: fx.Node, plan: ChannelPlan) -> None:
    """The mean over a dimension that lost zeros becomes their sum, divided by the old number."""
    dimension = reduces_one_dimension(node)
    source = node.all_input_nodes[0]
    axis = plan.analysis.axes[source][dimension] if dimension is not None and plan.analysis.axes.get(source) else None
    if axis is None or plan.alive(axis).all():
        return
    node.target = torch.sum
    with node.graph.inserting_after(node):
        divided = node.graph.call_function(operator.truediv, (node, len(axis)))
    node.replace_all_uses_with(divided, delete_user_cb=lambda user: user is not divided)
    set_info(divided, layer=info(node).layer, value=info(node).value)


def _attention(node: fx.Node, plan: ChannelPlan) -> None:
    """The default scale is that of the width which the heads had."""
    query: Any = node.args[0]
    if new_shape(query, plan)[-1] != info(query).value.shape[-1]:
        node.kwargs = {**node.kwargs, "scale": scaled(node)}


def _conv_function(node: fx.Node, plan: ChannelPlan) -> None:
    """A depthwise convolution has as many groups as channels."""
    arguments = ops.arguments(node)
    shape = info(arguments["weight"]).value.shape
    if shape[1] == 1 and shape[0] == arguments["groups"] != 1:
        node.kwargs = {**node.kwargs, "groups": new_shape(arguments["weight"], plan)[0]}


def _pin_sizes(plan: ChannelPlan) -> None:
    """Numbers computed from channel sizes keep their value (a scale, say), except where they state a shape."""
    for node in plan.analysis.sizes:
        number = info(node).value

        def pinned(argument: Any, node: fx.Node = node, number: Any = number) -> Any:
            return number if argument is node else argument

        for user in list(node.users):
            if ops.kind(user) not in _STATE_SHAPES and not isinstance(info(user).value, (int, float)):
                user.args = fx.node.map_aggregate(user.args, pinned)
                user.kwargs = fx.node.map_aggregate(user.kwargs, pinned)


#: Kinds whose sizes the analysis has looked at one by one.
_STATE_SHAPES = frozenset({"reshape", "expand", "unflatten"})


#: Kinds of nodes that have sizes written in their arguments, and how those are rewritten.
SIZES: dict[str, Callable[[fx.Node, ChannelPlan], None]] = {
    "reshape": _reshape,
    "unflatten": _unflatten,
    "expand": _expand,
    "split": _split,
    "chunk": _split,
    "tensor_split": _split,
    "getitem": _getitem,
    "pad": _pad,
    "mean": _mean,
    "attention": _attention,
    "conv_function": _conv_function,
}
