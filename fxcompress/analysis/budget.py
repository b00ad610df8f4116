"""Budgets: how large a network may be, and what a choice of channels would cost."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx

from fxcompress.analysis.channels import Axis, ChannelAnalysis
from fxcompress.analysis.cost import macs as node_macs
from fxcompress.analysis.grouping import Booleans
from fxcompress.analysis.schedule import SCHEDULES, Way
from fxcompress.errors import OptionError, did_you_mean
from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import TensorInfo, graph_info, info

#: What a budget can be in, besides latency.
QUANTITIES = ("parameters", "macs", "bytes")


@dataclass(frozen=True)
class Budget:
    """A limit on a quantity: a fraction of today's (a float below or at 1) or an absolute number (an int).

    quantity: "parameters", "macs" (per sample) or "bytes" (of parameters and buffers). Pipeline text writes it as
    `budget=parameters:0.5` or `budget=macs:2000000`.
    way: a point on the way from today's quantity to the limit, for pruning in steps; it is met as nearly as possible
    without going further, and text has it behind the limit: `budget=macs:0.25:cubic:0.4`.
    """

    quantity: str
    limit: float | int
    way: Way | None = None

    def __post_init__(self) -> None:
        if self.quantity not in QUANTITIES:
            hint = did_you_mean(self.quantity, (*QUANTITIES, "latency"))
            raise OptionError(f"a budget is in parameters, macs, bytes or latency, not {self.quantity!r}{hint}")
        fraction = isinstance(self.limit, float) and 0 < self.limit <= 1
        count = isinstance(self.limit, int) and not isinstance(self.limit, bool) and self.limit > 0
        if not fraction and not count:
            raise OptionError(
                f"a budget of {self.quantity} is a fraction above 0 and at most 1, or a positive whole number, "
                f"not {self.limit!r}"
            )

    def __str__(self) -> str:
        return f"{self.quantity}:{self.limit}" + _print_way(self.way)

    @classmethod
    def of(cls, given: object) -> Budget:
        """Read a budget: a `Budget`, or text such as "macs:0.5"."""
        if isinstance(given, Budget):
            return given
        text, way = _split_way(str(given))
        quantity, _, limit = text.partition(":")
        try:
            number = int(limit) if limit.strip().isdigit() else float(limit)
        except ValueError:
            raise OptionError(f"a budget is written as 'macs:0.5' or 'parameters:1000000', not {given!r}") from None
        return cls(quantity.strip().lower(), number, way)

    def target(self, full: float) -> float:
        """Return the limit as a number, given the quantity of the whole network."""
        limit = self.limit * full if isinstance(self.limit, float) else float(self.limit)
        return limit if self.way is None else self.way.left(full, min(limit, full))


_WAY = re.compile(rf":(?P<schedule>{'|'.join(SCHEDULES)}):(?P<share>[0-9.eE+-]+)$")


def _split_way(text: str) -> tuple[str, Way | None]:
    """Cut "cubic:0.4" from the end of a budget's text, if it is there."""
    found = _WAY.search(text)
    if found is None:
        return text, None
    try:
        return text[: found.start()], Way(found["schedule"], float(found["share"]))
    except ValueError:
        raise OptionError(f"a share of the way is a number between 0 and 1, as in 'cubic:0.4', not {text!r}") from None


def _print_way(way: Way | None) -> str:
    return "" if way is None else f":{way}"


def Parameters(limit: float | int) -> Budget:
    """A budget in parameters: a fraction of today's, or a number."""
    return Budget("parameters", limit)


def MACs(limit: float | int) -> Budget:
    """A budget in multiply-accumulates per sample: a fraction of today's, or a number."""
    return Budget("macs", limit)


def Bytes(limit: float | int) -> Budget:
    """A budget in bytes of parameters and buffers: a fraction of today's, or a number."""
    return Budget("bytes", limit)


_LATENCY = re.compile(r"latency:(?P<number>[0-9.eE+-]+)(?P<unit>ms)?(?::batch(?P<batch>\d+))?")


