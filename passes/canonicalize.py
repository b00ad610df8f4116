"""Canonicalize: one form for each operation, whatever spelling the model chose."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.graph import edit, ops, views
from fxcompress.graph import modules as own
from fxcompress.graph.attention import take_apart
from fxcompress.graph.examples import ExampleValues
from fxcompress.graph.metadata import TensorInfo, graph_info, info, set_info
from fxcompress.graph.shapes import bind_placeholders, infer, propagate
from fxcompress.pipeline.base import Contract, Pass, PassContext, PassResult
from fxcompress.rewrite.effects import has_effects


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrite every operation into its canonical form.

    1. Layers of torch.nn with parameters or a train/eval difference are modules of the plain torch.nn class: a
       subclass with torch.nn's own forward loses its name, and a function that reads its weights from attributes
       (`F.conv2d(x, self.weight)`, `F.batch_norm`, `F.layer_norm`, ...) becomes a module.
    2. Everything else is one function with its required arguments by position and others by name where they are not
       the default: `nn.ReLU`, `x.relu()`, `torch.relu` all become `F.relu`; `x.view` becomes `torch.reshape`.
    3. Nothing works in place: users after an in-place operation read its result instead. What is written into a view
       of a tensor that is read again later is put together with the rest of that tensor (`torch.cat` of slices, ...),
       and every other view is taken anew. (Where that is not possible, capture has kept the module as it is.)
    4. `F.dropout(x, training=self.training)` becomes a layer that follows train() and eval().
    5. `x.shape` becomes `x.size()`; `x.dim()`, `numel()` of what is made of parameters alone, and arithmetic on plain
       numbers become numbers.
    6. `nn.MultiheadAttention` becomes projections, heads and `F.scaled_dot_product_attention`, or single products
       where its weights are read or dropped at random.
    7. What is several things at once becomes these: `torch.addmm` a product and an addition, a batch normalisation of
       one sample by its own statistics (of weights, say) a LayerNorm, a scale and a shift; `movedim` becomes a
       permutation, `torch.max` of two tensors `torch.maximum`, norms of vectors `torch.linalg.vector_norm`.
    8. Nodes that nothing reads, and that do nothing besides, go.
    """

    name: ClassVar[str] = "canonicalize"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Rewrite every node once, in order."""
        edits = _plain_classes(graph_module)
        taken_apart = take_apart(graph_module)
        if taken_apart:
            propagate(graph_module, context.example_inputs)
        edits += taken_apart
        rewriter = _Rewriter(graph_module, _views(graph_module, context))
        for node in list(graph_module.graph.nodes):
            edits += rewriter.rewrite(node)
        edits += _drop_dead_nodes(graph_module.graph)
        if edits:
            rewriter.drop_unused_attributes()
            graph_module.delete_all_unused_submodules()
            graph_module.recompile()
        graph_info(graph_module).canonical = True
        return PassResult(graph_module, modified=edits > 0, edits=edits)


def _views(graph_module: fx.GraphModule, context: PassContext) -> dict[fx.Node, fx.Node]:
    """The views in a graph that works in place, each with what it is a view of."""
    inputs = bind_placeholders(graph_module.graph, context.example_inputs)
    arguments = {str(node.target): value for node, value in inputs.items()}
    return views.find_views(graph_module.graph, ExampleValues(graph_module, arguments))


def _plain_classes(graph_module: fx.GraphModule) -> int:
    """Give layers of subclasses that keep torch.nn's own forward the plain class, and stop in-place dropout."""
    changed = 0
    for module in graph_module.modules():
        base = next((base for base in type(module).__mro__ if base in _PLAIN), None)
        if base is not None and type(module) is not base and type(module).forward is base.forward:
            module.__class__ = base
            changed += 1
        if getattr(module, "inplace", False) is True and type(module) in ops.MODULE_KINDS:
            module.inplace = False  # type: ignore[assignment]
            changed += 1
    return changed


_PLAIN = {*ops.MODULE_KINDS, *ops.STATELESS_MODULES, *ops.PADDING_MODULES}


