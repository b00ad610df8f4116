"""MaskChannels: choose groups of channels and zero them everywhere they reach."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxcompress import processes
from fxcompress.analysis import gradients, latency, layer_latency
from fxcompress.analysis.budget import Budget, CostOfChoice, Latency, read_budget
from fxcompress.analysis.channels import ChannelAnalysis, Floats, analyse
from fxcompress.analysis.importance import (
    AGGREGATES,
    CRITERIA,
    DATA_CRITERIA,
    GRADIENT_CRITERIA,
    Function,
    compares_across_layers,
    score,
)
from fxcompress.analysis.joint import Joint, join
from fxcompress.analysis.layer_latency import give_back
from fxcompress.analysis.layers import InPython, LayerRatio, matching_layers, ratios_of_layers, read_layers, read_ratios
from fxcompress.analysis.plans import HEADS, ChannelPlan, choose, choose_all, shares_of_layers
from fxcompress.analysis.schedule import Way
from fxcompress.analysis.trial import masked, refusals, to_zero
from fxcompress.errors import InputError, OptionError
from fxcompress.graph import edit
from fxcompress.graph.batches import read_batches, read_pairs
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import graph_info
from fxcompress.passes.remove_channels import RemoveChannels
from fxcompress.pipeline.base import (
    Contract,
    Note,
    Pass,
    PassContext,
    PassResult,
    Piece,
    check_choice,
    check_fraction,
    data_field,
)
from fxcompress.train.data import is_shared
from fxcompress.train.losses import find_loss

SCOPES = ("global", "layer")

#: How often a choice is made anew because some of it could not be removed.
_ROUNDS = 3


@dataclass(frozen=True)
class ChannelOptions(Pass):
    """The options that `MaskChannels` and `PruneChannels` share. The docstrings of both end with this list.

    Args:
        ratio: share of the channels to take, 0 <= ratio < 1; of every layer, or of all layers together.
        budget: instead of a ratio, `fxc.Parameters(0.5)`, `fxc.MACs(0.5)`, `fxc.Bytes(0.5)` or text such as "macs:0.5",
            met within 3 %; or `fxc.Latency(0.5)`, `fxc.Latency(ms=5.0, batch=1)`, "latency:5ms": candidates are pruned
            and timed on this machine, within 10 %, and none is taken that is slower than the model as it is. Layers
            that are slower at their new size get channels back. A budget is that of the whole model, also where parts
            of it stay Python.
        importance: "l1", "l2", "lamp", "fpgm", "bn_scale", "random"; "taylor", "hessian" or "activation", which need
            data; or a function(weight, dimension) -> scores of shape (weight.shape[dimension],), at least 0. What they
            are, and the papers: `fxcompress.analysis.importance`.
        scope: "global" (all layers of the whole model ranked together) or "layer" (the same share of every layer).
        round_to: every layer keeps a multiple of this many channels.
        heads: what goes from attention heads: "positions" (every head becomes narrower), "whole" (fewer heads) or
            "both" (a little of each).
        ignore: layers whose channels stay: dotted paths or patterns ("features.0", "head.*"), modules of the model
            (`model.head`) or types (`nn.Linear`).
        seed: for random importance.
        ratios: shares for single layers, {"features.0": 0.3, "head.*": 0.0}, instead of `ratio`; with the global scope
            the most that a layer loses. Of several patterns that match, the last counts. Without a ratio or budget
            all other layers stay as they are.
        aggregate: how the scores of all indices of a group become one: "mean", "sum" or "max".
        loss: for "taylor" and "hessian": "cross_entropy", "mse", ..., see `Train`; or give `loss_function`.
        batches: how many batches of the data to take at most; None takes all.
        data: batches of (input, target) for "taylor" and "hessian", batches of inputs for "activation"; or
            `fxc.compile(train_data=...)` and `fxc.compile(calibration=...)`.
        loss_function: loss(output, target) -> scalar tensor, the mean over the samples.
    """

    ratio: float | None = None
    budget: Budget | Latency | str | None = None
    importance: Any = "l2"
    scope: str = "global"
    round_to: int = 1
    heads: str = "positions"
    ignore: Any = ()
    seed: int = 0
    ratios: Any = ()
    aggregate: str = "mean"
    loss: str = "cross_entropy"
    batches: int | None = None
    data: Any = data_field()
    loss_function: Callable[[Any, Any], torch.Tensor] | None = data_field()

    contract: ClassVar[Contract] = Contract.APPROXIMATE

    def __init_subclass__(cls) -> None:
        _, heading, options = inspect.cleandoc(ChannelOptions.__doc__ or "").partition("Args:")
        cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{heading}{options}"

    def __post_init__(self) -> None:
        name = type(self).__name__
        self._set(ignore=read_layers(self.ignore), ratios=read_ratios(self.ratios))
        if (self.ratio is not None and self.budget is not None) or not self._says_how_much():
            raise OptionError(
                f"{name} takes either a ratio or a budget: {name}(ratio=0.5) or {name}(budget='macs:0.5'); or ratios "
                f"for layers alone: {name}(ratios={{'features.*': 0.5}})"
            )
        if self.ratio is not None:
            check_fraction(name, "ratio", self.ratio)
        if self.budget is not None:
            self._set(budget=read_budget(self.budget))
        if callable(self.importance):
            self._set(importance=InPython(self.importance))
        if not isinstance(self.importance, InPython):
            check_choice(name, "importance", self.importance, CRITERIA, "or in Python a function(weight, dimension)")
        check_choice(name, "aggregate", self.aggregate, AGGREGATES)
        check_choice(name, "scope", self.scope, SCOPES)
        check_choice(name, "heads", self.heads, HEADS)
        for option, number in (("round_to", self.round_to), ("batches", self.batches)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise OptionError(f"{name}: {option} must be a positive whole number, not {number!r}")
        find_loss(self.loss_function or self.loss)

    def _says_how_much(self) -> bool:
        return self.ratio is not None or self.budget is not None or bool(self.ratios)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class MaskChannels(ChannelOptions):
    """Choose groups of channels by importance and zero every weight that belongs to them.

    1. Channels that belong together (through residual adds, depthwise convolutions, concatenation, ...) are one group.
    2. The least important groups are masked: their slices of every weight, bias and normalisation become zero, both
       where the channels are made and where they are read, so that removing them afterwards changes nothing.
    3. Outputs of the model, and channels that an operator fixes, stay; the ledger says why. So do channels that
       `RemoveChannels` would have to keep although they are masked.
    """

    name: ClassVar[str] = "mask-channels"

    def on_the_way(self, way: Way) -> MaskChannels:
        """Return the pass that masks smaller shares, or meets a point on the way to the budget."""
        return dataclasses.replace(
            self,
            ratio=None if self.ratio is None else way.gone(self.ratio),
            budget=None if self.budget is None else dataclasses.replace(read_budget(self.budget), way=way),
            ratios=tuple(LayerRatio(item.pattern, way.gone(item.ratio)) for item in self.ratios),
        )

    @property
    def joins(self) -> bool:
        """Whether channels of all pieces of a model are ranked together, or share a budget."""
        return self.budget is not None or self.scope == "global"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Plan and zero, until there is nothing more to zero.

        Masks change the scores of the channels that are left, and with them which of these could make up for one that
        had to be spared. Criteria that need data, functions and clocks are asked once; the graph remembers that.
        """
        piece = Piece(graph_module, context)
        if self._has_chosen(graph_module):
            return PassResult(graph_module, False)
        total, decision = 0, None
        for _ in range(self._rounds()):
            decision = self._plan([piece])
            edits = mask(graph_module, decision.plans[0])
            if not edits:
                break
            total = edits
        notes = decision.notes(0) if decision is not None else ()
        self._remember_choice(graph_module)
        return PassResult(graph_module, total > 0, total, notes, decision.metrics if decision is not None else {})

    def decide(self, pieces: Sequence[Piece]) -> Sequence[Pass]:
        """Plan over all pieces of a model; masks are tried out and taken back."""
        if all(self._has_chosen(piece.graph_module) for piece in pieces):
            return [_Decided(self, 0, ()) for _ in pieces]
        decisions = []
        with ExitStack() as stack:
            for _ in range(self._rounds()):
                decision = self._plan(pieces)
                decisions.append(decision)
                tried = list(zip(pieces, decision.plans, strict=True))
                if not any(_changes(piece.graph_module, plan) for piece, plan in tried):
                    break
                for piece, plan in tried:
                    stack.enter_context(masked(piece.graph_module, plan))
        return [_Decided(self, index, tuple(decisions)) for index in range(len(pieces))]

    def _rounds(self) -> int:
        return 1 if self._asks_once() else _ROUNDS

    def _asks_once(self) -> bool:
        criterion = self._criterion()
        return isinstance(self.budget, Latency) or not isinstance(criterion, str) or criterion in DATA_CRITERIA

    def _has_chosen(self, graph_module: fx.GraphModule) -> bool:
        """Whether this pass has masked the graph before, and no channel was removed since."""
        return self._asks_once() and graph_info(graph_module).choice == self._choice(graph_module)

    def _remember_choice(self, graph_module: fx.GraphModule) -> None:
        if self._asks_once():
            graph_info(graph_module).choice = self._choice(graph_module)

    def _choice(self, graph_module: fx.GraphModule) -> tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]:
        return str(self), tuple((path, tuple(one.shape)) for path, one in graph_module.named_parameters())

    def _plan(self, pieces: Sequence[Piece]) -> Decision:
        """Decide over one or several graphs together."""
        known = self._survey(pieces)
        everything = choose_all(known.joint.analysis, known.scores, self.heads)
        fixed = known.refused(everything)
        whole = pieces[0].context.around(pieces[0].graph_module)
        cost = None
        if isinstance(self.budget, Budget):
            named = [(piece.path, piece.graph_module) for piece in pieces]
            cost = CostOfChoice(whole.graph_module, known.joint.analysis, named)

        def plan_for(ratio: float | None, budget: Budget | None = None) -> ChannelPlan:
            def decide(kept: Mapping[int, str]) -> ChannelPlan:
                return choose(
                    whole.graph_module, known.joint.analysis, known.scores, ratio=ratio, budget=budget,
                    scope=self.scope, round_to=self.round_to, heads=self.heads, shares=known.shares, kept=kept,
                    relative=not compares_across_layers(self._criterion()), cost=cost,
                )  # fmt: skip

            return _of_what_can_go(known.refused, everything, fixed, decide)

        if isinstance(self.budget, Latency):
            budget, unchanged = self.budget, known.joint.split(plan_for(0.0))

            def find() -> tuple[Any, ...]:
                found = self._meet_latency(budget, known, plan_for)
                return [(plan.dead, plan.reasons) for plan in found.plans], found.metrics, found.given_back

            choices, *told = processes.from_main(find, "measuring latency")
            plans = zip(unchanged, choices, strict=True)
            return Decision(tuple(dataclasses.replace(plan, dead=d, reasons=r) for plan, (d, r) in plans), *told)
        plan = plan_for(self.ratio, self.budget if isinstance(self.budget, Budget) else None)
        return Decision(tuple(known.joint.split(plan)))

    def _survey(self, pieces: Sequence[Piece]) -> _Survey:
        """Look at all graphs, and score their channels."""
        ratios: tuple[LayerRatio, ...] = self.ratios
        analyses, shares, scores = [], [], []
        for piece in pieces:
            graph, model = piece.graph_module, piece.context.model
            analysis = analyse(graph, ignore=matching_layers(graph, self.ignore, model))
            analyses.append(analysis)
            shares.append(shares_of_layers(analysis, ratios_of_layers(graph, ratios, model)))
            scores.append(self._score(graph, analysis, piece.context))
        joint = join(analyses, [piece.path for piece in pieces])
        return _Survey(tuple(pieces), joint, np.concatenate(scores), np.concatenate(shares))

    def _meet_latency(self, budget: Latency, known: _Survey, plan_for: Callable[[float], ChannelPlan]) -> Decision:
        """Prune copies for real, time them against the model as it is, and return the plan of the best.

        Layers that are slower than before in that plan get channels back, unless the budget were missed.
        """
        context = known.pieces[0].context
        whole = context.around(known.pieces[0].graph_module)
        inputs = latency.with_batch(whole.inputs, budget.batch)

        def measure(plan: ChannelPlan) -> latency.Pair:
            candidate = _pruned(whole.graph_module, known.pieces, known.joint.split(plan))
            return latency.time_pair(whole.graph_module, candidate, inputs)

        unchanged = plan_for(0.0)
        before = dataclasses.replace(unchanged, dead=known.scores == -1.0)  # by an earlier run, perhaps of this pass
        search = latency.Search(budget, plan_for, measure, context.progress)
        outcome = search.run(before if before.dead.any() else unchanged)
        plans, notes = self._without_slower_layers(outcome.plan, known, _growth(whole.inputs, inputs))
        better = known.joint.merged(plans)
        if (better.dead == outcome.plan.dead).all():
            return Decision(tuple(known.joint.split(outcome.plan)), outcome.metrics)
        again = search.judge(better, outcome)
        given_back = notes if again.plan is better else ()
        return Decision(tuple(known.joint.split(again.plan)), again.metrics, given_back)

    def _without_slower_layers(
        self, plan: ChannelPlan, known: _Survey, batch: float
    ) -> tuple[list[ChannelPlan], tuple[tuple[Note, ...], ...]]:
        """What layers of each piece get back, and the lines of the ledger about it."""
        found = [
            give_back(
                piece.graph_module, own, scores, batch=batch, round_to=self.round_to,
                measure=layer_latency.time_layers,
            )
            for piece, own, scores in zip(
                known.pieces, known.joint.split(plan), known.joint.parted(known.scores), strict=True
            )
        ]  # fmt: skip
        return [own for own, _ in found], tuple(notes for _, notes in found)

    def _criterion(self) -> str | Function:
        return self.importance.value if isinstance(self.importance, InPython) else str(self.importance)

    def _score(self, graph_module: fx.GraphModule, analysis: ChannelAnalysis, context: PassContext) -> Floats:
        criterion, measured = self._criterion(), None
        if criterion in DATA_CRITERIA and analysis.free().any():
            measured = self._measure(str(criterion), graph_module, analysis, context)
        scores = score(
            graph_module, analysis, criterion, aggregate=self.aggregate, seed=self.seed, measured=measured
        )  # fmt: skip
        return processes.from_main(lambda: scores, "agreeing on importance")

    def _measure(
        self, criterion: str, graph_module: fx.GraphModule, analysis: ChannelAnalysis, context: PassContext
    ) -> gradients.Measured:
        """Run the data through a copy of the whole model."""
        whole, data = context.around(graph_module), self._find_data(criterion, context)

        def progress(done: int) -> None:
            context.progress(f"importance by {criterion}", done, self.batches)

        mine = processes.shared if is_shared(data) else iter
        if criterion == "activation":
            inputs = mine(itertools.islice(read_batches(data, whole.inputs), self.batches))
            return gradients.mean_activations(whole.graph_module, whole.path, graph_module, analysis, inputs, progress)
        pairs = mine(itertools.islice(read_pairs(data, whole.inputs), self.batches))
        return gradients.squared_gradients(
            whole.graph_module, whole.path, pairs, find_loss(self.loss_function or self.loss),
            by_sample=criterion == "hessian", progress=progress,
        )  # fmt: skip

    def _find_data(self, criterion: str, context: PassContext) -> Any:
        names = ("train_data", "calibration") if criterion in GRADIENT_CRITERIA else ("calibration", "train_data")
        found = [data for data in (self.data, *map(context.resources.get, names)) if data is not None]
        if not found:
            kind = "(input, target)" if criterion in GRADIENT_CRITERIA else "inputs"
            raise InputError(
                f"{type(self).__name__}: importance={criterion!r} needs batches of {kind}: give them to the pass "
                f"(data=...) or to fxcompress.compile({names[0]}=...)"
            )
        return found[0]


