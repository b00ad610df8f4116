"""FuseAttention: attention that is written out becomes one operation."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from fxcompress.graph import ops
from fxcompress.graph.metadata import Stage, TensorInfo, info, set_info
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult
from fxcompress.rewrite import effects
from fxcompress.rewrite.match import layer_of

_PRODUCTS = frozenset({"matmul", "bmm"})

#: Kinds that may stand between the scores and the softmax.
_BETWEEN = frozenset({"mul", "div", "add", "masked_fill", "reshape"})


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Write `softmax(query @ key^T * scale + mask) @ value` as `F.scaled_dot_product_attention`.

    One operation can have one kernel, which keeps the scores in the cache; 8-bit attention starts from it as well.

    1. Numbers that scores, queries or keys are multiplied with or divided by become `scale`.
    2. Tensors that are added become one mask; `masked_fill` with minus infinity becomes a mask of booleans.
    3. Where windows of an image have masks of their own, scores are (images x windows, heads, ...) for one addend and
       (images, windows, heads, ...) for another (Swin Transformer). Query, key and value get the second form then.
    4. Left as it is: weights that are read by something else as well, dropout on weights, a softmax along another
       dimension, operands that are broadcast to each other.
    """

    name: ClassVar[str] = "fuse-attention"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FLOAT})
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Look at every product with the result of a softmax."""
        written = effects.written(graph_module.graph)
        notes = []
        for node in list(graph_module.graph.nodes):
            found = _read(node) if ops.kind(node) in _PRODUCTS else None
            if found is not None and not written.intersection(found.inside):
                found.replace()
                notes.append(Note(layer_of(node), f"{node.name} computes attention in one operation"))
        if notes:
            graph_module.recompile()
        return PassResult(graph_module, bool(notes), len(notes), tuple(notes))


@dataclass
class _Attention:
    """Attention that was found.

    product: of the weights with the value. inside: all nodes that it replaces. masks: addends, or one boolean mask.
    windows: the node that gives scores another dimension, and the one that takes it away again.
    """

    product: fx.Node
    value: fx.Node
    query: fx.Node | None = None
    key: fx.Node | None = None
    transposed: bool = False  #: whether key is (..., length, features)
    scale: float = 1.0
    masks: list[fx.Node] = field(default_factory=list)
    windows: list[fx.Node] = field(default_factory=list)
    inside: list[fx.Node] = field(default_factory=list)

    def replace(self) -> None:
        """Put one operation in the place of all."""
        assert self.query is not None  # for the type checker
        assert self.key is not None
        query, key, value = self.query, self.key, self.value
        with self.product.graph.inserting_before(self.product):
            if not self.transposed:
                key = self._call(torch.transpose, key, -2, -1)
            if self.windows:
                *batch, heads, queries, keys = _sizes(self.windows[1])
                query, key, value = (
                    self._reshaped(one, (*batch, heads, length))
                    for one, length in ((query, queries), (key, keys), (value, keys))
                )
            options: dict[str, Any] = {"scale": self.scale}
            if self.masks:
                mask = self.masks[0]
                for other in self.masks[1:]:
                    mask = self._call(operator.add, mask, other)
                if _is_boolean(mask):
                    mask = self._call(torch.logical_not, mask)
                options = {"attn_mask": mask, **options}
            made = self._call(F.scaled_dot_product_attention, query, key, value, **options)
            if self.windows:
                made = self._reshaped(made, _sizes(self.windows[0])[:-1])
        self.product.replace_all_uses_with(made)
        for node in self.inside:
            if not node.users:
                node.graph.erase_node(node)

    def _reshaped(self, node: fx.Node, sizes: tuple[Any, ...]) -> fx.Node:
        """A tensor with these sizes in front of its features."""
        return self._call(torch.reshape, node, (*sizes, _features(self, node) if -1 in sizes else -1))

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = self.product.graph.call_function(function, args, kwargs)
        set_info(made, layer=info(self.product).layer)
        return made


def _features(found: _Attention, node: fx.Node) -> int:
    known = _tensor(node) or _tensor(found.value)  # the result has the features of the value
    assert known is not None  # for the type checker
    return int(known.shape[-1])


def _read(product: fx.Node) -> _Attention | None:
    """Return the attention that a product is the end of; None if it is none."""
    weights, value = _factors(product)
    known = _tensor(weights)
    if known is None or ops.kind(weights) != "softmax":
        return None
    given = ops.arguments(weights)
    if _tensor(value) is None or given["dim"] not in (-1, len(known.shape) - 1):
        return None
    if given["dtype"] not in (None, known.dtype) or len(weights.users) != 1:
        return None
    found = _Attention(product, value, inside=[product, weights])
    scores = given["input"]
    while isinstance(scores, fx.Node) and len(scores.users) == 1 and ops.kind(scores) in _BETWEEN:
        found.inside.append(scores)
        scores = _before(found, scores)
    if not isinstance(scores, fx.Node) or len(scores.users) != 1 or ops.kind(scores) not in _PRODUCTS:
        return None
    found.inside.append(scores)
    _read_operands(found, scores)
    return found if _fits(found, scores) else None


def _before(found: _Attention, node: fx.Node) -> fx.Node | None:
    """Take in what happens to the scores in a node, and return the scores before it; None if it does not belong."""
    kind, given = ops.kind(node), ops.arguments(node)
    if kind in ("mul", "div"):
        return _unscaled(found, node)
    if kind in ("add", "masked_fill") and found.scale != 1.0:
        return None  # the mask is multiplied as well
    if kind == "masked_fill":
        found.masks.append(given["mask"])
        fits = given["value"] == -math.inf and _shape(given["input"]) == _shape(node)
        return given["input"] if fits else None
    if kind == "reshape":
        found.windows.append(node)
        return given["input"]  # type: ignore[no-any-return]
    operands = [given["input"], given["other"]]
    scores = next((one for one in operands if isinstance(one, fx.Node) and _leads_to_product(one, node)), None)
    mask = operands[scores is operands[0]]
    known, sum_ = _tensor(mask), _tensor(node)
    if scores is None or known is None or sum_ is None or known.dtype != sum_.dtype or "alpha" in given:
        return None  # a mask of booleans that is added is none: it adds 1
    found.masks.append(mask)
    return scores


def _unscaled(found: _Attention, node: fx.Node) -> fx.Node | None:
    """Take a factor in, and return what it is for."""
    given = ops.arguments(node)
    factor, value = given["other"], given["input"]
    if ops.kind(node) == "mul" and isinstance(factor, fx.Node):
        factor, value = value, factor
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or given.get("rounding_mode"):
        return None
    if ops.kind(node) == "div" and not factor:
        return None
    found.scale *= factor if ops.kind(node) == "mul" else 1 / factor
    return value if isinstance(value, fx.Node) else None


def _leads_to_product(node: fx.Node, follower: fx.Node) -> bool:
    """Whether a node holds scores: a product of matrices behind what may stand in between, of the sum's own shape."""
    known, sum_ = _tensor(node), _tensor(follower)
    if known is None or sum_ is None or known.shape != sum_.shape:
        return False
    while ops.kind(node) in _BETWEEN and len(node.users) == 1:
        inputs = [one for one in node.all_input_nodes if (found := _tensor(one)) is not None and found.shape]
        node = max(inputs, key=lambda one: math.prod(_shape(one)))
    return ops.kind(node) in _PRODUCTS


