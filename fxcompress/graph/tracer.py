"""The symbolic tracer: torch.fx's, which looks at the example inputs where Python has to know a size.

A proxy stands for a value that is known only when the model runs. Where the model's Python code asks for more than a
proxy can tell (`if h % 7`, `range(n)`, `isinstance(x, torch.Tensor)`, ...), the answer is taken from the example
inputs, as long as it depends on shapes, dtypes and devices and not on data. What was taken so is remembered.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import itertools
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace

from fxcompress.graph import modules as own
from fxcompress.graph import ops
from fxcompress.graph.compare import without_fast_path
from fxcompress.graph.examples import DataDependentError, ExampleValues, Unknown
from fxcompress.graph.metadata import Opaque, set_info
from fxcompress.graph.proxy import FACTORIES, Proxy
from fxcompress.graph.specialise import FIXED_PROPERTIES, Specialisation, is_check, place_of


class ConstantWrittenError(DataDependentError):
    """The model writes what depends on its inputs into a tensor that it has just made."""


class StateWrittenError(DataDependentError):
    """The model replaces one of its buffers, which a graph cannot do; `path` is the module that holds it."""

    def __init__(self, path: str, name: str) -> None:
        super().__init__(f"its forward replaces the buffer {name!r}")
        self.path, self.name = path, name


class TablesComputed(Exception):
    """The model replaces buffers by tables that depend on sizes only: they can be computed before it is traced."""

    def __init__(self, tables: dict[str, torch.Tensor]) -> None:
        super().__init__(f"its forward computes {', '.join(tables)}")
        self.tables = tables


class AliasError(DataDependentError):
    """The model writes into a view in a way that a graph cannot follow; `path` is the module that does so."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(why)
        self.path = path


class UnregisteredModuleError(Exception):
    """The model calls a module with parameters that is none of its submodules."""

    def __init__(self, module: nn.Module) -> None:
        count = sum(parameter.numel() for parameter in module.parameters())
        super().__init__(
            f"calls {type(module).__name__} with {count:,} parameters, which is no submodule of the model: it is made "
            f"in the forward, or kept in a plain list or dict instead of nn.ModuleList or nn.ModuleDict"
        )


@dataclass
class Kept:
    """What is not traced into, with the reasons: modules by path, and functions by where their names stand.

    factories: whether tensors that the code makes become nodes; else they are constants of the graph.
    tables: buffers that the forward computes from sizes, and that were given their value for the example; what they
        held before.
    """

    modules: dict[str, str] = field(default_factory=dict)
    functions: dict[tuple[int, str], tuple[dict[str, Any], Callable[..., Any], str]] = field(default_factory=dict)
    factories: bool = False
    tables: dict[str, torch.Tensor | None] = field(default_factory=dict)

    def reason(self, target: object) -> str | None:
        """Return why a function is kept, or None if it is not."""
        return next((reason for _, function, reason in self.functions.values() if function is target), None)


