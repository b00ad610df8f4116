"""Graphs as JSON and back.

`torch.fx` turns a graph into Python source, so whatever a file puts into a graph could end in a program. Every name
that reaches the source is therefore checked against what a name can look like, every function against the vocabulary,
and arguments are literals of the few types below; all of this happens before a graph exists.
"""

from __future__ import annotations

import builtins
import contextlib
import keyword
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen

from fxcompress.emit.vocabulary import Vocabulary
from fxcompress.errors import ArtifactError
from fxcompress.graph.metadata import NodeInfo, TensorInfo, info, set_info
from fxcompress.graph.ops import TENSOR_ATTRIBUTES

Json = Any
Special = Callable[[Any], Any]

#: Deeper nesting than this in one argument is taken for an attack on the reader's stack.
_DEEPEST = 32

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_LAYOUTS = {"strided": torch.strided}
_MEMORY_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}

#: Names that the source of a graph uses for other things.
_RESERVED = frozenset(
    {"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "getattr", "slice", "complex"}
)


# Literals


def _refuse(value: Any) -> Any:
    raise ArtifactError(f"a {type(value).__name__} cannot stand in a file: {str(value)[:80]}")


def encode(value: Any, special: Special = _refuse, depth: int = 0) -> Json:
    """Return a literal as JSON. Types that JSON lacks become a dictionary with one key, the name of the type.

    Args:
        value: None, a number, a string, a dtype, a device, ..., or tuples, lists, dicts and slices of these.
        special: called for a value of any other type.
        depth: how deep `value` is nested already.

    Raises:
        ArtifactError: the value, or one inside it, has no place in a file.
    """
    if depth > _DEEPEST:
        raise ArtifactError(f"an argument is nested more than {_DEEPEST} deep")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) is complex:
        return {"complex": [encode(value.real), encode(value.imag)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    for tag, kind in (("dtype", torch.dtype), ("layout", torch.layout), ("memory_format", torch.memory_format)):
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}

    def inner(item: Any) -> Json:
        return encode(item, special, depth + 1)

    if isinstance(value, slice):
        return {"slice": [inner(value.start), inner(value.stop), inner(value.step)]}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [inner(item) for item in value]}
    if isinstance(value, list):
        return [inner(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(name), inner(item)] for name, item in value.items()]}
    return special(value)


