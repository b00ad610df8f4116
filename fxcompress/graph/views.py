"""Views: tensors that share the memory of others, what is written into them in place, and how to write it without.

A value written into a view is written into the tensor that the view was taken from, and into every other view of it.
Where all views between them can be undone (`unfollowed` says where they cannot), the same is said without aliasing: the
tensor is put together anew around the value, and every other view is taken again from there.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxcompress.graph import edit, ops
from fxcompress.graph import modules as own
from fxcompress.graph.examples import ExampleValues
from fxcompress.graph.metadata import TensorInfo, info, set_info
from fxcompress.graph.shapes import infer

#: Other spellings of views, and their kind.
_SPELLINGS = {"view": "reshape", "reshape": "reshape", "permute": "permute", "t": "transpose", "T": "transpose",
              "mT": "transpose", "movedim": "permute", "moveaxis": "permute"}  # fmt: skip

_SAME = frozenset({"identity", "to"})
_SAME_ELEMENTS = frozenset({"reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"})
_PIECES = frozenset({"split", "chunk", "tensor_split", "unbind"})

#: Kinds of views that can be undone.
_UNDONE = _SAME | _SAME_ELEMENTS | _PIECES | {"getitem", "permute", "transpose", "select", "narrow"}


def writes_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node writes into its first argument, by a method, function or module that works in place."""
    if node.op == "call_module":
        module = ops.submodule(node) or edit.attribute(root, str(node.target))
        return getattr(module, "inplace", False) is True
    if node.op not in ("call_function", "call_method"):
        return False
    target: Any = node.target
    if target in ops.INPLACE_OPERATORS or target is operator.setitem or node.kwargs.get("inplace") is True:
        return True
    name = target if isinstance(target, str) else str(getattr(target, "__name__", ""))
    return name.endswith("_") and not name.endswith("__")


def find_views(graph: fx.Graph, values: ExampleValues) -> dict[fx.Node, fx.Node]:
    """Return every node that shares the memory of its source with something that is written to, with that source.

    On the example inputs: whether `reshape` copies depends on strides.
    """
    found: dict[fx.Node, fx.Node] = {}
    for node, source in _near_writes(graph, values.root).items():
        try:
            one, other = values.of(node), values.of(source)
        except Exception:  # its shape depends on data, so that it is no view
            continue
        if _storages(one) & _storages(other) and (source in found or not _is_several(other)):
            found[node] = source
    return found


def _near_writes(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, fx.Node]:
    """The nodes that may be views, as far as what they are views of may be written to; each with its source."""
    views: dict[fx.Node, fx.Node] = {}
    written: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = _first(node) or next(iter(node.all_input_nodes), None)
        if source is not None and writes_in_place(node, root):
            written[node] = source
        elif source is not None and _may_view(node, root):
            views[node] = source
    if not written or not views:
        return {}
    shared = {**views, **written}
    roots: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        roots[node] = roots[shared[node]] if node in shared else node
    dirty = {roots[target] for target in written.values()}
    return {node: source for node, source in views.items() if roots[node] in dirty}