@dataclass(frozen=True)
class Latency:
    """A limit on the latency measured on this machine, of the float graph in evaluation mode.

    fraction: of today's latency, above 0 and at most 1; or ms: milliseconds. One of the two. batch: the batch size at
    which it is measured. Pipeline text writes it as `budget=latency:0.5` or `budget=latency:5ms:batch16`. way: as for
    a `Budget`.
    """

    fraction: float | None = None
    ms: float | None = None
    batch: int = 1
    way: Way | None = None

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.ms is None):
            raise OptionError("a latency budget is a fraction or a time: fxc.Latency(0.5) or fxc.Latency(ms=5.0)")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise OptionError(f"a latency budget is a fraction above 0 and at most 1, or ms=..., not {self.fraction!r}")
        if self.ms is not None and not 0 < self.ms < math.inf:
            raise OptionError(f"a latency budget is a positive number of milliseconds, not {self.ms!r}")
        if not isinstance(self.batch, int) or self.batch < 1:
            raise OptionError(f"a latency budget's batch must be a positive whole number, not {self.batch!r}")

    def __str__(self) -> str:
        limit = f"{self.fraction}" if self.ms is None else f"{self.ms}ms"
        return f"latency:{limit}" + (f":batch{self.batch}" if self.batch != 1 else "") + _print_way(self.way)

    @classmethod
    def of(cls, text: str) -> Latency:
        """Read text such as "latency:0.5", "latency:5ms" or "latency:5ms:batch16"."""
        text, way = _split_way(text.replace(" ", "").lower())
        found = _LATENCY.fullmatch(text)
        try:
            number = float(found["number"]) if found else math.nan
        except ValueError:
            found = None
        if found is None:
            raise OptionError(f"a latency budget is written as 'latency:0.5' or 'latency:5ms:batch16', not {text!r}")
        batch = int(found["batch"] or 1)
        return cls(ms=number, batch=batch, way=way) if found["unit"] else cls(number, batch=batch, way=way)

    def target(self, first_ms: float) -> float:
        """Return the limit in milliseconds, given the latency of the whole network."""
        limit = self.ms if self.ms is not None else float(self.fraction or 1.0) * first_ms
        return limit if self.way is None else self.way.left(first_ms, min(limit, first_ms))


def read_budget(given: object) -> Budget | Latency:
    """Read a budget: a `Budget`, a `Latency`, or text such as "macs:0.5" or "latency:5ms".

    Raises:
        OptionError: it is none of these.
    """
    if isinstance(given, Latency):
        return given
    if isinstance(given, str) and given.strip().lower().startswith("latency"):
        return Latency.of(given)
    return Budget.of(given)


class CostOfChoice:
    """Predicts the cost of a network after removing groups of channels, without removing any.

    The number of elements of a weight is the product of its dimensions' surviving indices; the MACs of a layer shrink
    with its weight.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        analysis: ChannelAnalysis,
        pieces: Sequence[tuple[str, fx.GraphModule]] | None = None,
    ) -> None:
        """Look at a network once.

        Args:
            graph_module: the whole network.
            analysis: of its graph, or of all of its pieces together (`analysis.joint`).
            pieces: path and graph of every piece that the analysis covers; None: the whole network is one.
        """
        pieces = [("", graph_module)] if pieces is None else pieces
        self.analysis = analysis
        self.shapes: dict[str, tuple[int, ...]] = {}
        canonical: dict[str, str] = {}
        for paths in edit.tensor_paths(graph_module).values():
            self.shapes[paths[0]] = tuple(edit.attribute(graph_module, paths[0]).shape)
            canonical.update(dict.fromkeys(paths, paths[0]))
        self.item_bytes: dict[str, int] = {
            path: edit.attribute(graph_module, path).element_size() for path in self.shapes
        }
        self.trainable = {path for path, _ in graph_module.named_parameters()}
        self.rows = [
            (canonical[parameter.paths[0]], parameter.dimension, len(parameter.axis), parameter.axis)
            for parameter in analysis.parameters
        ]
        self.fixed_macs = 0
        self.macs_by_weight: dict[str, int] = {}
        batches = {node: graph_info(piece).batch or _batch(piece) for _, piece in pieces for node in piece.graph.nodes}
        self.products = [(count // batches[node], axes) for node, count, axes in analysis.products]
        products = {node for node, _, _ in analysis.products}
        for path, piece in pieces:
            for node in piece.graph.nodes:
                count = 0 if node in products else node_macs(node) // batches[node]
                if count and ops.kind(node) in ops.ANCHOR_KINDS:
                    weight = canonical[f"{path}.{node.target}.weight" if path else f"{node.target}.weight"]
                    self.macs_by_weight[weight] = self.macs_by_weight.get(weight, 0) + count
                else:
                    self.fixed_macs += count

    def __call__(self, quantity: str, dead: Booleans) -> float:
        """Return the `QUANTITIES` of the network without the groups marked in `dead`."""
        shares = dict.fromkeys(self.shapes, 1.0)
        for path, dimension, size, axis in self.rows:
            if size == self.shapes[path][dimension]:
                shares[path] *= float(np.count_nonzero(self.analysis.alive(axis, dead))) / size
        if quantity == "parameters":
            return sum(math.prod(shape) * shares[path] for path, shape in self.shapes.items() if path in self.trainable)
        if quantity == "bytes":
            sizes = {path: math.prod(shape) * self.item_bytes[path] for path, shape in self.shapes.items()}
            return float(sum(size * shares[path] for path, size in sizes.items()))
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
