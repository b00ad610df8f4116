"""Budgets: how large a network may be, and what a choice of channels would cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import fx

from fxcompress.analysis.channels import Axis, ChannelAnalysis
from fxcompress.analysis.cost import macs as node_macs
from fxcompress.analysis.grouping import Booleans
from fxcompress.errors import OptionError, did_you_mean
from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import TensorInfo, info


@dataclass(frozen=True)
class Budget:
    """A limit on a quantity: a fraction of today's (a float below or at 1) or an absolute number (an int).

    Pipeline text writes it as `budget=parameters:0.5` or `budget=macs:2000000`.
    """

    quantity: str
    limit: float | int

    def __post_init__(self) -> None:
        if self.quantity not in ("parameters", "macs"):
            hint = did_you_mean(self.quantity, ("parameters", "macs"))
            raise OptionError(f"a budget is in parameters or macs, not {self.quantity!r}{hint}")
        fraction = isinstance(self.limit, float) and 0 < self.limit <= 1
        count = isinstance(self.limit, int) and not isinstance(self.limit, bool) and self.limit > 0
        if not fraction and not count:
            raise OptionError(
                f"a budget of {self.quantity} is a fraction above 0 and at most 1, or a positive whole number, "
                f"not {self.limit!r}"
            )

    def __str__(self) -> str:
        return f"{self.quantity}:{self.limit}"

    @classmethod
    def of(cls, given: object) -> Budget:
        """Read a budget: a `Budget`, or text such as "macs:0.5"."""
        if isinstance(given, Budget):
            return given
        quantity, _, limit = str(given).partition(":")
        try:
            number = int(limit) if limit.strip().isdigit() else float(limit)
        except ValueError:
            raise OptionError(f"a budget is written as 'macs:0.5' or 'parameters:1000000', not {given!r}") from None
        return cls(quantity.strip().lower(), number)

    def target(self, full: float) -> float:
        """Return the limit as a number, given the quantity of the whole network."""
        return self.limit * full if isinstance(self.limit, float) else float(self.limit)


def Parameters(limit: float | int) -> Budget:
    """A budget in parameters: a fraction of today's, or a number."""
    return Budget("parameters", limit)


def MACs(limit: float | int) -> Budget:
    """A budget in multiply-accumulates per sample: a fraction of today's, or a number."""
    return Budget("macs", limit)


class CostOfChoice:
    """Predicts the cost of a network after removing groups of channels, without removing any.

    The number of elements of a weight is the product of its dimensions' surviving indices; the MACs of a layer shrink
    with its weight.
    """

    def __init__(self, graph_module: fx.GraphModule, analysis: ChannelAnalysis) -> None:
        self.analysis = analysis
        self.shapes: dict[str, tuple[int, ...]] = {}
        for paths in edit.tensor_paths(graph_module).values():
            self.shapes[paths[0]] = tuple(edit.attribute(graph_module, paths[0]).shape)
        self.trainable = {path for path, _ in graph_module.named_parameters()}
        self.rows = [
            (parameter.paths[0], parameter.dimension, len(parameter.axis), parameter.axis)
            for parameter in analysis.parameters
        ]
        self.fixed_macs = 0
        self.macs_by_weight: dict[str, int] = {}
        batch = _batch(graph_module)
        canonical = {path: paths[0] for paths in edit.tensor_paths(graph_module).values() for path in paths}
        self.products = [(count // batch, axes) for _, count, axes in analysis.products]
        products = {node for node, _, _ in analysis.products}
        for node in graph_module.graph.nodes:
            count = node_macs(node) // batch
            if node in products:
                continue
            if count and ops.kind(node) in ops.ANCHOR_KINDS:
                path = canonical[f"{node.target}.weight"]
                self.macs_by_weight[path] = self.macs_by_weight.get(path, 0) + count
            else:
                self.fixed_macs += count

    def __call__(self, quantity: str, dead: Booleans) -> float:
        """Return "parameters" or "macs" of the network without the groups marked in `dead`."""
        shares = dict.fromkeys(self.shapes, 1.0)
        for path, dimension, size, axis in self.rows:
            if size == self.shapes[path][dimension]:
                shares[path] *= float(np.count_nonzero(self.analysis.alive(axis, dead))) / size
        if quantity == "parameters":
            return sum(math.prod(shape) * shares[path] for path, shape in self.shapes.items() if path in self.trainable)
        products = sum(count * math.prod(self._share(axis, dead) for axis in axes) for count, axes in self.products)
        layers = sum(count * shares[path] for path, count in self.macs_by_weight.items())
        return self.fixed_macs + products + layers

    def _share(self, axis: Axis | None, dead: Booleans) -> float:
        """The part of an axis that survives."""
        return 1.0 if axis is None else float(np.count_nonzero(self.analysis.alive(axis, dead))) / len(axis)


def _batch(graph_module: fx.GraphModule) -> int:
    for node in graph_module.graph.nodes:
        value = info(node).value
        if node.op == "placeholder" and isinstance(value, TensorInfo) and value.shape:
            return max(value.shape[0], 1)
    return 1
