"""Measured latency: two graphs timed in turns, and the search for a choice of channels that meets a budget in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.budget import Latency
from fxcompress.analysis.plans import ChannelPlan
from fxcompress.errors import BudgetError, InputError
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.shapes import evaluation

#: How near a choice has to come to the budget, as a share of it.
TOLERANCE = 0.10

#: The search ends at a choice as near as this.
_NEAR_ENOUGH = 0.03

_STEPS = 8


@dataclass(frozen=True)
class Pair:
    """Latencies of two calls, a dense graph and a pruned one for example, in milliseconds, taken in turns."""

    first_ms: float
    second_ms: float

    @property
    def ratio(self) -> float:
        """The second latency as a share of the first one; taken in turns, drift cancels."""
        return self.second_ms / self.first_ms


def time_pair(
    dense: fx.GraphModule, pruned: fx.GraphModule, inputs: ExampleInputs, rounds: int = 15, seconds: float = 1.0
) -> Pair:
    """Time two graphs in turns: in evaluation mode, without gradients, after a warm-up.

    Args:
        rounds: turns of each. seconds: about how long all of it takes; short graphs run several times a turn.

    Returns:
        The median time of the dense graph, and that time multiplied with the median ratio of the two in a round.
    """
    with evaluation(dense), evaluation(pruned), torch.no_grad():
        return in_turns(lambda: inputs.call(dense), lambda: inputs.call(pruned), rounds, seconds)


def in_turns(first: Callable[[], Any], second: Callable[[], Any], rounds: int, seconds: float) -> Pair:
    """Time two calls in turns, see `time_pair`."""
    for call in (first, second):
        call()
    once = max(_seconds(first, 1) + _seconds(second, 1), 1e-6)
    repeats = max(1, int(seconds / rounds / once))
    turns = [(_seconds(first, repeats), _seconds(second, repeats)) for _ in range(rounds)]
    median = 1e3 * statistics.median(turn[0] for turn in turns)
    return Pair(median, median * statistics.median(after / before for before, after in turns))


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def with_batch(inputs: ExampleInputs, batch: int) -> ExampleInputs:
    """Return inputs of another batch size, made of the first sample. Lists of samples stay as long as they are.

    Raises:
        InputError: the first input has no batch dimension.
    """
    if inputs.args and not isinstance(inputs.args[0], torch.Tensor):
        return inputs
    first = inputs.tensors()[0]
    if not first.ndim or not first.shape[0]:
        raise InputError("a latency budget needs example inputs with a batch dimension")
    size = first.shape[0]

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        if size == batch or not tensor.ndim or tensor.shape[0] != size:
            return tensor
        return tensor[:1].expand(batch, *tensor.shape[1:]).contiguous()

    return inputs.map(resize)


@dataclass(frozen=True)
class Outcome:
    """What a search came to: the plan, and figures for the report."""

    plan: ChannelPlan
    metrics: dict[str, Any]


@dataclass
class Search:
    """Bisection over the ratio of channels to mask, with every candidate measured.

    budget: what is to be met. plan_for: the choice for a ratio. measure: prunes a copy by a plan, and times it.
    progress: called as progress(description, done, total).
    """

    budget: Latency
    plan_for: Callable[[float], ChannelPlan]
    measure: Callable[[ChannelPlan], Pair]
    progress: Callable[[str, int, int | None], None] = lambda description, done, total: None
    tried: list[dict[str, float]] = field(default_factory=list)

    def run(self, start: ChannelPlan) -> Outcome:
        """Search, beginning with a plan that masks nothing but what is masked already.

        A candidate that is slower than the dense graph is never taken. Where the dense graph itself meets the budget,
        nothing is masked.

        Raises:
            BudgetError: no choice meets the budget; the message says what was reached.
        """
        first = self._try(start, 0.0)
        dense = Pair(first.first_ms, first.first_ms)
        best, best_pair, low, high = start, first if first.ratio <= 1 or start.dead.any() else dense, 0.0, 1.0
        if self._excess(best_pair) <= (TOLERANCE if start.dead.any() else _NEAR_ENOUGH):
            return self._outcome(best, best_pair, 0.0)
        ratio, fastest = 0.0, best_pair
        for _ in range(_STEPS):
            middle = (low + high) / 2
            plan = self.plan_for(middle)
            pair = self._try(plan, middle)
            fastest = min(fastest, pair, key=lambda one: one.ratio)
            if pair.ratio < 1 and self._distance(pair) < self._distance(best_pair):
                best, best_pair, ratio = plan, pair, middle
            if abs(self._excess(pair)) <= _NEAR_ENOUGH and pair.ratio < 1:
                break
            low, high = (middle, high) if self._excess(pair) > 0 else (low, middle)
        if self._excess(best_pair) > TOLERANCE and self.budget.way is None:
            raise BudgetError(self._message(fastest))
        return self._outcome(best, best_pair, ratio)

    def judge(self, plan: ChannelPlan, outcome: Outcome) -> Outcome:
        """Measure a variant of what the search came to, and return it instead unless it misses the budget."""
        ratio = float(outcome.metrics["ratio"])
        pair = self._try(plan, ratio)
        return self._outcome(plan, pair, ratio) if self._excess(pair) <= TOLERANCE else outcome

    def _try(self, plan: ChannelPlan, ratio: float) -> Pair:
        pair = self.measure(plan)
        self.tried.append({"ratio": ratio, "first_ms": pair.first_ms, "second_ms": pair.second_ms})
        self.progress(f"latency at ratio {ratio:.3f}: {pair.second_ms:.2f} ms", len(self.tried), _STEPS + 1)
        return pair

    def _excess(self, pair: Pair) -> float:
        """By what share of the target a latency is above it."""
        return pair.second_ms / self.budget.target(pair.first_ms) - 1

    def _distance(self, pair: Pair) -> tuple[bool, float]:
        """Smaller is better: within the tolerance first, then nearest to the target."""
        return self._excess(pair) > TOLERANCE, abs(self._excess(pair))

    def _message(self, fastest: Pair) -> str:
        reached = (
            f"the fastest choice of channels takes {fastest.second_ms:.3g} ms"
            if fastest.ratio < 1
            else "no choice of channels is faster than the model as it is, so none was taken"
        )
        return (
            f"a budget of {self.budget.target(fastest.first_ms):.3g} ms ({self.budget}) cannot be met within "
            f"{TOLERANCE:.0%}: {reached}, and the model as it is takes {fastest.first_ms:.3g} ms. Allow more time, a "
            f"smaller round_to or fewer ignored layers"
        )

    def _outcome(self, plan: ChannelPlan, pair: Pair, ratio: float) -> Outcome:
        metrics = {
            "target_ms": self.budget.target(pair.first_ms), "latency_ms": pair.second_ms, "first_ms": pair.first_ms,
            "batch": self.budget.batch, "ratio": ratio, "tried": self.tried,
        }  # fmt: skip
        return Outcome(plan, metrics)
