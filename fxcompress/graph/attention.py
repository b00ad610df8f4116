"""`nn.MultiheadAttention` taken apart into projections, heads and a product, which channel rules and kernels know."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import TensorInfo, graph_info, info, set_info

_SIGNATURE = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights",
              "is_causal")  # fmt: skip
_DEFAULTS = {"key_padding_mask": None, "need_weights": True, "attn_mask": None, "average_attn_weights": True,
             "is_causal": False}  # fmt: skip


def take_apart(graph_module: fx.GraphModule) -> int:
    """Replace every call of `nn.MultiheadAttention` that can be by what it computes. Returns how many were replaced.

    Left whole: modules with `bias_k` or `add_zero_attn`, calls without a batch dimension, and masks of mixed dtypes.
    """
    calls = [node for node in graph_module.graph.nodes if type(ops.submodule(node)) is nn.MultiheadAttention]
    taken = [node for node in calls if _Call(graph_module, node).is_plain()]
    whole = {str(node.target) for node in calls} - {str(node.target) for node in taken}
    taken = [node for node in taken if str(node.target) not in whole]
    layers: dict[str, _Layers] = {}
    for node in taken:
        path = str(node.target)
        together = all(_is_self_attention(other) for other in taken if other.target == node.target)
        if path not in layers:
            layers[path] = _Layers(graph_module, path, together)
        _Call(graph_module, node).replace(layers[path])
    return len(taken)


def _arguments(node: fx.Node) -> dict[str, Any]:
    return {**_DEFAULTS, **dict(zip(_SIGNATURE, node.args, strict=False)), **node.kwargs}


def _is_self_attention(node: fx.Node) -> bool:
    given = _arguments(node)
    return given["query"] is given["key"] and given["key"] is given["value"]


class _Layers:
    """The linear layers of one attention module, put in its place."""

    def __init__(self, graph_module: fx.GraphModule, path: str, together: bool) -> None:
        old: Any = graph_module.get_submodule(path)
        self.path, self.together = path, together and old._qkv_same_embed_dim
        self.heads, self.head_width = int(old.num_heads), int(old.head_dim)
        self.width, self.dropout, self.batch_first = int(old.embed_dim), float(old.dropout), bool(old.batch_first)
        masks = graph_info(graph_module).masks
        packed = masks.pop(f"{path}.in_proj_weight", None)
        edit.add_module(graph_module, path, nn.Module())
        names = ("in_proj",) if self.together else ("q_proj", "k_proj", "v_proj")
        for position, name in enumerate(names):
            rows = slice(None) if self.together else slice(position * self.width, (position + 1) * self.width)
            if old._qkv_same_embed_dim:
                weight = old.in_proj_weight[rows]
            else:
                weight = (old.q_proj_weight, old.k_proj_weight, old.v_proj_weight)[position]
            bias = None if old.in_proj_bias is None else old.in_proj_bias[rows]
            edit.add_module(graph_module, f"{path}.{name}", _linear(weight, bias, old))
            given = packed[rows] if packed is not None else masks.pop(f"{path}.{name}_weight", None)
            if given is not None:
                masks[f"{path}.{name}.weight"] = given
        edit.add_module(graph_module, f"{path}.out_proj", old.out_proj)
        if self.dropout:
            edit.add_module(graph_module, f"{path}.dropout", nn.Dropout(self.dropout).train(old.training))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, old: Any) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    trainable = bool(old.out_proj.weight.requires_grad)
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=trainable)
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), trainable))
    return made.train(old.training)


class _Call:
    """One call of an attention module."""

    def __init__(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        self.graph_module, self.graph, self.node = graph_module, graph_module.graph, node
        self.given = _arguments(node)
        self.results = list(node.users)
        self.reads_weights = any(
            user.users and user.args[1] == 1 for user in self.results if ops.kind(user) == "getitem"
        )

    def is_plain(self) -> bool:
        """Whether the call can be taken apart."""
        module: Any = ops.submodule(self.node)
        if module.bias_k is not None or module.add_zero_attn or not self.results:
            return False
        if any(ops.kind(user) != "getitem" or user.args[1] not in (0, 1) for user in self.results):
            return False
        values = [_tensor(self.given[name]) for name in ("query", "key", "value")]
        masks = [self.given[name] for name in ("attn_mask", "key_padding_mask") if self.given[name] is not None]
        dtypes = {found.dtype if (found := _tensor(mask)) is not None else None for mask in masks}
        weights_unread = not self.reads_weights or self.given["need_weights"]
        return all(v is not None and len(v.shape) == 3 for v in values) and len(dtypes) <= 1 and None not in dtypes \
            and weights_unread  # fmt: skip

    def replace(self, layers: _Layers) -> None:
        """Insert what the call computes in front of it, and let its readers read that."""
        self.layers = layers
        with self.graph.inserting_before(self.node):
            query, key, value = (self._split_heads(projected) for projected in self._project())
            mask = self._mask(query)
            if self.reads_weights or layers.dropout:
                made, weights = self._explicit(query, key, value, mask)
            else:
                options = {} if mask is None else {"attn_mask": mask}
                made, weights = self._call(F.scaled_dot_product_attention, query, key, value, **options), None
            made = self._call(torch.flatten, self._call(torch.transpose, made, 1, 2), 2)
            result = self._layer("out_proj", made)
            if not layers.batch_first:
                result = self._call(torch.transpose, result, 0, 1)
        for user in self.results:
            replacement = result if user.args[1] == 0 else weights
            if replacement is not None:
                user.replace_all_uses_with(replacement)
            self.graph.erase_node(user)
        self.graph.erase_node(self.node)

    def _project(self) -> list[fx.Node]:
        names = ("query", "key", "value")
        sources: dict[fx.Node, fx.Node] = {}
        for name in names:
            node = self.given[name]
            if node not in sources:
                sources[node] = node if self.layers.batch_first else self._call(torch.transpose, node, 0, 1)
        self.batch = self._method("size", sources[self.given["query"]], 0)
        if self.layers.together:
            pieces = self._call(torch.chunk, self._layer("in_proj", sources[self.given["query"]]), 3, dim=-1)
            return [self._call(operator.getitem, pieces, position) for position in range(3)]
        return [self._layer(f"{name[0]}_proj", sources[self.given[name]]) for name in names]

    def _split_heads(self, projected: fx.Node) -> fx.Node:
        shape = (self.batch, -1, self.layers.heads, self.layers.head_width)
        return self._call(torch.transpose, self._call(torch.reshape, projected, shape), 1, 2)

    def _mask(self, query: fx.Node) -> fx.Node | None:
        """What attention takes as mask: numbers to add, or True where it may look (a module's True means "not")."""
        parts = []
        mask, padding = self.given["attn_mask"], self.given["key_padding_mask"]
        if mask is not None:
            shape = info(mask).value.shape
            by_head = (self.batch, self.layers.heads, *shape[-2:])
            parts.append(self._call(torch.reshape, mask, by_head) if len(shape) == 3 else mask)
        if padding is not None:
            parts.append(self._call(torch.reshape, padding, (self.batch, 1, 1, -1)))
        if not parts:
            return None
        boolean = info(mask if mask is not None else padding).value.dtype == torch.bool
        parts = [self._call(torch.logical_not, part) for part in parts] if boolean else parts
        if len(parts) == 1:
            return parts[0]
        return self._call(torch.logical_and if boolean else operator.add, *parts)

    def _explicit(
        self, query: fx.Node, key: fx.Node, value: fx.Node, mask: fx.Node | None
    ) -> tuple[fx.Node, fx.Node | None]:
        """Scores, softmax and dropout one by one: where the weights are read, or dropped at random in training."""
        query = self._call(operator.mul, query, 1.0 / math.sqrt(self.layers.head_width))
        scores = self._call(torch.matmul, query, self._call(torch.transpose, key, 2, 3))
        if mask is not None:
            boolean = info(self.given["attn_mask"] or self.given["key_padding_mask"]).value.dtype == torch.bool
            if boolean:
                hidden = self._call(torch.logical_not, mask)
                scores = self._call(torch.masked_fill, scores, hidden, -math.inf)
            else:
                scores = self._call(operator.add, scores, mask)
        attention = self._call(F.softmax, scores, dim=-1)
        if self.layers.dropout:
            attention = self._layer("dropout", attention)
        weights = None
        if self.reads_weights:
            weights = self._call(torch.mean, attention, dim=1) if self.given["average_attn_weights"] else attention
        return self._call(torch.matmul, attention, value), weights

    def _layer(self, name: str, source: fx.Node) -> fx.Node:
        path = f"{self.layers.path}.{name}"
        made = self.graph.call_module(path, (source,))
        set_info(made, layer=path)
        return made

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = self.graph.call_function(function, args, kwargs)
        set_info(made, layer=self.layers.path)
        return made

    def _method(self, name: str, *args: Any) -> fx.Node:
        made = self.graph.call_method(name, args)
        set_info(made, layer=self.layers.path)
        return made


def _tensor(node: Any) -> TensorInfo | None:
    value = info(node).value if isinstance(node, fx.Node) else None
    return value if isinstance(value, TensorInfo) else None
