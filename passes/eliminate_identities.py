"""EliminateIdentities: nodes that hand on what they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxcompress.graph import ops
from fxcompress.graph.metadata import TensorInfo, info
from fxcompress.rewrite.driver import RulePass
from fxcompress.rewrite.match import Match, Refusal, Rule, mismatch, refuse
from fxcompress.rewrite.pattern import Operand, Pattern, anything, number, op
from fxcompress.rewrite.workspace import tensor_of

_SOURCE: tuple[str, Operand] = ("input", anything("source"))
_REMOVED = "{kind} removed: it hands on its input"
_MERGED = "{kind} merged with the one before it"
_RESHAPES = ("reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_IDEMPOTENT = ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "abs", "floor", "ceil", "round", "sign")


@dataclass(frozen=True)
class EliminateIdentities(RulePass):
    """Remove nodes that hand on what they are given, whatever the batch size.

    1. Dropout and stochastic depth in evaluation mode. Refused in training mode.
    2. Copies: `clone`, `contiguous`, `to` a dtype and device that the tensor has.
    3. Shapes: `reshape` to the shape that the input has, `flatten` of one dimension, `permute` and `transpose` that
       move nothing, `pad` by nothing, `cat` of one tensor. Sizes written as numbers must not include the batch.
    4. Arithmetic: `x + 0`, `x - 0`, `x * 1`, `x / 1`, `x ** 1`, if dtype and shape stay.
    5. `f(f(x))` becomes `f(x)` for functions that change nothing the second time (relu, relu6, hardtanh, clamp, abs,
       rounding), and `relu` before `relu6` or behind it goes.
    6. A reshape of a reshape becomes one reshape, a permute of a permute one permute, or none.
    7. Refuses where something writes in place to the tensor or its copy, and where an output of the model would then be
       one of its inputs or parameters.
    """

    name: ClassVar[str] = "eliminate-identities"
    refused: ClassVar[str] = "not removed"

    def rules(self) -> tuple[Rule, ...]:
        """Return the rules, the removals before the merges."""
        return (*_removals(), *_merges())


def _removals() -> tuple[Rule, ...]:
    """Rules that let the readers of a node read its input."""
    copies = (
        _removal("dropout", _check_dropout),
        _removal("identity", _check_copy),
        _removal("to", lambda match: _check_layout(match) or _check_same_value(match)),
        _removal("reshape", _check_reshape),
        _removal("flatten", _check_flatten),
        _removal("permute", _check_permute),
        _removal("transpose", _check_transpose),
        _removal("pad", _check_pad),
        _removal("cat", _check_cat, operands=()),
    )
    neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1, "pow": 1}
    arithmetic = tuple(
        _removal(kind, _check_same_value, (_SOURCE, ("other", number(value))), commutative=kind in ("add", "mul"))
        for kind, value in neutral.items()
    )
    return (*copies, *arithmetic)


def _removal(
    kind: str,
    check: Callable[[Match], Refusal | None],
    operands: tuple[tuple[str, Operand], ...] = (_SOURCE,),
    commutative: bool = False,
) -> Rule:
    pattern = Pattern(frozenset({kind}), operands=operands, commutative=commutative)
    return Rule(f"remove-{kind}", pattern, _remove, lambda match: check(match) or _check_memory(match), _REMOVED)


def _remove(match: Match) -> None:
    match.workspace.replace(match.anchor, match["source"])


# -- when a node is an identity ---------------------------------------------------------------------------------------


def _check_copy(match: Match) -> Refusal | None:
    if match.anchor.target == "detach":
        return mismatch(f"`{match.anchor.name}` stops gradients", match.anchor)
    return _check_layout(match)


def _check_layout(match: Match) -> Refusal | None:
    """Layouts that the caller asks for, such as channels last, stay: they are there for speed."""
    if "memory_format" in match.anchor.kwargs:
        return mismatch(f"`{match.anchor.name}` asks for a memory format", match.anchor)
    return None


def _check_dropout(match: Match) -> Refusal | None:
    if match.workspace.module(match.anchor).training:
        return refuse("dropout is in training mode; call model.eval() before compiling", match.anchor)
    return None


def _check_same_value(match: Match) -> Refusal | None:
    """Shape, dtype and device are those of the input; for plain numbers, the type."""
    before, after = info(match["source"]).value, info(match.anchor).value
    if isinstance(after, TensorInfo):
        same = before == after
    else:
        same = isinstance(after, (int, float)) and type(before) is type(after)
    return None if same else mismatch(f"`{match.anchor.name}` gives {after} of {before}", match.anchor)


def _check_reshape(match: Match) -> Refusal | None:
    """Every size is that of the input at any batch size: read from it, or written as a number behind the first."""
    value = tensor_of(match["source"])
    shape = ops.arguments(match.anchor)["shape"]
    if value is None or not isinstance(shape, (tuple, list)) or len(shape) != len(value.shape):
        return mismatch(f"`{match.anchor.name}` changes the number of dimensions", match.anchor)
    free = 0
    for position, size in enumerate(shape):
        if isinstance(size, int) and size == -1:
            free += 1
        elif isinstance(size, fx.Node):
            if not _is_size_of(size, match["source"], position):
                return mismatch(f"`{size.name}` is not known to be size {position} of the input", size)
        elif size != value.shape[position] or (position == 0 and not _is_constant(match)):
            return mismatch(f"size {position} is {size}", match.anchor)
    return None if free <= 1 else mismatch("more than one size is free", match.anchor)


def _is_constant(match: Match) -> bool:
    return not match.workspace.depends_on_input(match["source"])


def _is_size_of(size: fx.Node, source: fx.Node, position: int) -> bool:
    """Whether a node reads size `position` of `source`: source.size(position) or source.size()[position]."""
    if ops.kind(size) == "size" and len(size.args) == 2:
        return size.args[0] is source and size.args[1] in (position, position - len(_shape(source)))
    if ops.kind(size) == "getitem" and isinstance(size.args[0], fx.Node) and ops.kind(size.args[0]) == "size":
        whole = size.args[0]
        return whole.args == (source,) and size.args[1] in (position, position - len(_shape(source)))
    return False


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = tensor_of(node)
    return value.shape if value else ()


def _check_flatten(match: Match) -> Refusal | None:
    dimensions = len(_shape(match["source"]))
    arguments = ops.arguments(match.anchor)
    start, end = arguments["start_dim"], arguments["end_dim"]
    if dimensions and isinstance(start, int) and isinstance(end, int) and start % dimensions == end % dimensions:
        return None
    return mismatch(f"`{match.anchor.name}` joins dimensions", match.anchor)


def _check_permute(match: Match) -> Refusal | None:
    moved = _permutation(match.anchor)
    if moved is not None and moved == tuple(range(len(moved))):
        return None
    return mismatch(f"`{match.anchor.name}` moves dimensions", match.anchor)


def _permutation(node: fx.Node) -> tuple[int, ...] | None:
    dims = ops.arguments(node)["dims"]
    if not isinstance(dims, (tuple, list)) or not all(isinstance(dim, int) for dim in dims):
        return None
    return tuple(dim % len(dims) for dim in dims)


def _check_transpose(match: Match) -> Refusal | None:
    dimensions, arguments = len(_shape(match["source"])), ops.arguments(match.anchor)
    first, second = arguments["dim0"], arguments["dim1"]
    if dimensions and isinstance(first, int) and isinstance(second, int) and first % dimensions == second % dimensions:
        return None
    return mismatch(f"`{match.anchor.name}` swaps dimensions", match.anchor)


def _check_pad(match: Match) -> Refusal | None:
    amounts = ops.arguments(match.anchor)["pad"]
    if isinstance(amounts, (tuple, list)) and all(isinstance(amount, int) and amount == 0 for amount in amounts):
        return None
    return mismatch(f"`{match.anchor.name}` pads", match.anchor)


def _check_cat(match: Match) -> Refusal | None:
    tensors = ops.arguments(match.anchor)["tensors"]
    if isinstance(tensors, (tuple, list)) and len(tensors) == 1 and isinstance(tensors[0], fx.Node):
        match.bound["source"] = tensors[0]
        return None
    return mismatch(f"`{match.anchor.name}` joins several tensors", match.anchor)


def _check_memory(match: Match) -> Refusal | None:
    """Nothing writes to the node or its input, and no output of the model becomes an input or parameter of it."""
    source = match["source"]
    for node in (match.anchor, source):
        if match.workspace.is_written(node):
            return refuse(f"`{node.name}` is written to in place", node)
    origin = source
    while ops.kind(origin) in ops.VIEW_KINDS and origin.all_input_nodes:
        origin = origin.all_input_nodes[0]
    if origin.op in ("placeholder", "get_attr") and any(user.op == "output" for user in match.anchor.users):
        return refuse(f"an output of the model would share memory with `{origin.name}`", origin)
    return None


# -- two nodes that are one -------------------------------------------------------------------------------------------


def _merges() -> tuple[Rule, ...]:
    """Rules that let a node read the input of its input."""
    source = anything("source")
    reshapes = op("reshape", input=op(*_RESHAPES, bind="inner", readers=1))
    permutes = op("permute", input=op("permute", bind="inner", readers=1, input=source))
    return (
        *(_merge(op(kind, input=op(kind, bind="inner", input=source)), _check_same_options) for kind in _IDEMPOTENT),
        _merge(op("relu6", input=op("relu", bind="inner", input=source))),
        Rule("relu-behind-relu6", op("relu", input=op("relu6", bind="source")), _remove, _check_memory, _REMOVED),
        _merge(reshapes, _check_reshapes),
        _merge(permutes, _check_permutes, _merge_permutes),
    )


def _merge(
    pattern: Pattern,
    check: Callable[[Match], Refusal | None] = lambda match: None,
    rewrite: Callable[[Match], None] | None = None,
) -> Rule:
    name = f"merge-{next(iter(pattern.kinds))}"
    return Rule(name, pattern, rewrite or _bypass, lambda match: check(match) or _check_unwritten(match), _MERGED)


def _check_unwritten(match: Match) -> Refusal | None:
    for node in (match["source"], match["inner"]):
        if match.workspace.is_written(node):
            return refuse(f"`{node.name}` is written to in place", node)
    return None


def _bypass(match: Match) -> None:
    match.workspace.reconnect(match.anchor, match["inner"], match["source"])


def _check_same_options(match: Match) -> Refusal | None:
    outer, inner = (_options(node) for node in (match.anchor, match["inner"]))
    return None if outer == inner else mismatch(f"`{match['inner'].name}` has other bounds", match["inner"])


def _options(node: fx.Node) -> dict[str, Any]:
    return {name: value for name, value in ops.arguments(node).items() if name != "input"}


def _check_reshapes(match: Match) -> Refusal | None:
    inner = match["inner"]
    source = inner.all_input_nodes[0] if inner.args[:1] == (inner.all_input_nodes[0],) else None
    if source is None or tensor_of(source) is None:
        return mismatch(f"the input of `{inner.name}` is no tensor", inner)
    match.bound["source"] = source
    return None


def _check_permutes(match: Match) -> Refusal | None:
    if _permutation(match.anchor) is None or _permutation(match["inner"]) is None:
        return mismatch(f"the dimensions of `{match.anchor.name}` are computed", match.anchor)
    return None


def _merge_permutes(match: Match) -> None:
    outer, inner = _permutation(match.anchor), _permutation(match["inner"])
    dims = tuple((inner or ())[dim] for dim in outer or ())
    match.workspace.set_arguments(match.anchor, (match["source"], dims), {})
