"""Train: fine-tuning as a pass. The graph stays, its numbers change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxcompress.errors import InputError, OptionError
from fxcompress.graph.metadata import Stage
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult, data_field
from fxcompress.train.loop import find_loss, find_optimiser, fit


@dataclass(frozen=True)
class Train(Pass):
    """Train the graph for some epochs, in its simplest form. Masked weights stay zero.

    Args:
        data: an iterable of (input, target) batches that can be iterated once per epoch, such as a DataLoader; or
            `fxc.compile(train_data=...)`.
        epochs: passes over the data.
        learning_rate: of the optimiser.
        loss: "cross_entropy", "mse", "l1", "smooth_l1", "bce_with_logits", "nll"; or give `loss_function`.
        optimiser: "adam", "adamw" or "sgd" (with Nesterov momentum 0.9).
        weight_decay: of the optimiser.
        seed: for dropout and whatever else draws at random, so that a run can be repeated.
        loss_function: loss(output, target) -> scalar tensor, instead of a name.
    """

    data: Any = data_field()
    epochs: int = 1
    learning_rate: float = 1e-3
    loss: str = "cross_entropy"
    optimiser: str = "adam"
    weight_decay: float = 0.0
    seed: int = 0
    loss_function: Callable[[Any, Any], torch.Tensor] | None = data_field()

    name: ClassVar[str] = "train"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FLOAT, Stage.OBSERVED})
    contract: ClassVar[Contract] = Contract.TRAINS
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or self.epochs < 0:
            raise OptionError(f"Train: epochs must be a whole number of at least 0, not {self.epochs!r}")
        if not self.learning_rate > 0:
            raise OptionError(f"Train: learning_rate must be above 0, not {self.learning_rate!r}")
        find_loss(self.loss_function or self.loss)

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Train in place."""
        data = context.resource(self.data, "train_data", "Train")
        if not self.epochs:
            return PassResult(graph_module, modified=False)
        trainable = [parameter for parameter in graph_module.parameters() if parameter.requires_grad]
        if not trainable:
            raise InputError("Train found no parameter with requires_grad=True; nothing can be trained")
        momentum = {"momentum": 0.9, "nesterov": True} if self.optimiser == "sgd" else {}
        optimiser = find_optimiser(
            self.optimiser, trainable, lr=self.learning_rate, weight_decay=self.weight_decay, **momentum
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            history = fit(
                graph_module, data, find_loss(self.loss_function or self.loss), optimiser, self.epochs,
                context.progress,
            )  # fmt: skip
        losses = " -> ".join(f"{value:.3f}" for value in (history[0], history[-1]))
        note = Note("training", f"{self.epochs} epochs, mean loss {losses}")
        return PassResult(graph_module, True, self.epochs, (note,), {"loss": history})