@dataclass(frozen=True)
class _Survey:
    """Graphs, their analyses put together, and the score and the share of its own (or NaN) of every group."""

    pieces: tuple[Piece, ...]
    joint: Joint
    scores: Floats
    shares: Floats

    def refused(self, plan: ChannelPlan) -> dict[int, str]:
        """Return the groups of a plan that could not be removed, with the reasons."""
        return self.joint.renumbered(
            refusals(piece.graph_module, part) if part.dead.any() else {}
            for piece, part in zip(self.pieces, self.joint.split(plan), strict=True)
        )


def _growth(example: ExampleInputs, inputs: ExampleInputs) -> float:
    """By what the batch size of the example is multiplied."""
    return inputs.tensors()[0].shape[0] / max(example.tensors()[0].shape[0], 1)


@dataclass(frozen=True)
class Decision:
    """What goes from each piece of a model, figures for the report, and what each piece got back."""

    plans: tuple[ChannelPlan, ...]
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    given_back: tuple[tuple[Note, ...], ...] = ()

    def notes(self, piece: int) -> tuple[Note, ...]:
        """Return the ledger of one piece."""
        return (*self.plans[piece].notes("masked"), *(self.given_back[piece] if self.given_back else ()))


@dataclass(frozen=True)
class _Decided(Pass):
    """Masks one piece as it was decided for all of them together."""

    decided_by: MaskChannels
    piece: int
    decisions: tuple[Decision, ...]

    contract: ClassVar[Contract] = Contract.APPROXIMATE

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Mask."""
        if not self.decisions:
            return PassResult(graph_module, False)
        edits = [mask(graph_module, decision.plans[self.piece]) for decision in self.decisions]
        self.decided_by._remember_choice(graph_module)
        last = self.decisions[-1]
        total = next((count for count in reversed(edits) if count), 0)
        metrics = last.metrics if self.piece == 0 else {}  # they are of the whole model
        return PassResult(graph_module, total > 0, total, last.notes(self.piece), metrics)

    def __str__(self) -> str:
        return str(self.decided_by)


def _pruned(root: fx.GraphModule, pieces: Sequence[Piece], plans: Sequence[ChannelPlan]) -> fx.GraphModule:
    """A copy of a model without what is planned to go from its pieces."""
    candidate = copy.deepcopy(root)
    for piece, plan in zip(pieces, plans, strict=True):
        own: fx.GraphModule = edit.attribute(candidate, piece.path) if piece.path else candidate
        quiet = dataclasses.replace(piece.context, progress=lambda description, done, total: None)
        mask(own, plan)
        RemoveChannels().run(own, quiet).graph_module.recompile()
    return candidate


def _of_what_can_go(
    refused: Callable[[ChannelPlan], Mapping[int, str]],
    everything: ChannelPlan,
    kept: Mapping[int, str],
    decide: Callable[[Mapping[int, str]], ChannelPlan],
) -> ChannelPlan:
    """Choose among the groups that can be removed once they are masked.

    What cannot (`kept`) was found by masking all of them (`everything`) for a moment, so that it depends neither on
    scores nor on the ratio. The most important group of a layer is not among them: where it is chosen nevertheless, the
    choice itself is tried.
    """
    for _ in range(_ROUNDS):
        plan = decide(kept)
        if not (plan.dead & ~everything.dead).any():
            return plan
        more = refused(plan)
        if not more:
            return plan
        kept = {**kept, **more}
    dead = plan.dead.copy()
    dead[list(kept)] = False
    return dataclasses.replace(plan, dead=dead, reasons={**plan.reasons, **kept})


def _changes(graph_module: fx.GraphModule, plan: ChannelPlan) -> bool:
    """Whether a plan would zero anything that is not zero."""
    return any(
        bool(torch.count_nonzero(tensor.detach().index_select(parameter.dimension, indices)))
        for parameter, tensor, indices in to_zero(graph_module, plan)
    )


def mask(graph_module: fx.GraphModule, plan: ChannelPlan) -> int:
    """Zero the planned channels and remember the masks. Returns the number of groups whose weights changed."""
    changed = False
    masks = graph_info(graph_module).masks
    for parameter, tensor, indices in to_zero(graph_module, plan):
        if torch.count_nonzero(tensor.detach().index_select(parameter.dimension, indices)):
            zeroed = tensor.detach().index_fill(parameter.dimension, indices, 0)
            edit.set_tied(graph_module, list(parameter.paths), zeroed)
            changed = True
        _remember(masks, parameter.paths, tensor, parameter.dimension, indices)
    return int(plan.dead.sum()) if changed else 0


def _remember(
    masks: dict[str, torch.Tensor], paths: Iterable[str], tensor: torch.Tensor, dimension: int, indices: torch.Tensor
) -> None:
    for path in paths:
        known = masks.get(path)
        full = torch.ones_like(tensor, dtype=torch.bool) if known is None else known
        masks[path] = full.index_fill(dimension, indices, False)
