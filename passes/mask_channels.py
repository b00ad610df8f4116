"""MaskChannels: choose groups of channels and zero them everywhere they reach."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxcompress import processes
from fxcompress.analysis import gradients, latency
from fxcompress.analysis.budget import Budget, Latency, read_budget
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
from fxcompress.analysis.layers import InPython, LayerRatio, matching_layers, ratios_of_layers, read_layers, read_ratios
from fxcompress.analysis.plans import HEADS, ChannelPlan, choose, choose_all, shares_of_layers
from fxcompress.analysis.trial import refusals, to_zero
from fxcompress.errors import BudgetError, InputError, OptionError
from fxcompress.graph import edit
from fxcompress.graph.batches import read_batches, read_pairs
from fxcompress.graph.metadata import graph_info
from fxcompress.passes.remove_channels import RemoveChannels
from fxcompress.pipeline.base import Contract, Pass, PassContext, PassResult, check_choice, check_fraction, data_field
from fxcompress.train.data import is_shared
from fxcompress.train.losses import find_loss

SCOPES = ("global", "layer")

#: How often a choice is made anew because some of it could not be removed.
_ROUNDS = 3


@dataclass(frozen=True)
class ChannelOptions(Pass):
    """The options that `MaskChannels` and `PruneChannels` share; they are described there."""

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

    Args:
        ratio: share of the channels to mask, 0 <= ratio < 1; of every layer, or of all layers together.
        budget: instead of a ratio, `fxc.Parameters(0.5)`, `fxc.MACs(0.5)`, `fxc.Bytes(0.5)` or text such as "macs:0.5",
            met within 3 %; or `fxc.Latency(0.5)`, `fxc.Latency(ms=5.0, batch=1)`, "latency:5ms": candidates are pruned
            and timed on this machine, within 10 %, and none is taken that is slower than the model as it is.
        importance: "l1", "l2", "lamp", "fpgm", "bn_scale", "random"; "taylor", "hessian" or "activation", which need
            data; or a function(weight, dimension) -> scores of shape (weight.shape[dimension],), at least 0. What they
            are, and the papers: `fxcompress.analysis.importance`.
        scope: "global" (all layers ranked together) or "layer" (the same share of every layer).
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

    name: ClassVar[str] = "mask-channels"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Plan and zero, until there is nothing more to zero.

        Masks change the scores of the channels that are left, and with them which of these could make up for one that
        had to be spared. Criteria that need data, and functions, are asked once.
        """
        criterion = self._criterion()
        once = isinstance(self.budget, Latency) or not isinstance(criterion, str) or criterion in DATA_CRITERIA
        total, plan, metrics = 0, None, dict[str, Any]()
        for _ in range(1 if once else _ROUNDS):
            plan, metrics = self._plan(graph_module, context)
            edits = mask(graph_module, plan)
            if not edits:
                break
            total = edits
        notes = tuple(plan.notes("masked")) if plan is not None else ()
        return PassResult(graph_module, total > 0, total, notes, metrics)

    def _plan(self, graph_module: fx.GraphModule, context: PassContext) -> tuple[ChannelPlan, dict[str, Any]]:
        analysis = analyse(graph_module, ignore=matching_layers(graph_module, self.ignore, context.model))
        ratios: tuple[LayerRatio, ...] = self.ratios
        shares = shares_of_layers(analysis, ratios_of_layers(graph_module, ratios, context.model))
        scores = self._score(graph_module, analysis, context)

        everything = choose_all(analysis, scores, self.heads)
        fixed = refusals(graph_module, everything) if everything.dead.any() else {}

        def plan_for(ratio: float | None, budget: Budget | None = None) -> ChannelPlan:
            def decide(kept: Mapping[int, str]) -> ChannelPlan:
                return choose(
                    graph_module, analysis, scores, ratio=ratio, budget=budget, scope=self.scope,
                    round_to=self.round_to, heads=self.heads, shares=shares, kept=kept,
                    relative=not compares_across_layers(self._criterion()),
                )  # fmt: skip

            return _of_what_can_go(graph_module, everything, fixed, decide)

        if isinstance(self.budget, Latency):
            return self._meet_latency(self.budget, graph_module, context, plan_for, scores)
        return plan_for(self.ratio, self.budget if isinstance(self.budget, Budget) else None), {}

    def _meet_latency(
        self,
        budget: Latency,
        graph_module: fx.GraphModule,
        context: PassContext,
        plan_for: Callable[[float], ChannelPlan],
        scores: Floats,
    ) -> tuple[ChannelPlan, dict[str, Any]]:
        """Prune copies for real, time them against the graph as it is, and return the plan of the best."""
        if budget.ms is not None and (context.whole is not None or graph_info(graph_module).regions):
            raise BudgetError(
                f"{budget} is for a whole model, but this one is captured in pieces: give a fraction, "
                f"such as fxc.Latency(0.5), which every piece meets by itself"
            )
        inputs = latency.with_batch(context.example_inputs, budget.batch)
        quiet = dataclasses.replace(context, progress=lambda description, done, total: None)

        def pruned(plan: ChannelPlan) -> fx.GraphModule:
            candidate = copy.deepcopy(graph_module)
            mask(candidate, plan)
            removed = RemoveChannels().run(candidate, quiet).graph_module
            removed.recompile()
            return removed

        def measure(plan: ChannelPlan) -> latency.Pair:
            return latency.time_pair(graph_module, pruned(plan), inputs)

        unchanged = plan_for(0.0)
        before = dataclasses.replace(unchanged, dead=scores == -1.0)  # by an earlier run, perhaps of this very pass
        search = latency.Search(budget, plan_for, measure, context.progress)

        def find() -> tuple[Any, ...]:
            outcome = search.run(before if before.dead.any() else unchanged)
            return outcome.plan.dead, outcome.plan.reasons, outcome.metrics

        dead, reasons, metrics = processes.from_main(find, "measuring latency")
        return dataclasses.replace(unchanged, dead=dead, reasons=reasons), metrics

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


def _of_what_can_go(
    graph_module: fx.GraphModule,
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
        refused = refusals(graph_module, plan)
        if not refused:
            return plan
        kept = {**kept, **refused}
    dead = plan.dead.copy()
    dead[list(kept)] = False
    return dataclasses.replace(plan, dead=dead, reasons={**plan.reasons, **kept})


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
