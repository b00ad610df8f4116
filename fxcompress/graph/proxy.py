"""Proxies: what the model's code computes with while it is traced."""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fxcompress.graph import modules as own
from fxcompress.graph import ops
from fxcompress.graph.examples import DataDependentError, Unknown

if TYPE_CHECKING:
    from fxcompress.graph.tracer import Tracer

#: Functions that make tensors: torch does not hand them to a proxy by itself.
FACTORIES = (
    "zeros", "ones", "empty", "full", "arange", "linspace", "eye", "rand", "randn", "randint", "tensor", "as_tensor",
)  # fmt: skip


class Proxy(fx.Proxy):
    """A proxy that asks the example inputs where Python has to know."""

    tracer: Tracer

    def value_class(self) -> type:
        """Return the class of the value that the proxy stands for, as far as that is known."""
        value = self.tracer.fake(self)
        if value is None or isinstance(value, Unknown):
            return Proxy
        return torch.Tensor if isinstance(value, FakeTensor) else type(value)

    def __bool__(self) -> bool:
        return bool(self.tracer.decide(self, bool))

    def __int__(self) -> int:
        return int(self.tracer.decide(self, int))

    def __float__(self) -> float:
        return float(self.tracer.decide(self, float))

    def __index__(self) -> int:
        return int(self.tracer.decide(self, operator.index, probing=True))

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.decide(self, lambda value: round(value, digits) if digits is not None else round(value))

    def __len__(self) -> int:
        value = self.tracer.fake(self)
        if isinstance(value, torch.Tensor):
            return int(self.tracer.decide(Proxy(_first_size(self), self.tracer), int))
        return len(self.tracer.values.of(self.node))

    def __iter__(self) -> Iterator[Any]:
        unpacked = _unpacked(sys._getframe(1))
        if unpacked is not None:
            return iter([self[index] for index in range(unpacked)])  # type: ignore[index]
        value = self.tracer.values.of(self.node)
        if isinstance(value, dict):
            return iter(list(value))
        if not isinstance(value, (tuple, list, torch.Tensor)):
            raise DataDependentError(f"{self.node.name!r} is a {type(value).__name__}: a graph cannot iterate over it")
        count = self.tracer.decide(Proxy(_first_size(self), self.tracer), int) if isinstance(
            value, torch.Tensor) else len(value)  # fmt: skip
        return iter([self[index] for index in range(count)])  # type: ignore[index]

    def __contains__(self, item: Any) -> bool:
        value = self.tracer.values.of(self.node)
        return item in value if isinstance(value, dict) else any(item is one or item == one for one in self)

    def __setitem__(self, index: Any, value: Any) -> None:
        """`x[index] = value`: from here on the proxy stands for a copy in which that is so.

        Where other proxies may see the memory, the write is recorded as what it is; `Canonicalize` follows it.
        """
        is_tensor = isinstance(self.tracer.fake(self), FakeTensor)
        if self.node.op == "get_attr" or (self.node.op == "placeholder" and not is_tensor):
            raise DataDependentError(f"{self.node.name!r}, which is not the forward's own, is written to in place")
        if _is_augmented(self.node, value):  # x[index] += y
            value.node.target = ops.INPLACE_OPERATORS[value.node.target]
        if is_tensor and _is_shared(self.node, value):
            self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})
        else:
            self.node = self.tracer.create_proxy("call_function", own.set_item, (self, index, value), {}).node

    def __str__(self) -> str:
        value = self.tracer.fake(self)
        return str(value) if isinstance(value, (int, float, str, torch.Size, torch.dtype)) else repr(self)

    def __format__(self, specification: str) -> str:
        value = self.tracer.fake(self)
        return format(value, specification) if isinstance(value, (int, float, str)) else str(self)

    def keys(self) -> Any:
        """Return the keys of a dictionary."""
        return self.tracer.values.of(self.node).keys()

    def __getattr__(self, name: str) -> Any:
        if (name.startswith("__") and name.endswith("__")) or name == "_is_param":
            raise AttributeError(name)
        if not hasattr(torch.Tensor, name):
            value = self.tracer.fake(self)
            if value is not None and not hasattr(value, name):
                raise AttributeError(f"{type(value).__name__} has no attribute {name!r}")
        if name in ("type", "index") and isinstance(self.tracer.fake(self), torch.device):
            return self.tracer.decide(_Attribute(self, name), lambda value: value)  # C code wants a string
        return _Attribute(self, name)

    def __rmul__(self, other: Any) -> Any:
        if isinstance(other, (list, tuple, str)):
            return other * int(self)
        return self.tracer.create_proxy("call_function", operator.mul, (other, self), {})


