"""How much the loss grows when one family of channels alone is masked, at several ratios.

The measurement is that of Li et al., Pruning Filters for Efficient ConvNets, 2017 (section 3.2), for families of groups
instead of layers. From the same numbers come shares for every family that hurt all of them alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxcompress.analysis.channels import ChannelAnalysis, ParameterAxis, analyse
from fxcompress.analysis.grouping import Integers
from fxcompress.analysis.importance import CRITERIA, DATA_CRITERIA, Function, score
from fxcompress.analysis.plans import ChannelPlan, choosable, choose_all
from fxcompress.analysis.trial import masked, refusals
from fxcompress.errors import InputError, OptionError, UnsupportedError, did_you_mean
from fxcompress.graph.batches import read_batches, read_pairs
from fxcompress.graph.capture import trace
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import Stage, graph_info
from fxcompress.graph.regions import regions
from fxcompress.graph.shapes import evaluation
from fxcompress.pipeline.manager import PassManager
from fxcompress.pipeline.progress import progress_bar
from fxcompress.train.losses import Loss, find_loss

#: The ratios at which a family is masked.
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

#: What is measured where there are no targets.
ERROR = "relative squared error"


@dataclass(frozen=True)
class FamilySensitivity:
    """The losses of one family of groups.

    layer: the first layer that makes its channels. layers: all of them. channels: of the first layer that belong to the
    family. losses: one for each of `Sensitivity.steps`.
    """

    layer: str
    layers: tuple[str, ...]
    channels: int
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` measured.

    measure: what the losses are: the name of a loss, or "relative squared error" against the outputs of the model.
    baseline: the loss with nothing masked. steps: the ratios. families: in the order of the network.
    """

    measure: str
    baseline: float
    steps: tuple[float, ...]
    families: tuple[FamilySensitivity, ...]

    def ratios(self, target: float) -> dict[str, float]:
        """Return a share for every family, such that `target` of all channels go and the loss of each grows alike.

        Between two steps the loss is taken as straight, and as never falling. `PruneChannels(ratios=...)` takes the
        result.

        Raises:
            OptionError: the target is not at least 0, or above the largest step.
        """
        if not 0 <= target <= self.steps[-1]:
            raise OptionError(f"the target must be at least 0 and at most {self.steps[-1]}, not {target!r}")
        if not self.families:
            return {}
        weights = np.array([family.channels for family in self.families], dtype=np.float64)
        growth = [self._growth(family) for family in self.families]

        def shares(limit: float) -> Any:
            return np.array([_reached(rising, (0.0, *self.steps), limit) for rising in growth])

        low, high = 0.0, max(rising[-1] for rising in growth)
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if np.average(shares(middle), weights=weights) >= target else (middle, high)
        found = shares(high)
        mean = float(np.average(found, weights=weights))
        found = found * (target / mean) if mean > target else found  # families that cost nothing at all
        result: dict[str, float] = {}
        for family, share in zip(self.families, found, strict=True):
            result[family.layer] = min(result.get(family.layer, 1.0), round(float(share), 4))
        return result

    def _growth(self, family: FamilySensitivity) -> list[float]:
        """How much the loss has grown at most up to 0 and each step."""
        losses = [math.inf if math.isnan(loss) else loss for loss in family.losses]
        finite = [min(loss, 1e30) - self.baseline for loss in losses]
        return [float(value) for value in np.maximum.accumulate([0.0, *finite])]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        width = max([len(family.layer) for family in self.families], default=5)
        lines = [f"{self.measure}, {self.baseline:.4g} with nothing masked"]
        lines.append(f"{'layer':{width}} {'channels':>8} " + " ".join(f"{step:>9.0%}" for step in self.steps))
        for family in self.families:
            losses = " ".join(f"{loss:>9.3g}" for loss in family.losses)
            lines.append(f"{family.layer:{width}} {family.channels:>8} {losses}")
        return "\n".join(lines)


def _reached(rising: Sequence[float], steps: Sequence[float], limit: float) -> float:
    """The largest ratio at which the loss has not grown beyond a limit."""
    last = int(np.searchsorted(np.asarray(rising), limit, side="right")) - 1
    if last >= len(steps) - 1:
        return steps[-1]
    part = (limit - rising[last]) / (rising[last + 1] - rising[last])
    return steps[last] + part * (steps[last + 1] - steps[last])


