"""Several graphs as one: channels of a model that is captured in pieces are ranked, and budgets met, over all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxcompress.analysis.channels import Axis, ChannelAnalysis, Floats, ParameterAxis
from fxcompress.analysis.grouping import Grouping, Integers
from fxcompress.analysis.plans import ChannelPlan


@dataclass(frozen=True)
class Joint:
    """The analyses of several graphs put together.

    analysis: of all of them; its groups are those of the first graph, then those of the second, and so on. parts: of
    each graph. starts: the first group of each graph.
    """

    analysis: ChannelAnalysis
    parts: tuple[ChannelAnalysis, ...]
    starts: tuple[int, ...]

    def parted(self, values: Floats) -> list[Floats]:
        """Return the part of each graph of an array over all groups."""
        return np.split(values, self.starts[1:])

    def renumbered(self, reasons: Iterable[Mapping[int, str]]) -> dict[int, str]:
        """Return reasons by group of the whole, from those by group of each graph."""
        return {
            group + start: why for start, own in zip(self.starts, reasons, strict=True) for group, why in own.items()
        }

    def split(self, plan: ChannelPlan) -> list[ChannelPlan]:
        """Return the plan of each graph."""
        found = []
        for part, start in zip(self.parts, self.starts, strict=True):
            stop = start + part.group_count
            reasons = {group - start: why for group, why in plan.reasons.items() if start <= group < stop}
            found.append(ChannelPlan(part, plan.dead[start:stop], reasons))
        return found

    def merged(self, plans: Sequence[ChannelPlan]) -> ChannelPlan:
        """Return one plan from those of each graph."""
        dead = np.concatenate([plan.dead for plan in plans])
        return ChannelPlan(self.analysis, dead, self.renumbered([plan.reasons for plan in plans]))


def join(parts: Sequence[ChannelAnalysis], paths: Sequence[str]) -> Joint:
    """Put the analyses of graphs together.

    Args:
        paths: where each graph stands in the whole model, "" for the model itself.
    """
    starts = tuple(np.cumsum([0, *(part.group_count for part in parts[:-1])]).tolist())
    if len(parts) == 1 and not paths[0]:
        return Joint(parts[0], tuple(parts), starts)
    atoms = np.cumsum([0, *(len(part.grouping.group) for part in parts[:-1])]).tolist()
    moved = [_Moved(part, path, first) for part, path, first in zip(parts, paths, atoms, strict=True)]
    whole = ChannelAnalysis(
        {node: axes for one in moved for node, axes in one.axes().items()},
        tuple(parameter for one in moved for parameter in one.parameters(one.part.parameters)),
        (),
        _grouping([part.grouping for part in parts], starts),
        {group + start: why for start, part in zip(starts, parts, strict=True) for group, why in part.frozen.items()},
        tuple(product for one in moved for product in one.products()),
        frozenset().union(*(part.sizes for part in parts)),
        frozenset().union(*(part.written for part in parts)),
        tuple(parameter for one in moved for parameter in one.parameters(one.part.divisors)),
    )
    return Joint(whole, tuple(parts), starts)


class _Moved:
    """One analysis, with its atoms numbered from `first` on and its parameters under a path."""

    def __init__(self, part: ChannelAnalysis, path: str, first: int) -> None:
        self.part, self.first = part, first
        self.prefix = f"{path}." if path else ""
        self.known: dict[int, Axis] = {}

    def axes(self) -> dict[Any, Any]:
        return {node: self._move(axes) for node, axes in self.part.axes.items()}

    def parameters(self, given: Iterable[ParameterAxis]) -> list[ParameterAxis]:
        return [
            dataclasses.replace(
                one, paths=tuple(f"{self.prefix}{path}" for path in one.paths), axis=self._move(one.axis)
            )
            for one in given
        ]

    def products(self) -> list[tuple[Any, int, tuple[Axis | None, ...]]]:
        return [(node, count, self._move(axes)) for node, count, axes in self.part.products]

    def _move(self, axes: Any) -> Any:
        if isinstance(axes, Axis):
            if id(axes) not in self.known:
                self.known[id(axes)] = Axis(axes.atoms + self.first, axes.constant)
            return self.known[id(axes)]
        if isinstance(axes, tuple):
            return tuple(self._move(one) for one in axes)
        return {name: self._move(one) for name, one in axes.items()} if isinstance(axes, dict) else axes


def _grouping(parts: Sequence[Grouping], starts: Sequence[int]) -> Grouping:
    pairs = list(zip(parts, starts, strict=True))
    return Grouping(
        np.concatenate([part.group + start for part, start in pairs]),
        sum(part.count for part in parts),
        _tables(pairs) if any(part.parts is not None for part in parts) else None,
        np.concatenate([part.kind for part in parts]),
        np.concatenate([part.tangled + start for part, start in pairs]),
    )


def _tables(pairs: Sequence[tuple[Grouping, int]]) -> Integers:
    """The parts of all groups, in as many columns as the widest table has."""
    tables = [part.parts if part.parts is not None else np.arange(part.count)[:, None] for part, _ in pairs]
    width = max(table.shape[1] for table in tables)
    rows = [
        np.pad(np.where(table >= 0, table + start, -1), ((0, 0), (0, width - table.shape[1])), constant_values=-1)
        for table, (_, start) in zip(tables, pairs, strict=True)
    ]
    return np.concatenate(rows)