def _may_view(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node may return memory of its first input.

    Layers make tensors of their own (but for dropout, which hands its input on in one of two modes).
    """
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    if node.op == "call_module":
        module = ops.submodule(node) or edit.attribute(root, str(node.target))
        function = ops.STATELESS_MODULES.get(type(module), (None, ""))[0]
        return function is not None and ops.BY_FUNCTION[function].view
    if node.op == "call_method" and str(node.target) in ops.BY_METHOD and str(node.target) not in _SPELLINGS:
        return ops.BY_METHOD[str(node.target)].view
    kind = ops.kind(node)
    known = node.op == "call_function" and node.target in ops.BY_FUNCTION and node.target is not getattr
    return kind in ops.VIEW_KINDS if known else kind not in ("dropout", "dropout_function", "size", "ndim", "numel")


def _is_several(value: Any) -> bool:
    return isinstance(value, (tuple, list, dict))


def _storages(value: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)}


def chain(node: fx.Node, views: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Return a view, what it is a view of, and so on up to a tensor with memory of its own."""
    found = [node]
    while found[-1] in views:
        found.append(views[found[-1]])
    return found


def family(root: fx.Node, views: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Return a tensor and all views of it, direct or not, each behind the one that it was taken from."""
    found = [root]
    for node in found:
        found += [user for user in node.users if views.get(user) is node]
    return found


def unfollowed(graph: fx.Graph, values: ExampleValues) -> tuple[fx.Node, str] | None:
    """Return the first write into a view that cannot be said without aliasing, and why; None if there is none."""
    views = find_views(graph, values)
    if not views:
        return None
    positions = {node: position for position, node in enumerate(graph.nodes)}
    written = {node: _first(node) for node in graph.nodes if writes_in_place(node, values.root)}
    shared = {**views, **{node: target for node, target in written.items() if target is not None}}
    members: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        members[chain(node, shared)[-1]].append(node)
    for node, target in written.items():
        if target not in views:
            continue
        links = chain(target, shared)
        others = [one for one in members[links[-1]] if one not in (target, node)]
        if any(positions[user] > positions[node] for one in others for user in one.users):
            why = _why_not(links, views, values.root)
            if why is not None:
                return node, f"it writes in place into a view of a tensor that is read afterwards, and {why}"
    return None


def _why_not(links: list[fx.Node], views: dict[fx.Node, fx.Node], root: nn.Module) -> str | None:
    if links[-1].op == "get_attr":
        return f"that is {links[-1].target!r}, a part of the model"
    for link in links:
        if link in views and not _is_undone(link, views, root):
            return f"{link.name!r} cannot be undone"
    return None


def _first(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


def _is_undone(node: fx.Node, views: dict[fx.Node, fx.Node], root: nn.Module) -> bool:
    kind = _spelt_kind(node, root)
    return kind in _UNDONE and (kind in _PIECES or _first(node) is views[node])


def _spelt_kind(node: fx.Node, root: nn.Module) -> str:
    """The kind of a node that may not be canonical yet."""
    if node.op == "call_module":
        function = ops.STATELESS_MODULES[type(edit.attribute(root, str(node.target)))][0]
        return ops.BY_FUNCTION[function].kind
    if node.op == "call_method":
        name = str(node.target)
        if name in _SPELLINGS or name in ops.BY_METHOD:
            return _SPELLINGS.get(name) or ops.BY_METHOD[name].kind
    if node.target is getattr:
        return _SPELLINGS.get(str(node.args[1]), "getattr")
    if node.target in (torch.movedim, torch.moveaxis, torch.t):
        return "permute"
    return ops.kind(node)


# -- canonical graphs -----------------------------------------------------------------------------------------------


class Insertion:
    """Inserts canonical nodes one behind the other, with their shapes.

    inserted: what was inserted.
    """

    def __init__(self, place: fx.Node, before: bool = False) -> None:
        self.inserted: list[fx.Node] = []
        self._place, self._before, self._layer = place, before, info(place).layer

    def call(self, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call of a function, or of a method by its name."""
        graph = self._place.graph
        here = graph.inserting_before(self._place) if self._before else graph.inserting_after(self._place)
        with here:
            op = "call_method" if isinstance(function, str) else "call_function"
            made = graph.create_node(op, function, args, kwargs)
        return self._add(made)

    def again(self, node: fx.Node, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
        """Insert a copy of a node that reads other inputs."""
        graph = self._place.graph
        with graph.inserting_before(self._place) if self._before else graph.inserting_after(self._place):
            made = graph.node_copy(node, lambda source: replaced.get(source, source))
        return self._add(made)

    def _add(self, made: fx.Node) -> fx.Node:
        if not self._before:
            self._place = made
        self.inserted.append(made)
        infer(made)
        set_info(made, layer=self._layer)
        return made


def undo(view: fx.Node, source: fx.Node, value: fx.Node, insertion: Insertion) -> fx.Node:
    """Return `source` as it is when its canonical view `view` holds `value`."""
    kind = ops.kind(view)
    if kind in _SAME:
        return value
    if kind in _SAME_ELEMENTS:
        return insertion.call("reshape_as", value, source)
    arguments = ops.arguments(view)
    if kind == "permute":
        dims = [dimension % len(arguments["dims"]) for dimension in arguments["dims"]]
        return insertion.call(torch.permute, value, tuple(dims.index(place) for place in range(len(dims))))
    if kind == "transpose":
        return insertion.call(torch.transpose, value, arguments["dim0"], arguments["dim1"])
    if kind == "getitem":
        return write_item(source, view.args[1], value, insertion)
    before = (slice(None),) * (int(arguments["dim"]) % len(info(source).value.shape))
    if kind == "select":
        return write_item(source, (*before, arguments["index"]), value, insertion)
    start, length = arguments["start"], arguments["length"]
    return write_item(source, (*before, slice(start, start + length)), value, insertion)


def undo_pieces(pieces: fx.Node, source: fx.Node, index: int, value: fx.Node, insertion: Insertion) -> fx.Node:
    """Return `source` as it is when the piece at `index` that `pieces` took from it is `value`."""
    if ops.kind(pieces) == "unbind":
        dim = int(ops.arguments(pieces)["dim"]) % len(info(source).value.shape)
        return write_item(source, (*(slice(None),) * dim, index), value, insertion)
    taken = insertion.again(pieces, {_source(pieces): source})
    count = len(info(pieces).value)
    parts = [value if place == index % count else insertion.call(operator.getitem, taken, place)
             for place in range(count)]  # fmt: skip
    return insertion.call(torch.cat, parts, **_along(int(ops.arguments(pieces)["dim"])))


def _along(dim: int) -> dict[str, int]:
    """The argument as canonical calls have it."""
    return {"dim": dim} if dim else {}


def _source(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def write_item(target: fx.Node, index: Any, value: Any, insertion: Insertion) -> fx.Node:
    """Return `target` with `value` in place of `target[index]`: concatenated where the index cuts it into slices."""
    items = ops.normalised_index(index, len(info(target).value.shape))
    cuts = _cuts(items, info(target).value.shape)
    if not cuts:
        return insertion.call(own.set_item, target, index, value)
    pieces = [target]
    for dimension, cut in cuts:
        pieces.append(_slice(pieces[-1], dimension, cut, insertion))
    made = _fitting(pieces[-1], items or [], target, index, value, insertion)
    for piece, (dimension, cut) in zip(reversed(pieces[:-1]), reversed(cuts), strict=True):
        size = info(piece).value.shape[dimension]
        start, stop, _ = cut.indices(size)
        parts = [made]
        if start > 0:
            parts.insert(0, _slice(piece, dimension, slice(0, cut.start), insertion))
        if cut.stop is not None and (stop < size or dimension == 0):
            parts.append(_slice(piece, dimension, slice(cut.stop, None), insertion))
        made = insertion.call(torch.cat, parts, **_along(dimension)) if len(parts) > 1 else made
    return made


def _cuts(items: list[Any] | None, shape: tuple[int, ...]) -> list[tuple[int, slice]]:
    """The dimensions that an index cuts, and the slice of each; none if it does more than that, or nothing."""
    if items is None or any(item is None for item in items):
        return []
    found = []
    for dimension, (item, size) in enumerate(zip(items, shape, strict=True)):
        if isinstance(item, slice) and item == slice(None):
            continue
        if isinstance(item, int):
            item = slice(item, item + 1 if item != -1 else None)
        parts = (item.start, item.stop) if isinstance(item, slice) and item.step in (None, 1) else (None, "?")
        if not all(part is None or isinstance(part, int) for part in parts):
            return []
        start, stop, _ = item.indices(size)
        if start >= stop:
            return []
        found.append((dimension, item))
    return found


def _slice(source: fx.Node, dimension: int, cut: slice, insertion: Insertion) -> fx.Node:
    return insertion.call(operator.getitem, source, (*(slice(None),) * dimension, cut))


def _fitting(
    piece: fx.Node, items: Iterable[Any], target: fx.Node, index: Any, value: Any, insertion: Insertion
) -> fx.Node:
    """A value in the shape and dtype of the piece that it replaces."""
    known = info(piece).value
    if not isinstance(value, fx.Node) or not isinstance(info(value).value, TensorInfo):
        return insertion.call(torch.full_like, piece, value)
    given = info(value).value
    if given.dtype != known.dtype:
        value = insertion.call("to", value, known.dtype)
    single = [dimension for dimension, item in enumerate(items) if isinstance(item, int)]
    shape = tuple(size for dimension, size in enumerate(known.shape) if dimension not in single)
    if given.shape != shape:
        value = insertion.call("expand_as", value, insertion.call(operator.getitem, target, index) if single else piece)
    for dimension in single:
        value = insertion.call(torch.unsqueeze, value, dimension)
    made: fx.Node = value
    return made
