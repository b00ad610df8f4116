"""Costs of a graph: parameters, multiply-accumulates and bytes, per layer and in total.

A MAC is one multiplication and one addition of a convolution, linear layer or matrix product, counted for the example
inputs divided by their batch size. Bias, normalisation and activation are not counted (the convention of fvcore and
Torch-Pruning).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import TensorInfo, graph_info, info
from fxcompress.graph.regions import regions


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer: parameters (elements), macs (per sample), bytes of parameters and buffers."""

    kind: str
    parameters: int = 0
    macs: int = 0
    bytes: int = 0
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Cost of a graph: parameters (elements; of integer weights too), macs (per sample), bytes, and by layer."""

    parameters: int
    macs: int
    bytes: int
    nodes: int
    layers: dict[str, LayerCost] = field(default_factory=dict)


def cost(graph_module: fx.GraphModule) -> Cost:
    """Return the cost of a graph whose shapes are known, and of the regions in it. A tensor used twice counts once."""
    parts = {"": own_cost(graph_module)}
    parts.update({region.layer: own_cost(region.graph_module) for region in regions(graph_module)})
    return together(parts)


def together(parts: Mapping[str, Cost]) -> Cost:
    """Return the cost of a whole from those of its parts, with a path to put before their layers."""
    layers = {
        f"{path}.{name}" if path else name: layer for path, part in parts.items() for name, layer in part.layers.items()
    }
    return Cost(
        sum(part.parameters for part in parts.values()),
        sum(part.macs for part in parts.values()),
        sum(part.bytes for part in parts.values()),
        sum(part.nodes for part in parts.values()),
        layers,
    )


def own_cost(graph_module: fx.GraphModule) -> Cost:
    """Return the cost of one graph, without the regions in it."""
    inside = [edit.attribute(graph_module, path) for path in graph_info(graph_module).regions]
    elsewhere = {id(tensor) for module in inside for tensor in (*module.parameters(), *module.buffers())}
    known = graph_info(graph_module).batch
    batch = _batch(graph_module.graph) if known is None else known
    layers: dict[str, LayerCost] = {}
    seen = set(elsewhere)
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        tensors = [tensor for tensor in _tensors(node, graph_module) if id(tensor) not in seen]
        seen.update(id(tensor) for tensor in tensors)
        name = layer_name(node)
        value = info(node).value
        own = LayerCost(
            ops.kind(node) if ops.kind(node) != "opaque" else _type_name(node),
            sum(t.numel() for t in tensors if _is_parameter(t)),
            macs(node) // batch,
            sum(t.numel() * t.element_size() for t in tensors),
            value.shape if isinstance(value, TensorInfo) else (),
        )
        layers[name] = _plus(layers[name], own) if name in layers else own
    return Cost(
        sum(layer.parameters for layer in layers.values()),
        sum(layer.macs for layer in layers.values()),
        sum(layer.bytes for layer in layers.values()),
        len(graph_module.graph.nodes),
        layers,
    )


def layer_name(node: fx.Node) -> str:
    """Return the name under which the report lists a node: the path of its layer, or the node's own name."""
    if node.op == "call_module":
        return str(node.target)
    if node.op == "get_attr":
        return str(node.target)
    return node.name


#: Attention as a function and as a module, in all stages of quantisation; query and key are the first arguments.
_ATTENTION = frozenset({"attention", "fake_quantize_attention", "ObservedAttention", "Int8Attention"})


def macs(node: fx.Node) -> int:
    """Return the multiply-accumulates of one node for the whole example batch."""
    value = info(node).value
    if not isinstance(value, TensorInfo):
        return 0
    kind = ops.kind(node)
    if kind in ("matmul", "bmm"):
        left = info(node.all_input_nodes[0]).value
        return math.prod(value.shape) * left.shape[-1] if isinstance(left, TensorInfo) else 0
    if kind in _ATTENTION or _type_name(node) in _ATTENTION:
        query, key = (info(one).value for one in node.args[:2] if isinstance(one, fx.Node))
        return int(math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1]))
    weight = _weight_shape(node)
    if weight is None:
        return 0
    if kind.startswith("conv_transpose"):
        source = info(node.all_input_nodes[0]).value
        return int(math.prod(weight) * math.prod(source.shape) // source.shape[1])
    if kind.startswith("linear") or len(weight) == 2:
        return math.prod(weight) * math.prod(value.shape[:-1])
    return math.prod(weight) * math.prod(value.shape) // value.shape[1]


def _weight_shape(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of the weight of a convolution or linear, as a module, a function or a kernel."""
    kind = ops.kind(node)
    if kind in ("linear_function", "conv_function", "conv_transpose_function"):
        weight = ops.arguments(node).get("weight")
        value = info(weight).value if isinstance(weight, fx.Node) else None
        return value.shape if isinstance(value, TensorInfo) else None
    module = ops.submodule(node)
    is_kernel = type(module).__module__.startswith("fxcompress.emit")
    held = getattr(module, "weight", None)
    if (kind in ops.ANCHOR_KINDS or is_kernel) and isinstance(held, torch.Tensor) and held.ndim >= 2:
        return tuple(held.shape)
    return None


def _tensors(node: fx.Node, graph_module: fx.GraphModule) -> list[torch.Tensor]:
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return [*module.parameters(), *module.buffers()]
    if node.op == "get_attr":
        found: object = graph_module
        for name in str(node.target).split("."):
            found = getattr(found, name)
        return [found] if isinstance(found, torch.Tensor) else []
    return []


def _is_parameter(tensor: torch.Tensor) -> bool:
    """Parameters, and the integer weights that stand for them in a lowered graph."""
    return isinstance(tensor, nn.Parameter) or tensor.dtype in (torch.int8, torch.uint8)


def _batch(graph: fx.Graph) -> int:
    for node in graph.nodes:
        value = info(node).value
        if node.op == "placeholder" and isinstance(value, TensorInfo) and value.shape:
            return max(value.shape[0], 1)
    return 1


def _type_name(node: fx.Node) -> str:
    module = ops.submodule(node)
    return type(module).__name__ if module is not None else str(getattr(node.target, "__name__", node.target))


def _plus(left: LayerCost, right: LayerCost) -> LayerCost:
    return LayerCost(
        left.kind, left.parameters + right.parameters, left.macs + right.macs, left.bytes + right.bytes, right.shape
    )
