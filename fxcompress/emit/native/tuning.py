"""Measures how a lowered graph runs fastest on this machine: what `passes.Tune` does.

Every candidate computes the same. What is faster in a layer's own loop may be slower in the model, where caches
hold other things: a candidate counts only if the whole model is faster with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from fxcompress.analysis.latency import Pair, in_turns
from fxcompress.emit.cpu_numbers import Kernel
from fxcompress.emit.native.executor import (
    Executor,
    Unplannable,
    can_be_cut,
    images_of,
    machine,
    record,
    shapes_of,
)
from fxcompress.emit.native.library import Library
from fxcompress.emit.native.plan import PythonCall
from fxcompress.graph import ops
from fxcompress.graph.metadata import KernelChoices

#: A layer's other kernel is tried in the model where it takes less than this share of the time.
_PROMISING = 0.9

#: A choice is made where the whole model takes less than this share of the time: above, it is the noise of the clock.
_FASTER = 0.98

_LAYER_ROUNDS, _LAYER_SECONDS = 9, 0.06
_MODEL_ROUNDS, _MODEL_SECONDS = 9, 0.8

#: Places at which a plan for a batch is cut, as shares of its items.
_CUTS = (0.25, 0.5, 0.75, 1.0)

Progress = Callable[[str, int, "int | None"], None]


@dataclass(frozen=True)
class LayerTime:
    """One layer by itself: first by our kernels, second by PyTorch's."""

    node: fx.Node
    pair: Pair


@dataclass(frozen=True)
class Trial:
    """The whole model with a candidate: what it is in words, and its time as a share of that without it."""

    what: str
    ratio: float
    taken: bool


@dataclass
class Tuning:
    """What was measured, and what follows from it."""

    choices: KernelChoices
    layers: list[LayerTime] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)


def tune(graph_module: fx.GraphModule, library: Library, inputs: Sequence[Any], progress: Progress) -> Tuning:
    """Measure the candidates for inputs of these shapes.

    1. Each layer by itself, on random numbers: our kernels, and PyTorch's (oneDNN, with the call from Python).
    2. The model with the layers of which PyTorch's were faster left to them.
    3. For batches: the model with all images taken together from the start, from another layer on, or never.

    Args:
        inputs: positional arguments of the graph.

    Raises:
        Unplannable: the graph does more than the shapes of its inputs tell, and runs node by node.
    """
    graph_module = copy.deepcopy(graph_module)  # layers keep what they prepare for their first call
    found = Tuning(KernelChoices(machine()))
    recorded = record(graph_module, inputs)
    calls = {node: ops.submodule(node) for node in graph_module.graph.find_nodes(op="call_module")}
    layers = {node: layer for node, layer in calls.items() if isinstance(layer, Kernel)}
    with torch.no_grad():
        for done, (node, layer) in enumerate(layers.items()):
            progress("timing layers", done, len(layers))
            pair = _time_layer(node, layer, recorded, library)
            if pair is not None:
                found.layers.append(LayerTime(node, pair))
        slower = frozenset(one.node.name for one in found.layers if one.pair.ratio < _PROMISING)
        if slower:
            progress("timing the model with PyTorch's kernels", 0, None)
            _try(found, replace(found.choices, calls=slower), f"{len(slower)} layers by PyTorch's kernels",
                 graph_module, library, inputs)  # fmt: skip
        for cut, what in _cuts(Executor(graph_module, library, found.choices), inputs):
            progress(f"timing the model, {what}", 0, None)
            _try(found, replace(found.choices, cuts={shapes_of(inputs): cut}), what, graph_module, library, inputs)
    return found


def _try(
    found: Tuning,
    choices: KernelChoices,
    what: str,
    graph_module: fx.GraphModule,
    library: Library,
    inputs: Sequence[Any],
) -> None:
    """Take choices if the model is faster with them than with those that it has."""

    def ratio() -> float:
        before, after = (Executor(graph_module, library, one) for one in (found.choices, choices))
        return in_turns(lambda: before(*inputs), lambda: after(*inputs), _MODEL_ROUNDS, _MODEL_SECONDS).ratio

    measured = ratio()
    if measured < _FASTER:  # once more, with weights elsewhere in memory: that alone can make a difference
        measured = max(measured, ratio())
    taken = measured < _FASTER
    found.trials.append(Trial(what, measured, taken))
    if taken:
        found.choices = choices


def _cuts(executor: Executor, inputs: Sequence[Any]) -> Iterator[tuple[int, str]]:
    """Yield the other ways to run a batch, and what each is in words; none where images are not taken one by one."""
    executor(*inputs)
    (bound,) = executor.plans.values()
    if bound is None or bound.single is None or not bound.single.pays(torch.get_num_threads()):
        return
    images, items = images_of(bound.plan), len(bound.plan.items)
    yield 0, "all images together"
    shares = _CUTS if can_be_cut(bound.plan, bound.single.single.plan, images) else (1.0,)
    for cut in dict.fromkeys(int(share * items) for share in shares):
        if cut != bound.single.cut and cut:
            name = bound.plan.names[cut] if cut < items else ""
            yield cut, f"images one by one up to {name!r}" if name else "images one by one"


def _time_layer(node: fx.Node, layer: Kernel, recorded: dict[fx.Node, Any], library: Library) -> Pair | None:
    """Time a layer by itself; None if there are no kernels of ours for it."""
    alone, values = _alone(node, layer, recorded)
    executor = Executor(alone, library, KernelChoices(""))
    try:
        executor(*values.values())
    except Unplannable:
        return None
    (bound,) = executor.plans.values()
    if bound is None or any(isinstance(item, PythonCall) for item in bound.plan.items):
        return None
    room, held = bound.place([leaf for leaf in tree_leaves(list(values.values())) if isinstance(leaf, torch.Tensor)])
    threads = torch.get_num_threads()

    def ours() -> object:
        for part in bound.runs:
            library.run(part, len(part), room.pointers, threads)
        return held  # kept until here: the kernels write there

    arguments = fx.map_arg(node.args, lambda one: values[one])
    return in_turns(ours, lambda: layer(*arguments), _LAYER_ROUNDS, _LAYER_SECONDS)


def _alone(node: fx.Node, layer: Kernel, recorded: dict[fx.Node, Any]) -> tuple[fx.GraphModule, dict[fx.Node, Any]]:
    """A graph that calls one layer and nothing else, and random values for what the layer reads."""
    graph, root = fx.Graph(), torch.nn.Module()
    values = {one: tree_map(_random, recorded[one]) for one in node.all_input_nodes}
    inputs = {one: graph.placeholder(one.name) for one in values}
    root.add_module("layer", layer)
    graph.output(graph.call_module("layer", fx.map_arg(node.args, lambda one: inputs[one])))
    return fx.GraphModule(root, graph), values


def _random(value: Any) -> Any:
    """Numbers of the shape, type and memory layout of a tensor that has none."""
    if not isinstance(value, torch.Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    generator = torch.Generator().manual_seed(0)
    if value.dtype.is_floating_point:
        return made.uniform_(0.1, 1.0, generator=generator)  # scales of rows among them
    return made.random_(0, 2 if value.dtype == torch.bool else 128, generator=generator)
