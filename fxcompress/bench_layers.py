"""Where the time of a lowered graph goes: each layer's measured time, and what its arithmetic alone would take.

The floor of a layer is the number of its multiply-accumulates over the peak of this machine, which is measured with
large products of integers. A layer far above its floor waits for memory, or has a kernel that could be better.
"""

from __future__ import annotations

import copy
import ctypes
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxcompress.analysis.cost import macs
from fxcompress.bench import median_seconds, node_seconds
from fxcompress.emit.compact_module import CompactModule
from fxcompress.emit.cpu_int8 import Int8Linear
from fxcompress.emit.cpu_numbers import has_kernels
from fxcompress.emit.native.executor import BoundPlan, Unplannable, record
from fxcompress.emit.native.library import Library, library
from fxcompress.emit.native.plan import Plan, PythonCall
from fxcompress.emit.native.planner import make_plan
from fxcompress.graph import ops
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import info
from fxcompress.graph.shapes import propagate

#: Rows, inputs and outputs of the products that the peak is measured with.
_LARGE = ((1024, 1024, 1024), (4096, 512, 512), (512, 2048, 1024))


@dataclass(frozen=True)
class LayerTime:
    """One layer of a lowered graph, or a node that belongs to none.

    name: of the node. layer: of the caller's model. macs: multiply-accumulates of one call, for the whole batch.
    seconds: measured. floor: seconds that the multiply-accumulates take at the machine's peak.
    """

    name: str
    layer: str
    kind: str
    macs: int
    seconds: float
    floor: float