def sensitivity(
    model: nn.Module,
    example_inputs: object,
    data: object,
    loss: str | Loss | None = None,
    *,
    steps: Sequence[float] = RATIOS,
    importance: str | Function = "l2",
    batches: int | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Measure how the loss grows when a family of channels alone is masked.

    Args:
        model: any `nn.Module`; never modified. It runs in evaluation mode.
        example_inputs: as `compile` takes them.
        data: with a loss, batches of (input, target); without, batches of inputs as `Calibrate` takes them.
        loss: a name such as "cross_entropy", or loss(output, target) -> scalar; None: the squared error against the
            outputs of the model as it is, as a share of their square.
        steps: the ratios, rising, above 0 and below 1.
        importance: which channels of a family go first: a criterion that needs no data, see `PruneChannels`.
        batches: how many batches to take at most; None takes all. They are kept in memory.
        progress: whether to draw a progress bar on standard error; None: if it is a terminal.

    Raises:
        OptionError: steps or importance make no sense.
        InputError: the data does not fit the model, or there is none.
        UnsupportedError: the model is quantised already.
    """
    _check(steps, importance)
    inputs = ExampleInputs.of(example_inputs)
    whole = PassManager([]).run(trace(model, inputs, training=False), inputs).graph_module
    if graph_info(whole).stage is not Stage.FLOAT:
        raise UnsupportedError(f"sensitivity is measured on float models, not on a graph of stage {Stage.FLOAT}")
    measure = _Measure(whole, inputs, data, loss, batches)
    pieces = [("", whole), *((region.layer, region.graph_module) for region in regions(whole))]
    work = [(layer, graph, *_families(graph, importance)) for layer, graph in pieces]
    total = sum(len(found) for _, _, _, found in work)
    families: list[FamilySensitivity] = []
    with progress_bar(progress) as show, evaluation(whole), torch.no_grad():
        baseline = measure()
        for layer, graph, analysis, found in work:
            for ranked in found:
                families.append(_measured(graph, analysis, ranked, layer, steps, measure))
                show(f"sensitivity of {families[-1].layer}", len(families), total)
    return Sensitivity(measure.name, baseline, tuple(map(float, steps)), tuple(families))


def _check(steps: Sequence[float], importance: str | Function) -> None:
    rising = all(left < right for left, right in pairwise(steps))
    if not steps or not rising or not steps[0] > 0 or not steps[-1] < 1:
        raise OptionError(f"steps must be rising ratios above 0 and below 1, not {tuple(steps)!r}")
    usable = [name for name in CRITERIA if name not in DATA_CRITERIA]
    if isinstance(importance, str) and importance not in usable:
        raise OptionError(f"sensitivity takes no importance {importance!r}{did_you_mean(importance, usable)}")


def _families(graph_module: fx.GraphModule, importance: str | Function) -> tuple[ChannelAnalysis, list[Integers]]:
    """Return the groups of every family that can be removed, the least important first, in the order of the network."""
    analysis = analyse(graph_module)
    scores = score(graph_module, analysis, importance)
    everything = choose_all(analysis, scores)
    kept = refusals(graph_module, everything) if everything.dead.any() else {}
    found = [members[np.argsort(scores[members], kind="stable")] for members in choosable(analysis, scores, kept)]
    first = {id(members): _makers(analysis, members)[0][0] for members in found}
    return analysis, sorted(found, key=lambda members: first[id(members)])


def _makers(analysis: ChannelAnalysis, members: Integers) -> list[tuple[int, ParameterAxis]]:
    """The weights that make the channels of a family, with their place in the network."""
    wanted = np.zeros(analysis.group_count, dtype=bool)
    wanted[members] = True
    producers = enumerate(parameter for parameter in analysis.parameters if parameter.producer)
    return [(place, one) for place, one in producers if wanted[analysis.groups(one.axis)].any()]


def _measured(
    graph_module: fx.GraphModule,
    analysis: ChannelAnalysis,
    ranked: Integers,
    prefix: str,
    steps: Sequence[float],
    measure: Callable[[], float],
) -> FamilySensitivity:
    losses = []
    for step in steps:
        dead = np.zeros(analysis.group_count, dtype=bool)
        dead[ranked[: min(int(len(ranked) * step + 1e-9), len(ranked) - 1)]] = True
        with masked(graph_module, ChannelPlan(analysis, dead, {})):
            losses.append(measure())
    makers = [parameter for _, parameter in _makers(analysis, ranked)]
    wanted = np.zeros(analysis.group_count, dtype=bool)
    wanted[ranked] = True
    channels = int(wanted[analysis.groups(makers[0].axis)].any(axis=0).sum())
    layers = [parameter.paths[0].rpartition(".")[0] or parameter.paths[0] for parameter in makers]
    named = tuple(f"{prefix}.{layer}" if prefix else layer for layer in layers)
    return FamilySensitivity(named[0], named, channels, tuple(losses))


class _Measure:
    """Runs all data through a graph and returns one number."""

    def __init__(
        self, whole: fx.GraphModule, inputs: ExampleInputs, data: object, loss: str | Loss | None, batches: int | None
    ) -> None:
        self.whole = whole
        self.loss = None if loss is None else find_loss(loss)
        self.name = ERROR if loss is None else loss if isinstance(loss, str) else getattr(loss, "__name__", "loss")
        self.batches: list[tuple[ExampleInputs, Any]]
        with evaluation(whole), torch.no_grad():
            if loss is None:
                plain = islice(read_batches(data, inputs), batches)
                self.batches = [(batch, [leaf.clone() for leaf in _floats(self._call(batch))]) for batch in plain]
            else:
                self.batches = list(islice(read_pairs(data, inputs, "validation"), batches))
        if not self.batches:
            raise InputError("the data holds no batch; an iterator can be used once only")

    def __call__(self) -> float:
        """Return the mean loss over the samples, or the relative squared error over all outputs."""
        if self.loss is None:
            error = signal = 0.0
            for batch, expected in self.batches:
                for found, reference in zip(_floats(self._call(batch)), expected, strict=True):
                    error += float((found.double() - reference.double()).square().sum())
                    signal += float(reference.double().square().sum())
            return error / signal if signal else error
        total = count = 0.0
        for number, (batch, target) in enumerate(self.batches, start=1):
            samples = len(batch.tensors()[0])
            try:
                total += samples * float(self.loss(self._call(batch), target))
            except (RuntimeError, ValueError, TypeError, IndexError) as error_:
                reason = str(error_).strip().split("\n")[0]
                raise InputError(f"the loss of batch {number} cannot be computed: {reason}") from error_
            count += samples
        return total / count

    def _call(self, batch: ExampleInputs) -> Any:
        try:
            return batch.call(self.whole)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"a batch ({batch.describe()}) does not fit the model: {reason}") from error


def _floats(output: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