def decode(value: Json, special: Special = _refuse, device: torch.device | None = None) -> Any:
    """Return the literal that `encode` wrote.

    Args:
        value: a part of a parsed file.
        special: called for a tag that is no literal, with the dictionary.
        device: put in the place of every device.

    Raises:
        ArtifactError: the value is not what `encode` writes.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [decode(item, special, device) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise ArtifactError(f"an argument in the file is not understood: {str(value)[:80]}")
    [(tag, content)] = value.items()
    if tag == "device" and device is not None and isinstance(content, str):
        return device
    if tag in _NAMED:
        if not isinstance(content, str) or content not in _NAMED[tag]:
            raise ArtifactError(f"the file names an unknown {tag}: {str(content)[:80]}")
        return _NAMED[tag][content]
    if tag == "ellipsis":
        return Ellipsis
    if tag not in ("tuple", "slice", "complex", "dict"):
        return special(value)
    if not isinstance(content, list):
        raise ArtifactError(f"a {tag} in the file is not understood: {str(content)[:80]}")
    items = [decode(item, special, device) for item in content]
    if tag == "tuple":
        return tuple(items)
    if tag == "slice" and len(items) == 3:
        return slice(*items)
    if tag == "complex" and len(items) == 2 and all(isinstance(item, float) for item in items):
        return complex(*items)
    if tag == "dict" and all(isinstance(item, list) and len(item) == 2 for item in items):
        return _dictionary(items)
    raise ArtifactError(f"a {tag} in the file is not understood: {str(content)[:80]}")


_NAMED: dict[str, dict[str, Any]] = {
    "dtype": _DTYPES,
    "layout": _LAYOUTS,
    "memory_format": _MEMORY_FORMATS,
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
    "device": {name: torch.device(name) for name in ("cpu", "meta", "cuda", *(f"cuda:{n}" for n in range(16)))},
}


def _dictionary(items: list[list[Any]]) -> dict[Any, Any]:
    if not all(isinstance(name, (str, int, float, bool, type(None))) for name, _ in items):
        raise ArtifactError("a dict in the file has a key that is no plain literal")
    return dict(items)


# Names


def check_name(name: object, what: str, reserved: frozenset[str] = _RESERVED) -> str:
    """Return `name` if it can be the name of a value in the source of a graph.

    Raises:
        ArtifactError: it is no identifier, a keyword, or a name that the source uses for something else.
    """
    if (
        not isinstance(name, str)
        or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None
        or keyword.iskeyword(name)
        or name in reserved
        or (name.startswith("__") and name.endswith("__"))
    ):
        raise ArtifactError(f"{what} cannot be named {str(name)[:80]!r}")
    return name


def check_path(path: object, what: str) -> str:
    """Return `path` if it can be the dotted path of a layer or parameter.

    Elements may be numbers (of an `nn.Sequential`) and may hold the characters that users put into keys of an
    `nn.ModuleDict`, but nothing that ends a string in Python, no dunder names and no keywords.
    """
    if not isinstance(path, str) or not all(_is_element(element) for element in path.split(".")):
        raise ArtifactError(f"{what} cannot be at {str(path)[:80]!r}: use letters, digits, _, - and space only")
    return path


def _is_element(element: str) -> bool:
    return (
        re.fullmatch(r"[A-Za-z0-9_\- ]+", element) is not None
        and not keyword.iskeyword(element)
        and not (element.startswith("__") and element.endswith("__"))
    )


# Nodes


def encode_graph(graph: fx.Graph, vocabulary: Vocabulary) -> list[Json]:
    """Return the nodes of a graph in order, as JSON.

    Raises:
        ArtifactError: a node holds something that cannot stand in a file; the message names the node.
    """
    if type(graph._codegen) is not CodeGen:
        raise ArtifactError(
            f"the graph has a code generator of its own ({type(graph._codegen).__name__}), as graphs of torch.export "
            f"have; trace the model with fxcompress.trace"
        )
    return [_encode_node(node, vocabulary) for node in graph.nodes]


def _encode_node(node: fx.Node, vocabulary: Vocabulary) -> Json:
    where = f"node {node.name!r}"
    target = vocabulary.function_name(node.target, where) if callable(node.target) else node.target
    record: dict[str, Json] = {"op": node.op, "name": node.name, "target": target}
    try:
        if node.args:
            record["args"] = [encode(argument, _encode_reference) for argument in node.args]
        if node.kwargs:
            record["kwargs"] = {name: encode(argument, _encode_reference) for name, argument in node.kwargs.items()}
    except ArtifactError as error:
        raise ArtifactError(f"{where}: {error}") from None
    known = _encode_info(info(node))
    if known:
        record["info"] = known
    return record


def _encode_reference(value: Any) -> Json:
    return {"node": value.name} if isinstance(value, fx.Node) else _refuse(value)


def _encode_info(known: NodeInfo) -> dict[str, Json]:
    record: dict[str, Json] = {}
    if known.value is not None:
        with contextlib.suppress(ArtifactError):  # a value of a type of the user's: shapes can be propagated again
            record["value"] = encode(known.value, _encode_tensor_info)
    if known.layer:
        record["layer"] = known.layer
    if known.epilogue_of is not None:
        record["epilogue_of"] = known.epilogue_of
    return record


def _encode_tensor_info(value: Any) -> Json:
    if isinstance(value, TensorInfo):
        return {"tensor": [list(value.shape), encode(value.dtype), encode(value.device)]}
    return _refuse(value)


class GraphReader:
    """Builds a graph from the nodes of a file, one after the other.

    Args:
        vocabulary: what the file may name.
        modules: paths of the layers that the file describes.
        tensors: paths of the parameters and buffers in the file.
        device: put in the place of every device in the file.
    """

    def __init__(
        self, vocabulary: Vocabulary, modules: Mapping[str, Any], tensors: Mapping[str, Any], device: torch.device
    ) -> None:
        self.vocabulary, self.modules, self.tensors, self.device = vocabulary, modules, tensors, device
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}

    def read(self, records: Json) -> fx.Graph:
        """Return the graph.

        Raises:
            ArtifactError: a record is not what `encode_graph` writes.
        """
        if not isinstance(records, list) or not records:
            raise ArtifactError("the file holds no graph")
        for position, record in enumerate(records):
            if not isinstance(record, dict) or not record.keys() <= {"op", "name", "target", "args", "kwargs", "info"}:
                raise ArtifactError(f"node {position} of the file is not understood")
            self._read_node(record, last=position == len(records) - 1)
        return self.graph

    def _read_node(self, record: dict[str, Json], last: bool) -> None:
        name = check_name(record.get("name"), "a node")
        where = f"node {name!r}"
        op = record.get("op")
        args, kwargs = self._arguments(record, where)
        if name in self.nodes or (op == "output") != last:
            raise ArtifactError(f"{where} stands twice, or the graph does not end with its one output")
        target = self._target(op, record.get("target"), args, kwargs, where)
        node = self.graph.create_node(str(op), target, args, kwargs, name=name)
        if node.name != name:
            raise ArtifactError(f"{where} has a name that a graph cannot have")
        self.nodes[name] = node
        self._read_info(node, record.get("info", {}), where)

    def _arguments(self, record: dict[str, Json], where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = record.get("args", []), record.get("kwargs", {})
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ArtifactError(f"{where} has arguments that are not understood")
        try:
            return (
                tuple(decode(argument, self._reference, self.device) for argument in args),
                {
                    check_name(name, "an argument", _RESERVED - {"device"}): decode(
                        argument, self._reference, self.device
                    )
                    for name, argument in kwargs.items()
                },
            )
        except ArtifactError as error:
            raise ArtifactError(f"{where}: {error}") from None

    def _reference(self, value: dict[str, Json]) -> fx.Node:
        name = value.get("node")
        if not isinstance(name, str) or name not in self.nodes:
            raise ArtifactError(f"an argument is not understood, or refers to a later node: {str(value)[:80]}")
        return self.nodes[name]

    def _target(self, op: Json, target: Json, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Any:
        """Return the target of a node, after all checks that keep its source harmless."""
        if op == "placeholder":
            self._check_placeholder(target, args, kwargs, where)
            return target
        if op == "output":
            if target != "output" or len(args) != 1 or kwargs:
                raise ArtifactError(f"{where} is not a proper output")
            return target
        if op == "call_module" and target in self.modules and isinstance(target, str):
            return check_path(target, where)
        if op == "get_attr" and isinstance(target, str) and target in self.tensors and not args and not kwargs:
            return check_path(target, where)
        if op == "call_method":
            if target in self.vocabulary.methods and args and isinstance(args[0], fx.Node):
                return target
            raise ArtifactError(f"{where} calls the method {str(target)[:80]!r}, which a file may not do")
        if op == "call_function":
            return self._check_function(self.vocabulary.function(target, where), args, kwargs, where)
        raise ArtifactError(f"{where} ({str(op)[:20]!r}) refers to {str(target)[:80]!r}, which the file does not hold")

    def _check_placeholder(self, target: Json, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> None:
        check_name(target.removeprefix("*").removeprefix("*") if isinstance(target, str) else target, "an input")
        if kwargs or len(args) > 1 or _holds_node(args) or any(node.op != "placeholder" for node in self.graph.nodes):
            raise ArtifactError(f"{where} is not a proper input")

    def _check_function(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], where: str
    ) -> Callable[..., Any]:
        if function is builtins.getattr and (
            len(args) != 2 or kwargs or not isinstance(args[1], str) or args[1] not in TENSOR_ATTRIBUTES
        ):
            raise ArtifactError(f"{where} reads an attribute that a file may not read")
        return function

    def _read_info(self, node: fx.Node, record: Json, where: str) -> None:
        if not isinstance(record, dict) or not record.keys() <= {"value", "layer", "epilogue_of"}:
            raise ArtifactError(f"{where} has notes that are not understood")
        known = NodeInfo(decode(record.get("value"), self._tensor_info, self.device))
        for name in ("layer", "epilogue_of"):
            if name in record:
                if not isinstance(record[name], str):
                    raise ArtifactError(f"{where} has notes that are not understood")
                known = replace(known, **{name: record[name]})
        set_info(node, value=known.value, layer=known.layer, epilogue_of=known.epilogue_of)

    def _tensor_info(self, value: dict[str, Json]) -> TensorInfo:
        content = value.get("tensor")
        if isinstance(content, list) and len(content) == 3:
            shape, dtype, device = (decode(item, device=self.device) for item in content)
            if isinstance(dtype, torch.dtype) and isinstance(device, torch.device) and _is_shape(shape):
                return TensorInfo(tuple(shape), dtype, device)
        raise ArtifactError(f"a shape in the file is not understood: {str(value)[:80]}")


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _holds_node(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return bool(found)