@dataclass(frozen=True)
class LayerTimes:
    """The layers of one graph at one batch size.

    call: seconds of a whole call, with nothing measured inside. peak: multiply-accumulates a second.
    by_kernels: whether steps of our own kernels were measured, as they run; or else nodes, each called by Python.
    inside: the part of a call that its kernels take, all steps in a row (measured one by one, each step also pays for
    being called and measured); None where Python runs the graph.
    """

    batch: int
    layers: tuple[LayerTime, ...]
    call: float
    peak: float
    by_kernels: bool
    inside: float | None = None

    @property
    def outside(self) -> float | None:
        """The part of a call that is spent before, between and after kernels: arguments, plans, memory, Python."""
        return None if self.inside is None else 1 - self.inside

    @property
    def seconds(self) -> float:
        """Sum over the layers."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def floor(self) -> float:
        """Sum over the layers."""
        return sum(layer.floor for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "seconds": self.seconds, "floor": self.floor, "outside": self.outside}


def time_layers(
    compact: CompactModule, inputs: ExampleInputs, threads: int = 0, rounds: int = 30, peak: float | None = None
) -> LayerTimes:
    """Measure every layer of a compiled graph.

    Args:
        compact: the graph; on this CPU.
        inputs: of one call; tensors have the batch size as their first dimension.
        threads: 0: as many as torch uses.
        rounds: how often each layer is measured; figures are medians.
        peak: multiply-accumulates a second; None: `int8_peak` measures it.
    """
    compact = copy.deepcopy(compact)  # shapes are written to its nodes
    arguments = _positional(compact, inputs)
    with _threads(threads), torch.inference_mode():
        peak = int8_peak() if peak is None else peak
        propagate(compact, inputs)
        steps = _seconds_of_steps(compact, arguments, rounds)
        nodes = {node.name: node for node in compact.graph.nodes}
        seconds = steps or {node.name: taken for node, taken in node_seconds(compact, arguments, rounds).items()}
        call = median_seconds(lambda: inputs.call(compact), seconds=0.2)
        inside = None if steps is None else _part_of_kernels(compact, inputs, 10 * rounds)
    layers = tuple(_layer(nodes[name], taken, peak) for name, taken in seconds.items())
    batch = next((int(tensor.shape[0]) for tensor in inputs.tensors() if tensor.ndim), 1)
    return LayerTimes(batch, layers, call, peak, steps is not None, inside)


def _positional(compact: CompactModule, inputs: ExampleInputs) -> list[Any]:
    """The inputs in the order of the placeholders."""
    names = [str(node.target) for node in compact.graph.find_nodes(op="placeholder")]
    values = {**dict(zip(names, inputs.args, strict=False)), **inputs.kwargs}
    return [values.get(name) for name in names]


def _layer(node: fx.Node, seconds: float, peak: float) -> LayerTime:
    module = ops.submodule(node)
    kind = type(module).__name__ if module is not None else ops.kind(node)
    count = macs(node)
    return LayerTime(node.name, info(node).layer, kind, count, seconds, count / peak)


def int8_peak(seconds: float = 0.2) -> float:
    """Return how many multiply-accumulates of 8-bit integers a second this machine does, with torch's threads.

    The best of several large products of matrices, by all the kernels that there are.
    """
    best = 0.0
    for rows, inputs, outputs in _LARGE:
        layer = Int8Linear(inputs, outputs, True, [0.01, 0, 0, 255], [0.1, 128, 0, 255])
        layer.weight.copy_(torch.randint(-127, 128, layer.weight.shape))
        root, graph = nn.Module(), fx.Graph()
        root.add_module("layer", layer)
        graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
        compact = CompactModule(root, graph)
        x = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
        for executor in ("auto", "graph"):
            compact.executor = executor
            median_seconds(lambda: compact(x), 0.0)  # noqa: B023 - called at once
            best = max(best, rows * inputs * outputs / _least_seconds(compact, x, seconds))
    return best


def _least_seconds(call: Any, x: torch.Tensor, seconds: float) -> float:
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call(x)
        least = min(least, time.perf_counter() - start)
    return least


# Steps of kernels


def _seconds_of_steps(compact: CompactModule, arguments: list[Any], rounds: int) -> dict[str, float] | None:
    """The median seconds of each node in the plan of a graph; None where Python runs the graph."""
    kernels = library()
    if kernels is None or compact.executor != "auto" or not has_kernels(compact):
        return None
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    try:
        plan = make_plan(compact, record(compact, arguments), {})
        clock = _ClockedPlan(plan, kernels)
        for _ in range(rounds + 3):
            clock(tensors)
    except Unplannable:
        return None
    found: dict[str, float] = {}
    for index, name in enumerate(plan.names):
        found[name] = found.get(name, 0.0) + statistics.median(clock.durations[index][3:])
    return found


class _ClockedPlan(BoundPlan):
    """Runs a plan one item at a time, and keeps the time that each took."""

    def __init__(self, plan: Plan, kernels: Library) -> None:
        super().__init__(plan, kernels)
        self.runs = [item if isinstance(item, PythonCall) else _alone(item) for item in plan.items]
        self.durations: list[list[float]] = [[] for _ in plan.items]
        self.kernels, self.library = kernels, self  # type: ignore[assignment]  # so that `run` is called here

    def __call__(self, tensors: Any) -> Any:
        """Run on the tensors among the arguments."""
        self.index = 0
        return super().__call__(tensors)

    def run(self, *arguments: Any) -> None:
        """Run one step, in the place of the library."""
        self._clocked(self.kernels.run, *arguments)

    def _call(self, *arguments: Any) -> None:
        self._clocked(super()._call, *arguments)

    def _clocked(self, function: Any, *arguments: Any) -> None:
        start = time.perf_counter()
        function(*arguments)
        self.durations[self.index].append(time.perf_counter() - start)
        self.index += 1


def _part_of_kernels(compact: CompactModule, inputs: ExampleInputs, rounds: int) -> float | None:
    """The median part of a call that passes inside the kernels' library; None if they are not what runs."""
    inputs.call(compact)
    executor = compact._native.made
    plans = [] if executor is None else [plan for plan in executor.plans.values() if plan is not None]
    if not plans:
        return None
    found = []
    clock = _ClockedLibrary(plans[-1].library)
    plans[-1].library = clock  # type: ignore[assignment]  # of a copy that nobody else calls
    for _ in range(rounds):
        clock.seconds = 0.0
        start = time.perf_counter()
        inputs.call(compact)
        found.append(clock.seconds / (time.perf_counter() - start))
    return statistics.median(found)


class _ClockedLibrary:
    """The kernels, with the seconds that they have taken."""

    def __init__(self, kernels: Library) -> None:
        self.kernels, self.seconds = kernels, 0.0

    def run(self, *arguments: Any) -> None:
        """Run steps in a row."""
        self._clocked(self.kernels.run, arguments)

    def run_each(self, *arguments: Any) -> None:
        """Run steps in a row for each image."""
        self._clocked(self.kernels.run_each, arguments)

    def _clocked(self, function: Any, arguments: tuple[Any, ...]) -> None:
        start = time.perf_counter()
        function(*arguments)
        self.seconds += time.perf_counter() - start


def _alone(step: ctypes.Structure) -> Any:
    return (ctypes.c_void_p * 1)(ctypes.addressof(step))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
