"""What a node does besides computing its value: writing to memory in place, drawing random numbers, anything unknown.

Passes that move, merge or remove nodes ask here first. What the operator table does not know is taken for the worst.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx, nn

from fxcompress.graph import ops

_RANDOM_KINDS = frozenset({"dropout", "dropout_function", "rrelu"})
_STATISTICS_KINDS = frozenset({"batch_norm", "instance_norm"})
_RECURRENT_KINDS = frozenset({"lstm", "gru", "rnn", "multihead_attention"})
_PURE_NAMESPACES = ("torch", "_operator", "operator", "math", "builtins", "collections")


def writes(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the nodes whose memory `node` may write to in place."""
    if node.op == "call_function":
        return _function_writes(node)
    if node.op == "call_method":
        return _first(node) if _has_trailing_underscore(str(node.target)) else ()
    if node.op == "call_module":
        return _module_writes(node)
    return ()


def _function_writes(node: fx.Node) -> tuple[fx.Node, ...]:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return tuple(node.all_input_nodes) if target._schema.is_mutable else ()
    if isinstance(node.kwargs.get("out"), fx.Node):
        return (node.kwargs["out"],)  # type: ignore[return-value]
    if target is operator.setitem or target in ops.INPLACE_OPERATORS or node.kwargs.get("inplace") is True:
        return _first(node)
    if ops.kind(node) != "opaque":
        return ()
    if not _is_from_torch_or_python(target):
        return tuple(node.all_input_nodes)
    return _first(node) if _has_trailing_underscore(getattr(target, "__name__", "")) else ()


def _module_writes(node: fx.Node) -> tuple[fx.Node, ...]:
    module = ops.submodule(node)
    if ops.kind(node) == "opaque" and not _is_torch_layer(module):
        return tuple(node.all_input_nodes)
    inplace = getattr(module, "inplace", False) is True
    silent = ops.kind(node) == "dropout" and module is not None and not module.training
    return _first(node) if inplace and not silent else ()


def has_effects(node: fx.Node) -> bool:
    """Whether a node must stay although nothing reads it: it writes somewhere, or may do so."""
    if node.op in ("placeholder", "output") or writes(node):
        return True
    if node.op == "call_module":
        module = ops.submodule(node)
        if ops.kind(node) in _STATISTICS_KINDS:
            return module is not None and module.training
        if ops.kind(node) == "embedding":
            return getattr(module, "max_norm", None) is not None  # its forward rescales rows of the weight
        return ops.kind(node) == "opaque" and (not _is_torch_layer(module) or (module is not None and module.training))
    if ops.kind(node) == "embedding_function":
        return ops.arguments(node).get("max_norm") is not None
    if node.op == "call_function" and ops.kind(node) == "opaque":
        name = getattr(node.target, "__name__", "")
        return name.startswith("_assert") or not _is_from_torch_or_python(node.target)
    if node.op == "call_method" and ops.kind(node) == "opaque":
        return not hasattr(torch.Tensor, str(node.target))
    return False


def is_repeatable(node: fx.Node) -> bool:
    """Whether a second run of the node on the same values gives the same result, and nothing else happens."""
    if node.op == "get_attr":
        return True
    word = ops.kind(node)
    if word in ("opaque", "placeholder", "output") or word in _RANDOM_KINDS or has_effects(node):
        return False
    if word == "attention":
        return bool(ops.arguments(node)["dropout_p"] == 0.0)
    if word in _RECURRENT_KINDS:
        module = ops.submodule(node)
        return module is not None and not (module.training and bool(getattr(module, "dropout", False)))
    return True


def written(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return every node whose value may share memory with a tensor that is written to in place."""
    targets = [target for node in graph.nodes for target in writes(node)]
    if not targets:
        return frozenset()
    roots: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        sources = _may_share_with(node)
        roots[node] = frozenset().union(*(roots[source] for source in sources)) if sources else frozenset({node})
    dirty = frozenset().union(*(roots[target] for target in targets))
    return frozenset(node for node in graph.nodes if roots[node] & dirty)


def _may_share_with(node: fx.Node) -> Iterable[fx.Node]:
    """The nodes whose memory the value of a node may be."""
    if node.op in ("placeholder", "get_attr", "output"):
        return ()
    word = ops.kind(node)
    if word == "opaque":
        return node.all_input_nodes
    if word in ops.VIEW_KINDS or word == "dropout" or writes(node):
        return _first(node)
    return ()


def _first(node: fx.Node) -> tuple[fx.Node, ...]:
    first = node.args[0] if node.args else node.kwargs.get("input")
    return (first,) if isinstance(first, fx.Node) else tuple(node.all_input_nodes)


def _has_trailing_underscore(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _is_from_torch_or_python(target: object) -> bool:
    space = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    return space in _PURE_NAMESPACES


def _is_torch_layer(module: nn.Module | None) -> bool:
    return type(module).__module__.startswith("torch.nn.modules")
