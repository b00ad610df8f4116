"""Regions: graph modules inside Python code that could not be traced.

Where the forward of a model, or of a part of it, has to stay Python (a detector that sorts boxes and returns losses
while it trains), the graph around it holds one opaque call of that module, and what can be traced inside it becomes
a `torch.fx.GraphModule` in its place (`graph.shell`): a region. Each has example inputs of its own, recorded from one
run of the model on its example inputs, so that passes run on a region as they run on a graph.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from fxcompress.errors import FxCompressError
from fxcompress.graph import compare, edit, opaque
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import Opaque, graph_info, set_info
from fxcompress.graph.shapes import describe_value
from fxcompress.graph.shell import GRAPH, shell_of

#: Where the graph of a model whose own forward stays Python holds that model.
ROOT = "model"

#: Calls of one module that are kept, as far as their inputs differ in shape.
_MOST_CALLS = 4


@dataclass(frozen=True)
class Region:
    """A graph module inside a module that stays Python.

    path: where it is in the whole graph module. layer: where it is in the caller's model. inputs: its example inputs.
    """

    path: str
    layer: str
    graph_module: fx.GraphModule
    inputs: ExampleInputs


def regions(graph_module: fx.GraphModule) -> list[Region]:
    """Return the regions of a graph module, those inside other regions included."""
    found = []
    for path, inputs in graph_info(graph_module).regions.items():
        region = edit.attribute(graph_module, path)
        found.append(Region(path, graph_info(region).layer, region, inputs))
        found += [
            Region(f"{path}.{inner.path}", inner.layer, inner.graph_module, inner.inputs) for inner in regions(region)
        ]
    return found


def replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever that stands."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def calling(model: nn.Module, inputs: ExampleInputs, name: str, reason: str | None = None) -> fx.GraphModule:
    """Return a graph that does nothing but call a model.

    Args:
        model: a layer, or a model whose forward stays Python.
        inputs: its example inputs.
        name: of the model within the graph module.
        reason: why the forward stays Python, None for a layer. Python may be given inputs that the example leaves out.
    """
    holder, graph = nn.Module(), fx.Graph()
    holder.add_module(name, model)
    holder.training = model.training
    args, kwargs = _placeholders(graph, inspect.signature(model.forward), inputs, reason is not None)
    call = graph.call_module(name, tuple(args), kwargs)
    set_info(call, opaque=None if reason is None else Opaque(reason), layer=name)
    graph.output(call)
    return fx.GraphModule(holder, graph, type(model).__name__)


def _placeholders(
    graph: fx.Graph, signature: inspect.Signature, inputs: ExampleInputs, optional_too: bool
) -> tuple[list[fx.Node], dict[str, Any]]:
    """Make the inputs of a model's forward, and return them as positional and keyword arguments."""
    given = signature.bind(*inputs.args, **inputs.kwargs).arguments
    args: list[fx.Node] = []
    kwargs: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        required = parameter.default is parameter.empty
        plain = isinstance(parameter.default, (bool, int, float, str))
        if parameter.kind is parameter.VAR_POSITIONAL:
            args += [graph.placeholder(f"{name}_{index}") for index in range(len(given.get(name, ())))]
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs.update({word: graph.placeholder(word, default_value=None) for word in given.get(name, {})})
        elif required and parameter.kind is not parameter.KEYWORD_ONLY:
            args.append(graph.placeholder(name))
        elif name in given or (optional_too and (plain or parameter.default is None)):
            kwargs[name] = graph.placeholder(name, default_value=parameter.default if plain else None)
    return args, kwargs


def refresh(graph_module: fx.GraphModule, inputs: ExampleInputs) -> None:
    """Run a graph on its example inputs and record anew what its regions and opaque nodes are given.

    A region that is not called keeps the inputs that it has.
    """
    paths = {edit.attribute(graph_module, path): path for path in graph_info(graph_module).regions}
    calls = _record_calls(graph_module, inputs, list(paths))
    for region, path in paths.items():
        if region in calls:
            graph_info(graph_module).regions[path] = calls[region][0]
            refresh(region, calls[region][0])


def forget_data(graph_module: fx.GraphModule) -> None:
    """Let the example inputs of regions keep shapes and dtypes only; `refresh` records them anew."""
    for region in regions(graph_module):
        forget_data(region.graph_module)
    known = graph_info(graph_module).regions
    known.update({path: inputs.map(lambda tensor: tensor.to("meta")) for path, inputs in known.items()})


# -- capture --------------------------------------------------------------------------------------------------------