def _drop_dead_nodes(graph: fx.Graph) -> int:
    dropped = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and not has_effects(node):
            graph.erase_node(node)
            dropped += 1
    return dropped


class _Rewriter:
    """Rewrites nodes in place and keeps the modules it has made, so that one weight makes one layer."""

    def __init__(self, graph_module: fx.GraphModule, known_views: dict[fx.Node, fx.Node]) -> None:
        self.graph_module = graph_module
        self.views = known_views
        self.graph = graph_module.graph
        self.layers: dict[object, str] = {}
        self.positions = {node: index for index, node in enumerate(self.graph.nodes)}

    def rewrite(self, node: fx.Node) -> int:
        """Bring one node into canonical form. Returns 1 if that changed anything."""
        if node.op == "call_module":
            return self._module(node)
        if node.op == "call_method":
            return self._method(node)
        if node.op == "call_function":
            return self._function(node)
        return 0

    # -- modules ------------------------------------------------------------------------------------------------

    def _module(self, node: fx.Node) -> int:
        module = ops.submodule(node)
        if module is not None and type(module) in ops.STATELESS_MODULES:
            function, names = ops.STATELESS_MODULES[type(module)]
            options = {name: getattr(module, name) for name in names.split()}
            inplace = bool(getattr(module, "inplace", False))
            return self._become(node, function, {"input": _first_argument(node), **options}, inplace)
        if type(module) in ops.PADDING_MODULES:
            options = {"pad": tuple(module.padding), "mode": ops.PADDING_MODULES[type(module)]}  # type: ignore
            if options["mode"] == "constant":
                options["value"] = float(getattr(module, "value", 0.0)) or None
            return self._become(node, F.pad, {"input": _first_argument(node), **options})
        if node.kwargs and type(module) in ops.MODULE_KINDS and set(node.kwargs) == {"input"}:
            node.args, node.kwargs = (node.kwargs["input"],), {}
            return 1
        return 0

    # -- methods ------------------------------------------------------------------------------------------------

    def _method(self, node: fx.Node) -> int:
        name = str(node.target)
        inplace = name.endswith("_") and not name.endswith("__")
        name = name.removesuffix("_") if inplace else name
        if inplace and name in ("zero", "fill", "copy"):
            return self._overwrite(node, name)
        if name in ("numel", "nelement") and _is_number(info(node).value) and _is_of_the_model(node):
            return self._become_number(node, info(node).value)
        if name in _METHOD_REWRITES and not inplace:
            return _METHOD_REWRITES[name](self, node)
        if name not in ops.BY_METHOD:
            return 0
        op = ops.BY_METHOD[name]
        if (op.kind == "add" and "alpha" in node.kwargs) or len(node.args) > len(op.parameters):
            return 0
        bound = ops.bind(op, node.args, node.kwargs)
        if op.kind in _OF_TWO and ops.is_tensor_node(bound["dim"]):
            return self._become(node, _OF_TWO[op.kind], {"input": bound["input"], "other": bound["dim"]}, inplace)
        return self._become(node, op.function, bound, inplace)

    def _overwrite(self, node: fx.Node, name: str) -> int:
        """x.zero_(), x.fill_(number) and x.copy_(y) become a tensor like x, and y in the shape and dtype of x."""
        written: Any = node.args[0]
        if name == "zero":
            return self._become(node, torch.zeros_like, {"input": written}, inplace=True)
        value = node.args[1] if len(node.args) > 1 else node.kwargs.get("value", node.kwargs.get("src"))
        if not isinstance(value, fx.Node):
            return self._become(node, torch.full_like, {"input": written, "fill_value": value}, inplace=True)
        if not ops.is_tensor_node(value) or not ops.is_tensor_node(written):
            return 0
        if info(value).value.dtype != info(written).value.dtype:
            with self.graph.inserting_before(node):
                value = self.graph.call_method("to", (value, info(written).value.dtype))
            infer(value)
            self.positions[value] = self.positions[node]
        node.op, node.target, node.args, node.kwargs = "call_method", "expand_as", (value, written), {}
        self._redirect(node, written)
        return 1

    def size(self, node: fx.Node) -> int:
        """x.size(dim=1) becomes x.size(1)."""
        if "dim" in node.kwargs:
            node.args, node.kwargs = (*node.args, node.kwargs["dim"]), {}
            return 1
        return 0

    def reshape(self, node: fx.Node) -> int:
        """x.view(2, -1), x.view((2, -1)) and x.reshape(...) become torch.reshape(x, (2, -1))."""
        if isinstance(_variadic(node, "shape", "size"), torch.dtype) or "dtype" in node.kwargs:
            return 0
        return self._become(node, torch.reshape, {"input": node.args[0], "shape": _variadic(node, "shape", "size")})

    def permute(self, node: fx.Node) -> int:
        """x.permute(0, 2, 1) becomes torch.permute(x, (0, 2, 1))."""
        return self._become(node, torch.permute, {"input": node.args[0], "dims": _variadic(node, "dims")})

    def flip(self, node: fx.Node) -> int:
        """x.flip(0, 1) becomes torch.flip(x, (0, 1))."""
        return self._become(node, torch.flip, {"input": node.args[0], "dims": _variadic(node, "dims")})

    def expand(self, node: fx.Node) -> int:
        """x.expand((2, 3)) becomes x.expand(2, 3); the same for repeat."""
        if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)):
            node.args = (node.args[0], *node.args[1])
            return 1
        return 0

    def swap(self, node: fx.Node) -> int:
        """x.t() becomes torch.transpose(x, 0, 1)."""
        return self._become(node, torch.transpose, {"input": node.args[0], "dim0": 0, "dim1": 1})

    def norm(self, node: fx.Node) -> int:
        """x.norm(dim=1), torch.norm(x), torch.linalg.norm(x) become vector norms, unless of matrices."""
        names = ("x", "ord", "dim", "keepdim", "dtype")
        bound = dict(zip(names, node.args, strict=False))
        bound.update({{"p": "ord", "input": "x", "A": "x", "self": "x"}.get(n, n): v for n, v in node.kwargs.items()})
        order, dim = bound.get("ord"), bound.get("dim")
        several = not isinstance(dim, int) and node.target is torch.linalg.norm
        if bound.get("dtype") is not None or not set(bound) <= set(names) or order == "nuc" or "out" in node.kwargs:
            return 0
        if order is not None and order != "fro" and (several or not isinstance(order, (int, float))):
            return 0
        bound["ord"] = 2 if order is None or order == "fro" else order
        bound.pop("dtype", None)
        return self._become(node, torch.linalg.vector_norm, {"dim": None, "keepdim": False, **bound})

    def movedim(self, node: fx.Node) -> int:
        """x.movedim(1, -1) becomes torch.permute(x, (0, 2, 3, 1))."""
        names = ("input", "source", "destination")
        bound: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        value = info(bound["input"]).value
        if not isinstance(value, TensorInfo):
            return 0
        rank = len(value.shape)
        source, target = (
            [int(one) % rank for one in (given if isinstance(given, (tuple, list)) else [given])]
            for given in (bound["source"], bound["destination"])
        )
        rest = iter(dimension for dimension in range(rank) if dimension not in source)
        dims = tuple(source[target.index(place)] if place in target else next(rest) for place in range(rank))
        return self._become(node, torch.permute, {"input": bound["input"], "dims": dims})

    def add_product(self, node: fx.Node) -> int:
        """torch.addmm(b, x, y) and torch.baddbmm(b, x, y) become b + x @ y."""
        names = {"mat1": "left", "batch1": "left", "mat2": "right", "batch2": "right"}
        bound: dict[str, Any] = dict(zip(("input", "left", "right"), node.args, strict=False))
        bound.update({names.get(name, name): value for name, value in node.kwargs.items()})
        if not ops.is_tensor_node(bound["input"]) or "out" in bound:
            return 0
        with self.graph.inserting_before(node):
            product = self._insert(node, torch.matmul, bound["left"], bound["right"])
            if bound.get("alpha", 1) != 1:
                product = self._insert(node, operator.mul, product, bound["alpha"])
            added = bound["input"]
            if bound.get("beta", 1) != 1:
                added = self._insert(node, operator.mul, added, bound["beta"])
        return self._become(node, operator.add, {"input": added, "other": product})

    def _insert(self, node: fx.Node, function: ops.Function, *args: Any) -> fx.Node:
        """A step of what `node` computes, with a result of the same shape."""
        made = self.graph.call_function(function, args)
        set_info(made, layer=info(node).layer, value=info(node).value)
        self.positions[made] = self.positions[node]
        return made

    def standardise(self, node: fx.Node, bound: dict[str, Any]) -> int:
        """F.batch_norm of one sample by its own statistics is a layer norm of every row (standardised weights)."""
        source, value = bound["input"], info(node).value
        alone = isinstance(value, TensorInfo) and len(value.shape) == 3 and value.shape[0] == 1
        if not alone or bound["training"] is not True or bound["running_mean"] is not None:
            return 0
        path = edit.unique_path(self.graph_module, f"{info(node).layer or node.name}.standardise")
        layer = nn.LayerNorm(value.shape[-1], bound["eps"], elementwise_affine=False)
        edit.add_module(self.graph_module, path, layer.train(bool(self.graph_module.training)))
        with self.graph.inserting_before(node):
            made = self.graph.call_module(path, (source,))
            set_info(made, layer=path, value=value)
            self.positions[made] = self.positions[node]
            for name, function in (("weight", operator.mul), ("bias", operator.add)):
                if bound[name] is not None:
                    made = self._insert(node, function, made, self._insert(node, torch.reshape, bound[name], (-1, 1)))
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)
        return 1

    def ndim(self, node: fx.Node) -> int:
        """x.dim() is a number."""
        value = info(node.args[0]).value if isinstance(node.args[0], fx.Node) else None
        return self._become_number(node, len(value.shape)) if isinstance(value, TensorInfo) else 0

    # -- functions ----------------------------------------------------------------------------------------------

    def _function(self, node: fx.Node) -> int:
        target: Any = node.target
        if target is getattr:
            return self._getattr(node)
        if target in ops.INPLACE_OPERATORS:
            function = ops.INPLACE_OPERATORS[target]
            inplace = ops.is_tensor_node(node.args[0])
            return self._become(node, function, ops.bind(ops.BY_FUNCTION[function], node.args, node.kwargs), inplace)
        if target in _FUNCTION_REWRITES:
            return _FUNCTION_REWRITES[target](self, node)
        if target not in ops.BY_FUNCTION:
            return 0
        op = ops.BY_FUNCTION[target]
        if _is_number(info(node).value) and not node.all_input_nodes and op.kind not in ("ordered_dict",):
            return self._become_number(node, info(node).value)
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None or "out" in node.kwargs:
            return 0
        args = node.args
        if op.kind == "einsum" and len(args) > 1 and not isinstance(args[1], (tuple, list)):
            args = (args[0], tuple(args[1:]))  # einsum("..", a, b) becomes einsum("..", (a, b))
        if op.kind in _VARIADIC and args and not isinstance(args[0], (tuple, list)) and not _is_size(args[0]):
            args = (tuple(args),)  # torch.ones(2, 3) becomes torch.ones((2, 3))
        if len(args) > len(op.parameters):
            return 0
        bound = ops.bind(op, args, node.kwargs)
        if op.kind in _OF_TWO and ops.is_tensor_node(bound["dim"]):
            return self._become(node, _OF_TWO[op.kind], {"input": bound["input"], "other": bound["dim"]})
        inplace = bool(bound.pop("inplace", False))
        for dropped in ("alpha", "rounding_mode", "_stacklevel"):
            bound.pop(dropped, None)
        if op.kind in _LAYERS:
            made = self._become_layer(node, op, bound)
            if made or (op.kind == "batch_norm_function" and self.standardise(node, bound)):
                return 1
        return self._become(node, op.function, bound, inplace)

    def _getattr(self, node: fx.Node) -> int:
        source, name = node.args[0], node.args[1]
        value = info(source).value if isinstance(source, fx.Node) else None
        if not isinstance(value, TensorInfo):
            return 0
        if name == "shape":
            node.op, node.target, node.args = "call_method", "size", (source,)
            return 1
        if name == "ndim":
            return self._become_number(node, len(value.shape))
        if name == "mT" or (name == "T" and len(value.shape) == 2):
            last = len(value.shape) - 1
            return self._become(node, torch.transpose, {"input": source, "dim0": last - 1, "dim1": last})
        return 0

    # -- the rewrites themselves --------------------------------------------------------------------------------

    def _become(self, node: fx.Node, function: ops.Function, bound: dict[str, Any], inplace: bool = False) -> int:
        """Turn `node` into a canonical call of `function`."""
        args, kwargs = ops.canonical_arguments(ops.BY_FUNCTION[function], bound)
        args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: a)  # plain tuples, as fx stores them
        unchanged = (
            node.op == "call_function" and node.target is function and node.args == args and node.kwargs == kwargs
        )
        if unchanged and not inplace:
            return 0
        node.op, node.target = "call_function", function
        node.args, node.kwargs = args, kwargs
        if inplace:
            self._redirect(node, args[0])
        return 1

    def _redirect(self, node: fx.Node, written: Any) -> None:
        """Let later users of a tensor that was written to in place read the result instead."""
        if not isinstance(written, fx.Node):
            return
        position = self.positions[node]
        links = views.chain(written, self.views)
        shared = views.family(links[-1], self.views)
        aliases = [one for one in shared if self.positions[one] <= position and one is not written]
        if any(self._late_users(one, position) for one in aliases):
            self._write_through(node, links, [one for one in shared if self.positions[one] < position])
        else:
            for user in self._late_users(written, position):
                self._point(user, written, node)

    def _point(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let a node read another one; if it is a view, it is one of that now."""
        user.replace_input_with(old, new)
        if self.views.get(user) is old:
            self.views[user] = new

    def _late_users(self, node: fx.Node, position: int) -> list[fx.Node]:
        return [user for user in node.users if self.positions[user] > position]

    def _write_through(self, node: fx.Node, links: list[fx.Node], shared: list[fx.Node]) -> None:
        """Let later users of a tensor, and of all views of it, see what was written into one of the views.

        links: the view written to, what that is a view of, ..., the tensor. shared: the tensor and all its views.
        """
        position, users = self.positions[node], list(node.users)
        insertion = views.Insertion(node)
        root = self._undone(links, node, insertion)
        anew = {links[-1]: root}
        for one in shared[1:]:
            copied = anew[one] = insertion.again(one, anew)
            self.views[copied] = anew[self.views[one]]
        for made in insertion.inserted:
            self.positions[made] = position
        for one in shared:
            for user in self._late_users(one, position):
                self._point(user, one, anew[one])
        for user in users:
            self._point(user, node, anew[links[0]])
        for made in reversed(insertion.inserted):
            if not made.users and made is not root:
                self.graph.erase_node(made)
                self.views.pop(made, None)

    def _undone(self, links: list[fx.Node], value: fx.Node, insertion: views.Insertion) -> fx.Node:
        """The tensor at the end of a chain of views, when the view at its beginning holds a value."""
        place = 0
        while place < len(links) - 1:
            view, source = links[place], links[place + 1]
            if isinstance(info(source).value, TensorInfo):
                value = views.undo(view, source, value, insertion)
                place += 1
            else:  # one of several pieces
                index: Any = view.args[1]
                value = views.undo_pieces(source, links[place + 2], index, value, insertion)
                place += 2
        return value

    def set_item(self, node: fx.Node) -> int:
        """x[a:b] = y, in place or not, becomes a concatenation of what stays and what was written."""
        inplace, written = node.target is operator.setitem, node.args[0]
        if not ops.is_tensor_node(written):
            return 0
        node.target = own.set_item
        insertion = views.Insertion(node, before=True)
        target, index, value = node.args
        made = views.write_item(target, index, value, insertion)  # type: ignore[arg-type]
        for one in insertion.inserted:
            self.positions[one] = self.positions[node]
        node.op, node.target, node.args, node.kwargs = made.op, made.target, made.args, made.kwargs
        set_info(node, value=info(made).value)
        self.graph.erase_node(made)
        if inplace:
            self._redirect(node, written)
        return 1

    def _become_number(self, node: fx.Node, number: Any) -> int:
        """Write a number that is known into the users of a node."""

        def replace(argument: Any) -> Any:
            return number if argument is node else argument

        for user in list(node.users):
            user.args = fx.node.map_aggregate(user.args, replace)
            user.kwargs = fx.node.map_aggregate(user.kwargs, replace)
        self.graph.erase_node(node)
        return 1

    def _become_layer(self, node: fx.Node, op: ops.Op, bound: dict[str, Any]) -> int:
        """Turn a function whose weights are attributes into a call of a layer. Returns 0 where that is not possible."""
        tensor_names = _LAYERS[op.kind][0]
        sources = {name: bound.get(name) for name in tensor_names}
        if any(source is not None and not _is_attribute(source) for source in sources.values()):
            return 0
        tensors = {
            name: edit.attribute(self.graph_module, str(source.target)) if isinstance(source, fx.Node) else None
            for name, source in sources.items()
        }
        module = _LAYERS[op.kind][1](node, bound, tensors)
        if module is None:
            return 0
        paths = {name: str(source.target) for name, source in sources.items() if isinstance(source, fx.Node)}
        path = self._layer_path(node, module, paths)
        node.op, node.target, node.args, node.kwargs = "call_module", path, (bound["input"],), {}
        set_info(node, layer=path)
        return 1

    def _layer_path(self, node: fx.Node, module: nn.Module, paths: dict[str, str]) -> str:
        """Put the layer where its weights stand, if it fits there, else beside them; equal layers share one module."""
        key = (type(module), module.extra_repr(), tuple(sorted(paths.items())))
        if paths and key in self.layers:
            return self.layers[key]
        holders = {path.rpartition(".")[0] for path in paths.values()}
        holder = next(iter(holders)) if len(holders) == 1 else ""
        fits = holder and all(path == f"{holder}.{name}" for name, path in paths.items())
        if fits and type(edit.attribute(self.graph_module, holder)) is nn.Module and self._only_reader(holder, node):
            path = holder
        else:
            path = edit.unique_path(self.graph_module, _layer_name(node, paths))
        edit.add_module(self.graph_module, path, module)
        self.layers[key] = path
        return path

    def _only_reader(self, holder: str, node: fx.Node) -> bool:
        """Whether no other node reads an attribute below `holder` that the layer would not bring."""
        own = set(node.all_input_nodes)
        return all(
            other in own or set(other.users) <= {node}
            for other in self.graph.nodes
            if other.op in ("get_attr", "call_module") and f"{other.target}.".startswith(f"{holder}.")
        )

    def drop_unused_attributes(self) -> None:
        """Erase reads of attributes that layers have taken over, and the attributes themselves."""
        for node in list(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                path = str(node.target)
                self.graph.erase_node(node)
                still_read = any(n.op == "get_attr" and n.target == path for n in self.graph.nodes)
                module, name = edit.owner(self.graph_module, path)
                if not still_read and type(module) is nn.Module and hasattr(module, name):
                    delattr(module, name)


_METHOD_REWRITES: dict[str, Callable[[_Rewriter, fx.Node], int]] = {
    "view": _Rewriter.reshape, "reshape": _Rewriter.reshape, "permute": _Rewriter.permute, "flip": _Rewriter.flip,
    "expand": _Rewriter.expand, "repeat": _Rewriter.expand, "t": _Rewriter.swap, "dim": _Rewriter.ndim,
    "ndimension": _Rewriter.ndim, "size": _Rewriter.size, "norm": _Rewriter.norm, "movedim": _Rewriter.movedim,
    "moveaxis": _Rewriter.movedim, "addmm": _Rewriter.add_product, "baddbmm": _Rewriter.add_product,
}  # fmt: skip

_FUNCTION_REWRITES: dict[object, Callable[[_Rewriter, fx.Node], int]] = {
    torch.norm: _Rewriter.norm, torch.linalg.norm: _Rewriter.norm, torch.movedim: _Rewriter.movedim,
    operator.setitem: _Rewriter.set_item, own.set_item: _Rewriter.set_item,
    torch.moveaxis: _Rewriter.movedim, torch.addmm: _Rewriter.add_product, torch.baddbmm: _Rewriter.add_product,
}  # fmt: skip

#: Functions that take one tuple, or what is in it one by one.
_VARIADIC = frozenset({"meshgrid", "zeros", "ones"})

#: Kinds with a second meaning: torch.max(x, y) of two tensors.
_OF_TWO: dict[str, ops.Function] = {"max": torch.maximum, "min": torch.minimum}


def _variadic(node: fx.Node, *keywords: str) -> Any:
    """Return sizes given as separate arguments or as one tuple."""
    for keyword in keywords:
        if keyword in node.kwargs:
            return node.kwargs[keyword]
    rest = node.args[1:]
    if len(rest) == 1 and (isinstance(rest[0], (tuple, list, torch.dtype)) or _is_size(rest[0])):
        return tuple(rest[0]) if isinstance(rest[0], (tuple, list)) else rest[0]
    return tuple(rest)


def _is_size(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and isinstance(info(argument).value, (tuple, list))


def _first_argument(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs["input"]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_of_the_model(node: fx.Node) -> bool:
    """Whether a value is computed from parameters and buffers alone."""
    front, seen = [node], {node}
    while front:
        current = front.pop()
        if current.op in ("placeholder", "call_module"):
            return False
        new = [source for source in current.all_input_nodes if source not in seen]
        seen.update(new)
        front += new
    return True


def _is_attribute(source: Any) -> bool:
    return isinstance(source, fx.Node) and source.op == "get_attr"


def _layer_name(node: fx.Node, paths: dict[str, str]) -> str:
    if not paths:
        return f"{info(node).layer}.{node.name}" if info(node).layer else node.name
    first = next(iter(paths.values()))
    parent, _, name = first.rpartition(".")
    name = name if name != "weight" else node.name
    return f"{parent}.{name}_layer" if parent else f"{name}_layer"


# -- layers from functions: kind -> (names of the tensors, how to build the module) --------------------------------

Tensors = dict[str, Any]


def _fill(module: nn.Module, node: fx.Node, tensors: Tensors) -> nn.Module:
    """Give a module made on the meta device its tensors, and the mode of the graph."""
    for name, tensor in tensors.items():
        if name in module._parameters:
            trainable = tensor if isinstance(tensor, nn.Parameter) or tensor is None else nn.Parameter(tensor, False)
            module._parameters[name] = trainable
        elif name in module._buffers:
            module._buffers[name] = tensor
    module.training = node.graph.owning_module.training if node.graph.owning_module else False
    return module


def _linear(node: fx.Node, bound: dict[str, Any], tensors: Tensors) -> nn.Module | None:
    weight = tensors["weight"]
    if weight.ndim != 2:
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=tensors["bias"] is not None, device="meta")
    return _fill(layer, node, tensors)


def _conv(node: fx.Node, bound: dict[str, Any], tensors: Tensors) -> nn.Module | None:
    weight, transposed = tensors["weight"], "output_padding" in bound
    options = {name: bound[name] for name in ("stride", "padding", "dilation", "groups")}
    if any(isinstance(value, fx.Node) for value in fx.node.map_aggregate(tuple(options.values()), _as_is)):
        return None
    dims = weight.ndim - 2
    families: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else (
        nn.Conv1d, nn.Conv2d, nn.Conv3d)  # fmt: skip
    inner, outer = weight.shape[1] * bound["groups"], weight.shape[0]
    if transposed:
        inner, outer = outer, inner
        options["output_padding"] = bound["output_padding"]
    layer = families[dims - 1](
        inner, outer, tuple(weight.shape[2:]), bias=tensors["bias"] is not None, device="meta", **options
    )
    return _fill(layer, node, tensors)


def _as_is(value: Any) -> Any:
    return value


def _batch_norm(node: fx.Node, bound: dict[str, Any], tensors: Tensors) -> nn.Module | None:
    mean = tensors["running_mean"]
    source = info(bound["input"]).value
    follows_mode = node.graph.owning_module is not None and bound["training"] is node.graph.owning_module.training
    if mean is None or not isinstance(source, TensorInfo) or not follows_mode:
        return None
    family: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(len(source.shape))
    if family is None or (tensors["weight"] is None) != (tensors["bias"] is None):
        return None
    affine = tensors["weight"] is not None
    layer = family(mean.shape[0], eps=bound["eps"], momentum=bound["momentum"], affine=affine, device="meta")
    layer.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=mean.device))
    return _fill(layer, node, tensors)


def _layer_norm(node: fx.Node, bound: dict[str, Any], tensors: Tensors) -> nn.Module | None:
    shape = bound["normalized_shape"]
    if any(isinstance(size, fx.Node) for size in (shape if isinstance(shape, (tuple, list)) else [shape])):
        return None
    if tensors["weight"] is None and tensors.get("bias") is not None:
        return None
    affine = tensors["weight"] is not None
    if "bias" not in tensors:
        return _fill(nn.RMSNorm(shape, eps=bound["eps"], elementwise_affine=affine, device="meta"), node, tensors)
    layer = nn.LayerNorm(shape, bound["eps"], affine, bias=tensors["bias"] is not None, device="meta")
    return _fill(layer, node, tensors)


def _group_norm(node: fx.Node, bound: dict[str, Any], tensors: Tensors) -> nn.Module | None:
    source = info(bound["input"]).value
    if not isinstance(source, TensorInfo) or (tensors["weight"] is None) != (tensors["bias"] is None):
        return None
    affine = tensors["weight"] is not None
    layer = nn.GroupNorm(bound["num_groups"], source.shape[1], bound["eps"], affine, device="meta")
    return _fill(layer, node, tensors)


def _prelu(node: fx.Node, bound: dict[str, Any], tensors: Tensors) -> nn.Module | None:
    return _fill(nn.PReLU(tensors["weight"].numel(), device="meta"), node, tensors)


def _embedding(node: fx.Node, bound: dict[str, Any], tensors: Tensors) -> nn.Module | None:
    if bound["max_norm"] is not None or bound["sparse"] or bound["scale_grad_by_freq"]:
        return None
    weight = tensors["weight"]
    return _fill(
        nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=bound["padding_idx"], device="meta"), node, tensors
    )


def _dropout(node: fx.Node, bound: dict[str, Any], tensors: Tensors) -> nn.Module | None:
    """Dropout whose mode is that of the graph follows it; dropout that is always on or always off stays a function."""
    training = bound.get("training", bound.get("train"))
    if node.graph.owning_module is None or training is not node.graph.owning_module.training:
        return None
    family = {F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d,
              F.alpha_dropout: nn.AlphaDropout, F.feature_alpha_dropout: nn.FeatureAlphaDropout}  # fmt: skip
    return _fill(family.get(node.target, nn.Dropout)(bound["p"]), node, tensors)  # type: ignore[arg-type]


_Builder = Callable[[fx.Node, dict[str, Any], Tensors], "nn.Module | None"]
_LAYERS: dict[str, tuple[tuple[str, ...], _Builder]] = {
    "linear_function": (("weight", "bias"), _linear),
    "conv_function": (("weight", "bias"), _conv),
    "conv_transpose_function": (("weight", "bias"), _conv),
    "batch_norm_function": (("running_mean", "running_var", "weight", "bias"), _batch_norm),
    "layer_norm_function": (("weight", "bias"), _layer_norm),
    "rms_norm_function": (("weight",), _layer_norm),
    "group_norm_function": (("weight", "bias"), _group_norm),
    "prelu_function": (("weight",), _prelu),
    "embedding_function": (("weight",), _embedding),
    "dropout_function": ((), _dropout),
}
