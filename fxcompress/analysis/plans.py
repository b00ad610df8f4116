"""Frozen plans about channels: which groups to mask, which to remove, and why the others stay."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import fx

from fxcompress.analysis.budget import Budget, CostOfChoice
from fxcompress.analysis.channels import Axis, ChannelAnalysis, Floats, ParameterAxis
from fxcompress.analysis.grouping import Booleans, Integers
from fxcompress.analysis.importance import families, widths
from fxcompress.analysis.importance import members as members_of_families
from fxcompress.errors import BudgetError, UnsupportedError
from fxcompress.graph import edit
from fxcompress.pipeline.base import Note

#: What can go from attention heads.
HEADS = ("positions", "whole", "both")


@dataclass(frozen=True)
class ChannelPlan:
    """A decision about the channels of a graph.

    dead: which groups go, shape (groups,). reasons: why a group stays, where there is more to say than that it was
    not chosen.
    """

    analysis: ChannelAnalysis
    dead: Booleans
    reasons: dict[int, str]

    def alive(self, axis: Axis) -> Booleans:
        """Return which indices of an axis survive."""
        return self.analysis.alive(axis, self.dead)

    def producers(self) -> list[ParameterAxis]:
        """Return the dimensions of weights where channels are made."""
        return [parameter for parameter in self.analysis.parameters if parameter.producer]

    def notes(self, verb: str) -> list[Note]:
        """Return one ledger line per layer that makes channels, e.g. "pruned 64 -> 32"."""
        lines = []
        for parameter in self.producers():
            alive = self.alive(parameter.axis)
            path = parameter.paths[0]
            layer = path.rpartition(".")[0] if path.rpartition(".")[2] == "weight" else path
            kept = int(alive.sum())
            if kept < len(alive):
                lines.append(Note(layer, f"{verb} {len(alive)} -> {kept}"))
            else:
                lines.append(Note(layer, f"not {verb}: {self.why(parameter.axis)}"))
        return lines

    def why_kept(self, group: int) -> str | None:
        """Return why a group stays, if there is more to say than that it was not chosen."""
        return self.analysis.frozen.get(group) or self.reasons.get(group)

    def why(self, axis: Axis) -> str:
        """Return why the indices of an axis stay: the most frequent reason among its groups."""
        found = Counter(
            self.why_kept(group) or "no channel was chosen" for group in np.unique(self.analysis.groups(axis)).tolist()
        )
        return found.most_common(1)[0][0]

    def __str__(self) -> str:
        return "\n".join(str(note) for note in self.notes("pruned"))


def choose(
    graph_module: fx.GraphModule,
    analysis: ChannelAnalysis,
    scores: Floats,
    *,
    ratio: float | None,
    budget: Budget | None,
    scope: str,
    round_to: int,
    heads: str = "positions",
    max_ratio: float = 0.95,
    shares: Floats | None = None,
    relative: bool = True,
    kept: Mapping[int, str] | None = None,
    cost: CostOfChoice | None = None,
) -> ChannelPlan:
    """Choose the groups to mask.

    Args:
        scores: importance of every group; NaN where it cannot be judged, which keeps the group.
        ratio: share of the free channels to mask; or None with a budget, or where only `shares` count.
        scope: "global" ranks all groups together, each divided by the mean score of its family; "layer" masks the same
            share of every family.
        round_to: every family keeps a multiple of this many channels (as far as it has them).
        heads: whether positions within a head, whole heads, or both can go (`HEADS`).
        max_ratio: with the global scope no family loses more than this share.
        shares: shape (groups,), the share of its own that a group's family loses instead of `ratio`, NaN for none;
            with the global scope and a ratio or budget it is the most that the family loses.
        relative: whether scores are divided by the mean of their family before families are ranked together.
        kept: groups that stay, with the reason.
        cost: of the whole network, where the graph is not all of it.

    Raises:
        BudgetError: the budget cannot be met within 3 %.
    """
    if ratio is None and budget is None:
        scope = "layer"
    chooser = _Chooser(analysis, scores, scope, round_to, heads, max_ratio, shares, relative, kept or {})
    if budget is None:
        dead = chooser.choose(ratio or 0.0)
    else:
        dead = _meet(budget, chooser, cost or CostOfChoice(graph_module, analysis))
    return ChannelPlan(analysis, dead, dict(chooser.reasons))


def choose_all(analysis: ChannelAnalysis, scores: Floats, heads: str = "positions") -> ChannelPlan:
    """Choose every group that can be chosen: all but the most important one of every axis."""
    chooser = _Chooser(analysis, scores, "layer", 1, heads, 1.0, None, True, {})
    return ChannelPlan(analysis, chooser.choose_all(), dict(chooser.reasons))


def choosable(analysis: ChannelAnalysis, scores: Floats, kept: Mapping[int, str]) -> list[Integers]:
    """Return the groups of every family that can be chosen: free, judged, and not among those that are kept."""
    return _Chooser(analysis, scores, "layer", 1, "positions", 1.0, None, True, kept).members


def shares_of_layers(analysis: ChannelAnalysis, ratios: Mapping[str, float]) -> Floats:
    """Return the share that the family of every group is to lose, shape (groups,); NaN where none is given.

    Args:
        ratios: path of a layer -> share. Where layers of one family differ, the last one counts.
    """
    shares = np.full(analysis.group_count, np.nan)
    by_layer: dict[str, list[ParameterAxis]] = {}
    for parameter in analysis.parameters:
        if parameter.producer:
            for path in parameter.paths:
                by_layer.setdefault(path.rpartition(".")[0], []).append(parameter)
    for layer, share in ratios.items():
        for parameter in by_layer.get(layer, []):
            shares[np.unique(analysis.groups(parameter.axis))] = share
    return shares


class _Chooser:
    """Ranks the groups of every family and answers for any ratio."""

    def __init__(
        self,
        analysis: ChannelAnalysis,
        scores: Floats,
        scope: str,
        round_to: int,
        heads: str,
        max_ratio: float,
        shares: Floats | None,
        relative: bool,
        kept: Mapping[int, str],
    ) -> None:
        self.analysis, self.scope, self.round_to = analysis, scope, round_to
        self.relative = relative
        self.shares = np.full(analysis.group_count, np.nan) if shares is None else shares
        free = analysis.free() & (families(analysis) >= 0)
        spared = _spared_parts(analysis, free, heads)
        judged = free & ~np.isnan(scores) & ~spared
        judged[list(kept)] = False
        self.reasons = dict.fromkeys(np.flatnonzero(free & ~judged).tolist(), "the criterion cannot judge it")
        self.reasons.update(
            dict.fromkeys(np.flatnonzero(spared).tolist(), f"heads={heads!r} takes other channels of it")
        )
        self.reasons.update(kept)
        self.is_part = analysis.grouping.kind > 0 if heads == "both" else np.zeros(analysis.group_count, dtype=bool)
        self.scores, self.width = scores, widths(analysis)
        self.members = members_of_families(analysis, judged)
        self.axes = _distinct_axes(analysis)
        # All members, family after family: which one each belongs to, and what may go.
        sizes = [len(members) for members in self.members]
        self.all = np.concatenate(self.members) if self.members else np.zeros(0, dtype=np.int64)
        self.owner = np.repeat(np.arange(len(sizes)), sizes)
        most = [min(max_ratio, np.nan_to_num(self.shares[members[0]], nan=1.0)) for members in self.members]
        limits = [int(size * share + 1e-9) for size, share in zip(sizes, most, strict=True)]
        limits = sizes if scope == "layer" else limits
        units = [self.round_to // math.gcd(self.round_to, self._width(members)) for members in self.members]
        self.blocks = _Blocks.of(sizes, units, limits)

    def counts(self, ratio: float) -> tuple[int, ...]:
        """Return the numbers of groups that a ratio asks for: all of it that `choose` depends on."""
        return tuple(self._even(ratio, self.members)) if self.scope == "layer" else (self._in_all(ratio),)

    def choose(self, ratio: float) -> Booleans:
        """Return the groups to mask for a ratio.

        Rounding, and axes that would become empty, spare groups; others are chosen in their place until nothing
        changes. A group that is masked already comes first, so that a second run chooses what the first one did.
        """
        dead = np.zeros(self.analysis.group_count, dtype=bool)
        while True:
            more = self._extended(ratio, dead)
            if more.sum() <= dead.sum():
                return more
            dead = more  # what was spared beside groups that were spared as well may go now

    def _extended(self, ratio: float, dead: Booleans) -> Booleans:
        """Choose on top of the groups that are dead, without trying again what was spared once."""
        spared = np.zeros_like(dead)
        while True:
            scores = np.where(dead, -1.0, np.where(spared, np.inf, self.scores))
            wanted = self._wanted(ratio, scores)
            chosen = self._revive(wanted.copy(), scores)
            if (chosen == wanted).all():
                return chosen
            dead, spared = chosen, spared | (wanted & ~chosen)

    def choose_all(self) -> Booleans:
        """Return every group that can be chosen."""
        dead = np.zeros(self.analysis.group_count, dtype=bool)
        for members in self.members:
            dead[members] = True
        return self._revive(dead, self.scores)

    def _wanted(self, ratio: float, scores: Floats) -> Booleans:
        """The least important groups, in whole blocks; those with an infinite score have been spared before."""
        wanted = np.zeros(self.analysis.group_count, dtype=bool)
        if not self.members:
            return wanted
        ranked = self.all[np.lexsort((scores[self.all], self.owner))]  # one family after the other, each by importance
        if self.scope == "layer":
            left = np.bincount(self.owner[np.isfinite(scores[self.all])], minlength=len(self.members))
            taken = self.blocks.within(np.minimum(self._even(ratio, self.members), left))
        else:
            taken = self.blocks.lowest(self._relative(scores[ranked]), self._in_all(ratio))
        wanted[ranked[self.blocks.places < taken[self.owner]]] = True
        return wanted & ~np.isinf(scores)

    def _even(self, ratio: float, ranked: list[Integers]) -> list[int]:
        """The same share of every family that has none of its own.

        Where heads and positions both go, what is left is a product of two.
        """
        own = [self.shares[members[0]] for members in ranked]
        wanted = [ratio if math.isnan(share) else float(share) for share in own]
        shares = [
            1 - math.sqrt(1 - share) if self.is_part[members[0]] else share
            for members, share in zip(ranked, wanted, strict=True)
        ]
        return [int(len(members) * share + 1e-9) for members, share in zip(ranked, shares, strict=True)]

    def _relative(self, scores: Floats) -> Floats:
        """Divide each score by the mean of its family, if so wanted; they come one family after the other."""
        if not self.relative:
            return scores
        finite = np.isfinite(scores)
        values, owner = scores[finite].clip(min=0), self.owner[finite]
        counts = np.bincount(owner, minlength=len(self.members))
        means = np.bincount(owner, values, minlength=len(self.members)) / counts.clip(min=1)
        relative: Floats = scores / np.where(means > 0, means, 1.0)[self.owner]
        return relative

    def _in_all(self, ratio: float) -> int:
        """How many groups a share of all of them is."""
        return int(len(self.all) * ratio + 1e-9)

    def _width(self, members: Integers) -> int:
        """How many channels each group of a family is."""
        return max(int(self.width[members[0]]), 1)

    def _revive(self, dead: Booleans, scores: Floats) -> Booleans:
        """Keep the most important group of every axis that would lose all of its indices."""
        for axis in self.axes:
            groups = self.analysis.groups(axis)
            if dead[groups].any(axis=0).all():
                weakest = np.nan_to_num(scores[groups], nan=np.inf).min(axis=0)  # of the groups that an index needs
                best = groups[:, int(np.argmax(weakest))]
                dead[best] = False
        return dead


@dataclass(frozen=True)
class _Blocks:
    """What families can lose: blocks of channels, each of which leaves a multiple of `round_to`.

    Channels stand one family after the other, each family from its least important one on.

    places: of a channel in its family. block: that a channel is in, -1 for those that stay. owner, size: of a block.
    ends: for every family, how many channels it has lost after each of its blocks.
    """

    places: Integers
    block: Integers
    owner: Integers
    size: Integers
    ends: tuple[Integers, ...]

    @classmethod
    def of(cls, sizes: list[int], units: list[int], limits: list[int]) -> _Blocks:
        """Cut families.

        Args:
            sizes: of families. units: what is left of each is a multiple of it, and not nothing. limits: how many
                channels each may lose.
        """
        ends = []
        for size, unit, limit in zip(sizes, units, limits, strict=True):
            end = np.arange((size - 1) // unit * unit, 0, -unit)
            ends.append((size - end)[size - end <= limit])
        counts = [len(end) for end in ends]
        first = np.cumsum([0, *counts])
        places = [np.arange(size) for size in sizes]
        block = [
            np.where(place < end[-1], at + np.searchsorted(end, place, "right"), -1) if len(end) else np.full(size, -1)
            for place, end, size, at in zip(places, ends, sizes, first[:-1], strict=True)
        ]
        none = [np.zeros(0, dtype=np.int64)]
        return cls(
            places=np.concatenate(none + places), block=np.concatenate(none + block),
            owner=np.repeat(np.arange(len(sizes)), counts),
            size=np.concatenate(none + [np.diff(end, prepend=0) for end in ends]), ends=tuple(ends),
        )  # fmt: skip

    def within(self, wanted: Integers) -> Integers:
        """Return how many channels go from every family, at most as many as wanted."""
        return np.array([int(end[end <= most].max(initial=0)) for end, most in zip(self.ends, wanted, strict=True)])

    def lowest(self, scores: Floats, most: int) -> Integers:
        """Return how many channels go from every family when those blocks go whose mean score is lowest.

        Args:
            scores: of the channels. most: how many may go in all; blocks that are larger than what is left of it stay.
        """
        inside = self.block >= 0
        means = np.bincount(self.block[inside], scores[inside], minlength=len(self.size)) / self.size
        order = np.argsort(means, kind="stable")
        certain = int(np.searchsorted(np.cumsum(self.size[order]), most, "right"))
        taken = np.bincount(self.owner[order[:certain]], minlength=len(self.ends))  # blocks of every family
        left = most - int(self.size[order[:certain]].sum())
        for owner in self.owner[order[certain:]].tolist():
            if left <= 0:
                break
            ends = self.ends[owner]
            size = int(ends[taken[owner]] - (ends[taken[owner] - 1] if taken[owner] else 0))
            if size <= left:  # where it is not, no later block of the family goes either: this one stays the next
                taken[owner] += 1
                left -= size
        return np.array([int(end[count - 1]) if count else 0 for end, count in zip(self.ends, taken, strict=True)])


def _spared_parts(analysis: ChannelAnalysis, free: Booleans, heads: str) -> Booleans:
    """Mark the parts that stay because others of the same dimension are to go: heads, or positions within heads."""
    spared = np.zeros(analysis.group_count, dtype=bool)
    parts = analysis.grouping.parts
    if parts is None or heads == "both":
        return spared
    wanted = 2 if heads == "positions" else 1
    known = parts >= 0
    kind = np.where(known, analysis.grouping.kind[parts], 0)
    rows = ((kind == wanted) & free[parts]).any(axis=1)
    others = known & (kind == 3 - wanted) & rows[:, None]
    spared[parts[others]] = True
    return spared


def _distinct_axes(analysis: ChannelAnalysis) -> list[Axis]:
    """Every axis of every node, once."""
    found: dict[bytes, Axis] = {}

    def visit(axes: object) -> None:
        if isinstance(axes, Axis):
            found.setdefault(axes.atoms.tobytes(), axes)
        elif isinstance(axes, tuple):
            for item in axes:
                visit(item)

    for axes in analysis.axes.values():
        visit(axes)
    return [axis for axis in found.values() if len(axis)]


def _meet(budget: Budget, chooser: _Chooser, cost: CostOfChoice) -> Booleans:
    """Search the ratio whose choice comes nearest to the budget."""
    nothing = np.zeros(chooser.analysis.group_count, dtype=bool)
    full = cost(budget.quantity, nothing)
    target = budget.target(full)
    masked: Booleans = chooser.scores == -1.0  # by an earlier run, perhaps of this very pass
    best, best_cost = masked, cost(budget.quantity, masked)
    if abs(best_cost - target) <= 0.03 * target:
        return masked
    low, high = 0.0, 1.0 - 1e-9
    known: dict[tuple[int, ...], Booleans] = {}
    for _ in range(40):
        middle = (low + high) / 2
        asked = chooser.counts(middle)
        if asked not in known:
            known[asked] = chooser.choose(middle)
        dead = known[asked]
        found = cost(budget.quantity, dead)
        near = abs(found - target) < abs(best_cost - target)
        if near and (found >= target or budget.way is None):  # nothing comes back on the way
            best, best_cost = dead, found
        low, high = (middle, high) if found > target else (low, middle)
    if abs(best_cost - target) > 0.03 * target and budget.way is None:
        least = cost(budget.quantity, chooser.choose(1.0 - 1e-9))
        raise BudgetError(
            f"a budget of {target:,.0f} {budget.quantity} cannot be met within 3 %: the nearest choice of channels has "
            f"{best_cost:,.0f}, the whole network {full:,.0f}, the smallest possible {least:,.0f}. Allow more with a "
            f"larger budget, a smaller round_to or fewer ignored layers"
        )
    return best


def removable(graph_module: fx.GraphModule, analysis: ChannelAnalysis) -> ChannelPlan:
    """Find the groups that can be removed without changing the function: every read of them is harmless.

    Raises:
        UnsupportedError: a layer would lose all of its channels because all of its weights are zero.
    """
    free = analysis.free()
    harmful = np.zeros(analysis.group_count, dtype=bool)
    reasons: dict[int, str] = {}
    for read in analysis.reads:
        groups = analysis.groups(read.axis)
        bad = np.unique(groups[:, ~read.harmless])
        for group in bad[~harmful[bad]].tolist():
            reasons[group] = read.why
        harmful[bad] = True
    dead = free & ~harmful
    dead[families(analysis) < 0] = False
    for axis in _distinct_axes(analysis):
        groups = analysis.groups(axis)
        if dead[groups].any(axis=0).all():
            _refuse_empty_layer(graph_module, analysis, groups)
            dead[groups[:, 0]] = False
            reasons.update(dict.fromkeys(groups[:, 0].tolist(), "the last channel stays"))
    return ChannelPlan(analysis, dead, reasons)


def _refuse_empty_layer(graph_module: fx.GraphModule, analysis: ChannelAnalysis, groups: Integers) -> None:
    wanted = set(np.unique(groups).tolist())
    for parameter in analysis.parameters:
        if parameter.producer and set(np.unique(analysis.groups(parameter.axis)).tolist()) <= wanted:
            weight = edit.attribute(graph_module, parameter.paths[0])
            if len(groups[0]) > 1 and not weight.detach().any():
                raise UnsupportedError(
                    f"{parameter.paths[0].rpartition('.')[0]!r} would lose all of its {weight.shape[0]} channels: "
                    f"every weight is zero. Mask fewer of them, or take the layer out of the model"
                )
