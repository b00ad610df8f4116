"""RememberWeights and RewindWeights: back to the values of an earlier point, with the masks of now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxcompress.errors import PassError
from fxcompress.pipeline.base import Contract, Pass, PassContext, PassResult
from fxcompress.train.masks import hold_masks

#: Where the context keeps the values.
_KEY = "remembered weights"


@dataclass(frozen=True)
class RememberWeights(Pass):
    """Keep a copy of every parameter and buffer, for `RewindWeights`. What was remembered before is forgotten."""

    name: ClassVar[str] = "remember-weights"
    contract: ClassVar[Contract] = Contract.EXACT
    whole: ClassVar[bool] = True

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Copy."""
        context.resources[_KEY] = {name: one.detach().clone() for name, one in graph_module.state_dict().items()}
        return PassResult(graph_module, modified=False)


@dataclass(frozen=True)
class RewindWeights(Pass):
    """Give every parameter and buffer the value that `RememberWeights` has kept; what is masked stays zero.

    Sources: Frankle and Carbin, The Lottery Ticket Hypothesis, 2019 (back to the start); Renda, Frankle and Carbin,
    Comparing Rewinding and Fine-tuning in Neural Network Pruning, 2020 (back to an early point of training).

    Refuses a graph whose tensors have other shapes by now: let channels be masked in between, and removed at the end.
    """

    name: ClassVar[str] = "rewind-weights"
    contract: ClassVar[Contract] = Contract.TRAINS
    whole: ClassVar[bool] = True

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Copy back."""
        remembered: dict[str, torch.Tensor] | None = context.resources.get(_KEY)
        if remembered is None:
            raise PassError("there are no values to go back to; put remember-weights before it")
        now = graph_module.state_dict()
        strange = [name for name, one in now.items() if name not in remembered or remembered[name].shape != one.shape]
        if strange:
            raise PassError(
                f"{strange[0]!r} was not there or had another shape when the weights were remembered; mask channels "
                f"(mask-channels) before it, and remove them (remove-channels) behind the last rewind-weights"
            )
        before = {name: one.detach().clone() for name, one in now.items()}
        with torch.no_grad():
            for name, one in now.items():
                one.copy_(remembered[name])
        hold_masks(graph_module)
        edits = sum(not torch.equal(before[name].nan_to_num(), one.nan_to_num()) for name, one in now.items())
        return PassResult(graph_module, edits > 0, edits)
