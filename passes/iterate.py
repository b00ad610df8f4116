"""Iterate: prune a little, train, prune more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import fx

from fxcompress.analysis.schedule import Way
from fxcompress.errors import OptionError, UnsupportedError
from fxcompress.passes.rewind_weights import RememberWeights, RewindWeights
from fxcompress.passes.train import Train
from fxcompress.pipeline.base import Contract, Pass, PassContext, PassResult
from fxcompress.pipeline.presets import read_passes


@dataclass(frozen=True)
class Iterate(Pass):
    """Prune in steps, with training behind each: a group of passes, every one of which has its row in the report.

        P.Iterate(prune=P.MaskWeights(0.8), train=P.Train(loader, epochs=2), steps=5)

    1. In every step the passes that prune go a part of their way (`Pass.on_the_way`): `MaskWeights` to a smaller
       amount, `MaskChannels` to smaller ratios or to a point between today's size and the budget. The last step is the
       pass as it was given, whose budget is met within its tolerance.
    2. Passes without an amount run once, at the end: channels are masked step by step, and those of `PruneChannels`
       are removed behind the last training. Training computes masked channels until then.
    3. With `rewind`, all weights go back to their values at the start of this pass after every step, masked ones to
       zero. To rewind to an early point of training, train up to there in front of this pass.

    4. What draws at random while training draws anew in every step: seeds go up by one. A step that is shorter than an
       epoch sees other batches than the one before it, where the order of the data follows the seed.

    Without rewinding, every step trains on with a new optimiser and the schedule of its learning rate from the
    beginning (learning rate rewinding: Renda, Frankle and Carbin, 2020).

    Args:
        prune: what prunes: a pass, several, or their text.
        train: what happens behind each step, likewise.
        steps: number of steps.
        schedule: how far each step goes: "constant" (the same share of what is left), "linear" (the same amount) or
            "cubic" (much at first and little at the end: Zhu and Gupta, To prune, or not to prune, 2017).
        rewind: whether weights go back to the start after every step.
        train_first: whether to train before the first step too, so that trained weights are judged: with `rewind` and
            an untrained model, the search for lottery tickets (Frankle and Carbin, 2019).
    """

    prune: Any = ()
    train: Any = (Train(),)
    steps: int = 5
    schedule: str = "cubic"
    rewind: bool = False
    train_first: bool = False

    name: ClassVar[str] = "iterate"
    contract: ClassVar[Contract] = Contract.TRAINS

    def __post_init__(self) -> None:
        for option in ("prune", "train"):
            object.__setattr__(self, option, tuple(read_passes(getattr(self, option))))
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise OptionError(f"Iterate: steps must be a positive whole number, not {self.steps!r}")
        gradual, _ = self._sorted(Way(self.schedule, 0.5))
        if not gradual:
            raise OptionError(
                "Iterate: prune must be a pass that can go a part of its way, such as P.MaskWeights(0.8), "
                "P.PruneChannels(0.5) or P.PruneChannels(budget='macs:0.5')"
            )

    def parts(self) -> tuple[Pass, ...]:
        """Return the passes of all steps, in order."""
        passes: list[Pass] = [RememberWeights()] if self.rewind else []
        if self.train_first:
            passes += (_with_other_seed(item, self.steps) for item in self.train)
        for step in range(1, self.steps + 1):
            gradual, once = self._sorted(Way(self.schedule, round(step / self.steps, 6)))
            passes += gradual
            if self.rewind:
                passes.append(RewindWeights())
            passes += (_with_other_seed(item, step - 1) for item in self.train)
        return (*passes, *once)

    def _sorted(self, way: Way) -> tuple[list[Pass], list[Pass]]:
        """The passes that prune, as they are at a point of the way, and those that run once."""
        gradual, once = [], []
        for item in self.prune:
            for leaf in _leaves(item):
                part = leaf.on_the_way(way)
                if part is None:
                    once.append(leaf)
                else:
                    gradual.append(part if way.share < 1 else leaf)
        return gradual, once

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """A group is run part by part."""
        raise UnsupportedError("Iterate stands for several passes: run it with a PassManager, or run its parts()")


def _with_other_seed(item: Any, step: int) -> Pass:
    """The pass as it is in a step, counted from 0."""
    draws = any(option.name == "seed" and option.init for option in fields(item))
    changed: Pass = replace(item, seed=item.seed + step) if draws and step else item
    return changed


def _leaves(item: Pass) -> Iterator[Pass]:
    parts = item.parts()
    if parts == (item,):
        yield item
    else:
        for part in parts:
            yield from _leaves(part)