def capture(
    graph_module: fx.GraphModule,
    inputs: ExampleInputs,
    trace: Callable[[nn.Module, ExampleInputs], fx.GraphModule],
    is_leaf: Callable[[nn.Module], bool],
) -> None:
    """Trace what can be traced inside the opaque modules of a graph, and put the graphs in their places.

    Args:
        graph_module: a traced graph, edited in place.
        inputs: its example inputs; the graph is run on them once.
        trace: makes the graph module of one region, without looking for regions inside it; raises where it cannot.
        is_leaf: whether a module is a layer, which is no region of its own.
    """
    modules = {str(node.target): node for node in opaque.nodes(graph_module) if node.op == "call_module"}
    candidates = {
        path: edit.attribute(graph_module, path) for path in modules
        if any(_is_worth_it(child, is_leaf) for child in edit.attribute(graph_module, path).children())
    }  # fmt: skip
    if not candidates:
        opaque.record(graph_module, inputs)
        return
    below = {inner for module in candidates.values() for inner in module.modules()} - set(candidates.values())
    calls = _record_calls(graph_module, inputs, list(below))
    search = _Search(graph_module, calls, trace, is_leaf)
    for path, module in candidates.items():
        search.inside(module, path)


class _Search:
    """Looks for the largest modules that can be traced."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        calls: dict[nn.Module, list[ExampleInputs]],
        trace: Callable[[nn.Module, ExampleInputs], fx.GraphModule],
        is_leaf: Callable[[nn.Module], bool],
    ) -> None:
        self.graph_module, self.calls, self.trace, self.is_leaf = graph_module, calls, trace, is_leaf
        self.seen: set[nn.Module] = set()

    def inside(self, module: nn.Module, path: str) -> None:
        """Replace the children of a module by regions; those that cannot be traced are looked into."""
        for name, child in list(module.named_children()):
            if child in self.seen or isinstance(child, fx.GraphModule) or not _is_worth_it(child, self.is_leaf):
                continue
            self.seen.add(child)
            region = self._region(child)
            if region is None:
                self.inside(child, f"{path}.{name}")
            else:
                self._install(child, region, f"{path}.{name}")

    def _region(self, child: nn.Module) -> fx.GraphModule | None:
        """Return the graph of a module, if there is one that does what the module did on all of its calls."""
        calls = self.calls.get(child, [])
        if not calls:
            return None
        try:
            region = self.trace(child, calls[0])
            for inputs in calls:
                compare.require_same_outputs(child, region, inputs)
        except (FxCompressError, RuntimeError, TypeError, ValueError):
            return None
        return region

    def _install(self, child: nn.Module, region: fx.GraphModule, path: str) -> None:
        graph_info(self.graph_module).regions[f"{path}.{GRAPH}"] = self.calls[child][0]
        replace(self.graph_module, child, shell_of(child, region))


def settle(graph_module: fx.GraphModule, batch: int) -> None:
    """Hand the masks of a whole model down to its regions, the notes of the regions up, and tell them where they are.

    Args:
        graph_module: the whole model. batch: the batch size of its example inputs.
    """
    own = graph_info(graph_module)
    for path in own.regions:
        inner = graph_info(edit.attribute(graph_module, path))
        module = path.removesuffix(f".{GRAPH}")
        within = module.removeprefix(f"{ROOT}.") if _is_python(graph_module) else module
        inner.layer, inner.batch = (f"{own.layer}.{within}" if own.layer else within), batch
        for name in [name for name in own.masks if name.startswith(f"{module}.")]:
            inner.masks[name.removeprefix(f"{module}.")] = own.masks.pop(name)
        settle(edit.attribute(graph_module, path), batch)
        own.notes += [f"{within}: {note}" for note in inner.notes]


def _is_python(graph_module: fx.GraphModule) -> bool:
    return any(node.op == "call_module" and node.target == ROOT for node in opaque.nodes(graph_module))


def _is_worth_it(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> bool:
    """Whether there are at least two layers with parameters in a module."""
    layers = 0
    stack = [module]
    while stack and layers < 2:
        current = stack.pop()
        if is_leaf(current):
            layers += current is not module and any(True for _ in current.parameters())
        else:
            stack.extend(current.children())
    return layers >= 2


def _record_calls(
    graph_module: fx.GraphModule, inputs: ExampleInputs, modules: list[nn.Module]
) -> dict[nn.Module, list[ExampleInputs]]:
    """Run the graph once, and return the inputs that each of the modules was called with."""
    calls: dict[nn.Module, dict[str, ExampleInputs]] = defaultdict(dict)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes = repr(describe_value((args, kwargs)))
        if len(calls[module]) < _MOST_CALLS and shapes not in calls[module]:
            calls[module][shapes] = ExampleInputs(*tree_map(_detached, (args, kwargs)))

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        opaque.record(graph_module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {module: list(found.values()) for module, found in calls.items()}


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