class _Attribute(Proxy):
    """An attribute of a proxy: a method about to be called, or a value of its own."""

    def __init__(self, root: Proxy, name: str) -> None:
        self.root, self.attr, self.tracer = root, name, root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:
        """The node that reads the attribute, made when it is asked for: most attributes are methods."""
        if self._node is None:
            self._node = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {}).node
        return self._node

    @node.setter
    def node(self, node: fx.Node) -> None:
        self._node = node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.attr in _DICT_METHODS and isinstance(value := self.tracer.fake(self.root), dict):
            return _DICT_METHODS[self.attr](self.root, value, *args)
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


_DICT_METHODS: dict[str, Callable[..., Any]] = {
    "items": lambda proxy, value: [(key, proxy[key]) for key in value],
    "values": lambda proxy, value: [proxy[key] for key in value],
    "keys": lambda proxy, value: value.keys(),
    "get": lambda proxy, value, key, default=None: proxy[key] if key in value else default,
}


def _augmented(function: Callable[..., Any]) -> Callable[..., Any]:
    """`x += y` is recorded as the in-place operation that it is; fx's own proxies record `x + y`."""

    def record(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _function in ops.INPLACE_OPERATORS:
    if getattr(operator, _function.__name__, None) is _function:
        setattr(Proxy, f"__{_function.__name__}__", _augmented(_function))


def _first_size(proxy: Proxy) -> fx.Node:
    made: fx.Node = proxy.tracer.create_proxy("call_method", "size", (proxy, 0), {}).node
    return made


def _unpacked(frame: FrameType) -> int | None:
    """Return into how many names a frame is just unpacking something, or None if it is not."""
    code = frame.f_code.co_code
    opcode, argument = code[frame.f_lasti], code[frame.f_lasti + 1]
    return argument if dis.opname[opcode] == "UNPACK_SEQUENCE" else None


def _is_augmented(node: fx.Node, value: Any) -> bool:
    """Whether a value to be written into a tensor is what `x[index] += y` has just made of a part of that tensor."""
    if not isinstance(value, fx.Proxy) or value.node.op != "call_function":
        return False
    made = value.node
    part = made.args[0] if made.target in ops.INPLACE_OPERATORS else None
    return isinstance(part, fx.Node) and part.all_input_nodes[:1] == [node] and len(part.users) == 1


def _is_shared(node: fx.Node, value: Any) -> bool:
    """Whether the memory of a tensor to be written to may be that of other proxies, too."""
    own_part = value.node.args[0] if isinstance(value, fx.Proxy) and value.node.args else None
    alone = isinstance(own_part, fx.Node) and len(own_part.users) == 1
    views = [user for user in node.users if _may_share(user) and not (alone and user is own_part)]
    return node.op == "placeholder" or _may_share(node) or bool(views)


_COPIES = frozenset({"new_zeros", "new_ones", "new_empty", "new_full", "clone", "repeat", "size", "dim", "numel"})


_VIEW_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})


def _may_share(node: fx.Node) -> bool:
    """Whether the value of a node may share memory with one of its arguments."""
    if node.op == "call_method":
        return str(node.target) not in _COPIES and not (
            str(node.target) in ops.BY_METHOD and not ops.BY_METHOD[str(node.target)].view
        )
    if node.target is getattr:
        return node.args[1] in _VIEW_ATTRIBUTES
    if node.op == "call_function" and node.target in ops.BY_FUNCTION:
        return ops.BY_FUNCTION[node.target].view
    return not (node.op == "call_function" and getattr(node.target, "__name__", "") in FACTORIES)