def _factors(product: fx.Node) -> tuple[Any, Any]:
    given = ops.arguments(product)
    return given["input"], given.get("other", given.get("mat2"))


def _read_operands(found: _Attention, scores: fx.Node) -> None:
    """Find query and key, in front of factors and of a transposition."""
    query, key = _factors(scores)
    found.query = _without_factors(found, query)
    key = _without_factors(found, key)
    if _swaps_last(key):
        found.transposed = True
        found.inside.append(key)
        key = _without_factors(found, key.args[0])
    found.key = key


def _without_factors(found: _Attention, node: Any) -> Any:
    while isinstance(node, fx.Node) and ops.kind(node) in ("mul", "div") and len(node.users) == 1:
        before = _unscaled(found, node)
        if before is None:
            break
        found.inside.append(node)
        node = before
    return node


def _swaps_last(node: Any) -> bool:
    """Whether a node swaps the last two dimensions."""
    known = _tensor(node)
    if known is None:
        return False
    rank, given = len(known.shape), ops.arguments(node)
    if ops.kind(node) == "transpose":
        return {given["dim0"] % rank, given["dim1"] % rank} == {rank - 2, rank - 1}
    if ops.kind(node) == "permute":
        return [dim % rank for dim in given["dims"]] == [*range(rank - 2), rank - 1, rank - 2]
    return False


def _fits(found: _Attention, scores: fx.Node) -> bool:
    """Whether all parts have shapes that attention can have."""
    query, key, value = (_tensor(one) for one in (found.query, found.key, found.value))
    known = _tensor(scores)
    if query is None or key is None or value is None or known is None:
        return False
    rank = len(query.shape)
    if rank < 3 or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2] == known.shape[:-2]:
        return False
    kinds = [_is_boolean(mask) for mask in found.masks]
    if any(kinds) and len(kinds) > 1:
        return False
    if not found.windows:
        return all(len(_shape(mask)) <= rank for mask in found.masks)
    if len(found.windows) != 2 or rank != 4:
        return False
    behind, before = (_shape(one) for one in found.windows)
    sizes = [_sizes(one) for one in found.windows]
    return (
        len(before) == 5
        and behind == known.shape
        and before[-3:] == behind[-3:]
        and [len(one) for one in sizes] == [4, 5]
        and -1 not in sizes[0][1:]
        and -1 not in sizes[1][1:]
        and all(len(_shape(mask)) == 5 or _shape(mask)[:-3] in ((), (1,)) for mask in found.masks)
    )


def _is_boolean(mask: fx.Node) -> bool:
    """Whether a mask is that of a `masked_fill`: true where nothing may be seen."""
    known = _tensor(mask)
    return known is not None and known.dtype == torch.bool


def _sizes(reshape: fx.Node) -> tuple[Any, ...]:
    return tuple(ops.arguments(reshape)["shape"])


def _shape(node: fx.Node) -> tuple[int, ...]:
    known = _tensor(node)
    return () if known is None else tuple(known.shape)


def _tensor(node: Any) -> TensorInfo | None:
    value = info(node).value if isinstance(node, fx.Node) else None
    return value if isinstance(value, TensorInfo) else None