class Tracer(fx.Tracer):
    """Symbolic tracer that keeps layers whole and traces into everything else.

    Args:
        root: the module to trace.
        arguments: its example inputs by name of the parameter of forward.
        is_leaf: whether a module is a layer to be kept whole.
        kept: what else is kept whole, because tracing into it failed.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, root: nn.Module, arguments: dict[str, Any], is_leaf: Callable[[nn.Module], bool], kept: Kept
    ) -> None:
        super().__init__()
        self.values = ExampleValues(root, arguments, self._outside)
        self.kept = kept
        self.specialisations: list[Specialisation] = []
        self._is_leaf = is_leaf
        self._preparing = False
        self._computing = False
        self._probe: tuple[FrameType, int, Specialisation] | None = None
        self._paths = {id(p): n for n, p in itertools.chain(root.named_buffers(), root.named_parameters())}
        self._read: dict[str, fx.Proxy] = {}

    def run(self, concrete: dict[str, Any]) -> fx.Graph:
        """Trace. `concrete` holds the inputs that are fixed.

        Raises:
            Exception: whatever the model's code raises when it meets a proxy.
        """
        with without_fast_path(), self._keeping_functions(), _patched(self):
            graph = self.trace(self.values.root, concrete_args=concrete)
        self._settle_probe(None)
        return graph

    # -- what fx asks -------------------------------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is kept as one node."""
        return self._is_leaf(m) or module_qualified_name in self.kept.modules

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call of a layer, or trace into a module; into one that the forward has just made, too.

        Raises:
            UnregisteredModuleError: the module is none of the model's, but has parameters.
        """
        if m in self.submodule_paths:  # type: ignore[operator]
            return super().call_module(m, forward, args, kwargs)
        if any(True for _ in m.parameters()):
            raise UnregisteredModuleError(m)
        return forward(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy that asks the example inputs."""
        return Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a proxy for a parameter or buffer that forward reads from a module."""
        if not isinstance(attr_val, torch.Tensor) or id(attr_val) not in self._paths:
            return attr_val
        path = self._paths[id(attr_val)]
        if path not in self._read:
            self._read[path] = self.create_proxy("get_attr", path, (), {})
        return self._read[path]

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        """Make the placeholders. The assertions made with them are those of fx, on inputs that are fixed."""
        self._preparing = True
        try:
            return super().create_args_for_root(*args, **kwargs)
        finally:
            self._preparing = False

    def create_arg(self, a: Any) -> Any:
        """Return what stands in a node for an argument."""
        if isinstance(a, fx.Proxy):  # before isinstance() is asked whether it is a tensor
            return a.node
        if type(a) is OrderedDict:  # fx would turn it into a plain dict
            pairs = [(name, self.create_arg(value)) for name, value in a.items()]
            return self.create_node("call_function", OrderedDict, (pairs,), {})
        if isinstance(a, torch.Tensor) and id(a) in self._paths:
            return self.create_node("get_attr", self._paths[id(a)], (), {})
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        """Record a node, except for assertions, which are checked now."""
        if target is torch._assert and not self._preparing:
            return self._assertion(*args, **kwargs)
        if (args and _is_constant(args[0]) and _writes_in_place(target)) or _is_constant(kwargs.get("out")):
            raise ConstantWrittenError(f"{target} writes into a tensor that the code has just made")
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> fx.Node:
        """Record a node, and why it is not traced into where that is so."""
        node = super().create_node(kind, target, args, kwargs, *rest, **options)
        self._settle_probe(node)
        reason = self.kept.modules.get(str(target)) if kind == "call_module" else None
        if kind == "call_function" and self.kept.functions:
            reason = self.kept.reason(target)
        if reason is not None:
            set_info(node, opaque=Opaque(reason))
        return node

    # -- what Python asks of a proxy ----------------------------------------------------------------------------

    def decide(self, proxy: fx.Proxy, convert: Callable[[Any], Any], probing: bool = False) -> Any:
        """Return `convert(value)` of the value that the example inputs give a proxy, and remember it.

        Raises:
            DataDependentError: the value depends on data.
        """
        value = self.values.concrete(proxy.node)
        if isinstance(value, Unknown):
            raise DataDependentError(f"{proxy.node.name!r} is known only when the model runs")
        answer = convert(value)
        frame = sys._getframe(2)
        found = Specialisation(proxy.node, value, place_of(frame), isinstance(answer, bool))
        self._settle_probe(None)
        if probing:
            self._probe = (frame, frame.f_lasti, found)
        elif not is_check(frame):
            self.specialisations.append(found)
        return answer

    def _settle_probe(self, node: fx.Node | None) -> None:
        """Tell an index that Python needed from one that torch tried out before it handed the call to the proxy.

        In the second case the same instruction of the same frame records a node that reads the index.
        """
        if self._probe is None:
            return
        frame, instruction, found = self._probe
        self._probe = None
        current: FrameType | None = sys._getframe(1)
        while node is not None and current is not None:
            if current is frame and current.f_lasti == instruction and found.node in node.all_input_nodes:
                return
            current = current.f_back
        self.specialisations.append(found)

    def _assertion(self, condition: Any, message: Any = "") -> None:
        """An assertion on sizes is checked here; one on data is not part of the graph."""
        if isinstance(condition, fx.Proxy):
            try:
                condition = self.values.concrete(condition.node)
            except DataDependentError:
                return
        if not bool(condition):
            raise AssertionError(str(message))

    def fake(self, proxy: fx.Proxy) -> Any:
        """Return the value of a proxy with fake tensors, or None where it cannot be known."""
        try:
            return self.values.of(proxy.node)
        except Exception:
            return None

    def recording(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a factory of tensors that records a node when a size given to it is a proxy."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given: list[Any] = []
            fx.node.map_aggregate((args, kwargs), lambda value: given.append(value))
            if not self._computing and (self.kept.factories or any(isinstance(value, fx.Proxy) for value in given)):
                return self.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    # -- patches ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _outside(self) -> Iterator[None]:
        """While the example is computed, modules behave as usual."""
        call, attribute, computing = nn.Module.__call__, nn.Module.__getattr__, self._computing
        self._computing = True
        tracing = _symbolic_trace._get_is_fx_tracing() if hasattr(_symbolic_trace, "_get_is_fx_tracing") else None
        nn.Module.__call__ = _symbolic_trace._orig_module_call  # type: ignore[method-assign]
        nn.Module.__getattr__ = _symbolic_trace._orig_module_getattr  # type: ignore[method-assign]
        if tracing:
            _symbolic_trace._set_is_fx_tracing(False)
        try:
            yield
        finally:
            self._computing = computing
            nn.Module.__call__, nn.Module.__getattr__ = call, attribute  # type: ignore[method-assign]
            if tracing:
                _symbolic_trace._set_is_fx_tracing(True)

    @contextlib.contextmanager
    def _keeping_functions(self) -> Iterator[None]:
        """Trace into functions registered with torch.fx.wrap, but not into those that have to be kept."""
        registered = _symbolic_trace._wrapped_fns_to_patch
        before = dict(registered)
        registered.clear()
        registered.update({key: names for key, names in before.items() if names.get(key[1]) in ops.WHOLE})
        registered.update({key: names for key, (names, _, _) in self.kept.functions.items()})
        try:
            yield
        finally:
            registered.clear()
            registered.update(before)


@contextlib.contextmanager
def _patched(tracer: Tracer) -> Iterator[None]:
    """Let what torch.fx leaves out see proxies: factories of tensors, autograd functions and isinstance().

    isinstance() is told the class of the value that a proxy stands for. (The attribute `__class__` would do the same,
    but C code that is told that a proxy is a tensor crashes.)
    """
    is_instance, apply = builtins.isinstance, torch.autograd.Function.__dict__["apply"]
    factories = {name: getattr(torch, name) for name in FACTORIES}

    def told_isinstance(value: Any, kinds: Any) -> bool:
        return is_instance(value, kinds) or (is_instance(value, Proxy) and issubclass(value.value_class(), kinds))

    def recorded_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        proxy = next((argument for argument in args if is_instance(argument, Proxy)), None)
        if proxy is None:
            return apply.__get__(None, cls)(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", own.AutogradFunction.of(cls), args, kwargs)

    try:
        for name, function in factories.items():
            setattr(torch, name, tracer.recording(function))
        torch.autograd.Function.apply = classmethod(recorded_apply)
        builtins.isinstance = told_isinstance
        yield
    finally:
        builtins.isinstance = is_instance
        torch.autograd.Function.apply = apply
        for name, function in factories.items():
            setattr(torch, name, function)


def _is_constant(value: Any) -> bool:
    # In this order: to be asked whether it is a tensor costs a proxy a run on fake tensors.
    return not isinstance(value, (fx.Proxy, nn.Parameter)) and isinstance(value, torch.Tensor)


def _writes_in_place(target: Any) -> bool:
    """Whether a method or function writes into its first argument."""
    if target in ops.INPLACE_OPERATORS or target in ("__setitem__", operator.setitem):
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or (f"{name}_".startswith("__i") and name.endswith("__"))


def replaced_buffers(root: nn.Module) -> dict[str, fx.Node]:
    """Return the buffers that a traced forward has put new values in the place of, by path. (In place it may.)"""
    found = {}
    for path, module in root.named_modules():
        for name, value in module._buffers.items():
            full = f"{path}.{name}" if path else name
            if isinstance(value, fx.Proxy) and not _is_same_memory(value.node, full):
                found[full] = value.node
    return found


def _is_same_memory(node: fx.Node, path: str) -> bool:
    while node.target in ops.INPLACE_OPERATORS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr" and node.target == path


def drop_questions(graph: fx.Graph) -> None:
    """Erase the nodes that were only there to answer what Python asked."""
    for node in reversed(list(graph.nodes)):
        if not node.users and _is_question(node):
            graph.erase_node(node)


def _is_question(node: fx.Node) -> bool:
    """Whether a node only reads sizes and the like, as Python does on its way to a decision."""
    if node.op == "call_method":
        return str(node.target) in ("size", "dim", "numel", "nelement", "ndimension", "get_device") or (
            str(node.target) in FIXED_PROPERTIES
        )
    names = ("_operator", "operator", "math", "builtins")
    return node.op == "call_function" and (
        node.target is getattr or getattr(node.target, "__module__", "") in names
    ) and not _writes_in_place(node.target)  # fmt: skip
