"""Shapes, dtypes and devices of every value in a graph, without running its arithmetic.

Values are computed with PyTorch's fake tensors, which hold no data. A node whose inputs, module and arguments are as
they were at the last call keeps its value, so that a pass costs only what it touched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from fxcompress.errors import InputError
from fxcompress.graph import ops
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import TensorInfo, Value, info, set_info

_KEY = "fxcompress_shape_key"


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Put a module and all its children in evaluation mode, and back into their own modes afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in modes:
            child.training = False
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def propagate(graph_module: fx.GraphModule, inputs: ExampleInputs) -> None:
    """Record shape, dtype and device of every node's value for the given inputs.

    Raises:
        InputError: the model cannot be run on inputs of these shapes; the message names the node.
    """
    with evaluation(graph_module), torch.no_grad():
        _Propagation(graph_module, inputs).run()


def infer(node: fx.Node) -> None:
    """Record what a node that was just inserted produces, from what is recorded of its inputs."""
    root = node.graph.owning_module
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: _materialise(info(source).value, mode))
    with mode:
        set_info(node, value=describe_value(execute(root or nn.Module(), node, args, kwargs)))


class _Propagation:
    """One walk over the graph."""

    def __init__(self, graph_module: fx.GraphModule, inputs: ExampleInputs) -> None:
        self.graph_module = graph_module
        self.inputs = inputs
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.values: dict[fx.Node, Any] = {}  # fake values; made from the recorded ones only when they are needed
        self.known: dict[str, Value] = {}  # what a call like this one produced before

    def run(self) -> None:
        placeholders = bind_placeholders(self.graph_module.graph, self.inputs)
        for node in self.graph_module.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = tree_map(self._fake, placeholders[node])
                set_info(node, value=describe_value(self.values[node]))
                continue
            key = self._key(node)
            if key is not None and node.meta.get(_KEY) == key and info(node).value is not None:
                continue
            if key in self.known:
                set_info(node, value=self.known[key])
                node.meta[_KEY] = key
                continue
            try:
                self.values[node] = self._compute(node)
            except Exception as error:
                raise InputError(self._explain(node, error)) from error
            set_info(node, value=describe_value(self.values[node]))
            node.meta[_KEY] = key
            if key is not None:
                self.known[key] = info(node).value

    def _key(self, node: fx.Node) -> str | None:
        """What the value of a node depends on. None: not known, compute it always."""
        if node.op == "output" or info(node).opaque is not None:
            return None
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: _Recorded(info(n).value))  # type: ignore[arg-type, return-value]
        module: object = None
        if node.op in ("call_module", "get_attr"):
            module = _signature(_attribute(self.graph_module, str(node.target)))
        target = None if node.op in ("call_module", "get_attr") else node.target
        return repr((node.op, target, arguments, module))

    def _compute(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        if node.op == "get_attr":
            return self._fake(_attribute(self.graph_module, str(node.target)))
        if info(node).opaque is not None:
            return self._opaque(node, args, kwargs)
        with self.mode:
            return execute(self.graph_module, node, args, kwargs)

    def _opaque(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What a node that could not be traced produced on the same inputs; else what its code makes of fake tensors.

        The code runs on a copy: it is the user's, and may keep what it was given.
        """
        opaque = info(node).opaque
        if opaque is not None and opaque.inputs == describe_value((args, kwargs)):
            return _materialise(opaque.value, self.mode)
        target: Any = _attribute(self.graph_module, str(node.target)) if node.op == "call_module" else node.target
        with self.mode:
            return (copy.deepcopy(target) if isinstance(target, nn.Module) else target)(*args, **kwargs)

    def _value(self, node: fx.Node) -> Any:
        if node not in self.values:
            self.values[node] = _materialise(info(node).value, self.mode)
        return self.values[node]

    def _fake(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            return self.mode.from_tensor(value.detach())
        return value

    def _explain(self, node: fx.Node, error: Exception) -> str:
        layer = info(node).layer
        where = f"node {node.name!r}" + (f" (layer {layer!r})" if layer and layer != node.name else "")
        given = [describe(info(n).value) for n in node.all_input_nodes]
        reason = str(error).strip().split("\n")[0]
        return (
            f"the model cannot run on the example inputs ({self.inputs.describe()}): {where} was given "
            f"{', '.join(given) or 'no tensor'} and failed: {reason}. "
            f"Check the shapes and dtypes of the example inputs against the model's forward."
        )


def execute(root: nn.Module, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a node computes from the values of its arguments."""
    if node.op == "output":
        return args[0]
    if node.op == "call_module":
        module = _attribute(root, str(node.target))
        if _keeps_shape(module, args):
            return torch.empty_like(args[0])
        return module(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


#: Layers that leave the shape as it is, and the rank they take. PyTorch needs milliseconds to find that out.
_KEEP_SHAPE = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}


def _keeps_shape(module: Any, args: tuple[Any, ...]) -> bool:
    """Whether a module is sure to give a fake tensor of the same shape and dtype."""
    return (
        type(module) in _KEEP_SHAPE
        and not module.training
        and len(args) == 1
        and isinstance(args[0], FakeTensor)
        and args[0].ndim == _KEEP_SHAPE[type(module)]
        and args[0].shape[1] == module.num_features
        and (module.weight is None or module.weight.dtype == args[0].dtype)
    )


class _Recorded:
    """Wraps a recorded value so that it prints by shape, dtype and device."""

    def __init__(self, value: Value) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def _signature(value: Any) -> object:
    if isinstance(value, nn.Module):
        tensors = [(tuple(t.shape), t.dtype, t.device) for t in (*value.parameters(), *value.buffers())]
        return (type(value), value.extra_repr() if ops.MODULE_KINDS.get(type(value)) else repr(value), tensors)
    return (tuple(value.shape), value.dtype, value.device) if isinstance(value, torch.Tensor) else value


def _attribute(root: nn.Module, path: str) -> Any:
    found: Any = root
    for name in path.split("."):
        found = getattr(found, name)
    return found


def bind_placeholders(graph: fx.Graph, inputs: ExampleInputs) -> dict[fx.Node, Any]:
    """Return the value of each placeholder for the given inputs.

    Raises:
        InputError: inputs are missing, or there are more than the graph takes.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = [str(node.target) for node in placeholders]
    variadic = [node for node in placeholders if str(node.target).startswith("*")]
    if not variadic and (len(inputs.args) > len(placeholders) or not inputs.kwargs.keys() <= set(names)):
        raise InputError(
            f"the graph takes the inputs ({', '.join(names)}), but {len(inputs.args)} positional inputs "
            f"and the keywords {sorted(inputs.kwargs)} were given"
        )
    found: dict[fx.Node, Any] = {}
    for position, node in enumerate(placeholders):
        name = str(node.target)
        if name.startswith("**"):
            found[node] = {k: v for k, v in inputs.kwargs.items() if k not in names}
        elif name.startswith("*"):
            found[node] = inputs.args[position:]
        elif position < len(inputs.args):
            found[node] = inputs.args[position]
        elif name in inputs.kwargs:
            found[node] = inputs.kwargs[name]
        elif node.args:
            found[node] = node.args[0]
        else:
            raise InputError(f"the example inputs lack the input {name!r} of the model")
    return found


def describe_value(value: Any) -> Value:
    """Return a value with every tensor in it replaced by its shape, dtype and device."""
    if isinstance(value, torch.Tensor):
        return TensorInfo(tuple(int(size) for size in value.shape), value.dtype, value.device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(describe_value(item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(describe_value(item) for item in value) if type(value) in (tuple, list) else tuple(
            describe_value(item) for item in value
        )  # fmt: skip
    if isinstance(value, dict):
        return {name: describe_value(item) for name, item in value.items()}
    return value


def _materialise(value: Value, mode: FakeTensorMode) -> Any:
    if isinstance(value, TensorInfo):
        with mode:
            return torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_materialise(item, mode) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_materialise(item, mode) for item in value)
    if isinstance(value, dict):
        return {name: _materialise(item, mode) for name, item in value.items()}
    return value


def describe(value: Value) -> str:
    """Return a short text for a value, e.g. "f32[1,64,56,56]"."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(describe(item) for item in value)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {describe(item)}" for name, item in value.items()) + "}"
    return str(value)
