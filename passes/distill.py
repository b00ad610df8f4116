"""Distill: training that follows a teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxcompress.errors import InputError, OptionError
from fxcompress.graph.shapes import evaluation
from fxcompress.passes.train import TrainingOptions
from fxcompress.pipeline.base import PassContext, PassResult, check_choice, data_field
from fxcompress.train.data import Reader, digest_of, inputs_only
from fxcompress.train.distillation import Distillation, Matching, Pair
from fxcompress.train.losses import find_loss
from fxcompress.train.random_state import preserved, seed_everything

MATCHES = ("logits", "values")


@dataclass(frozen=True)
class Distill(TrainingOptions):
    """Train the graph to do what a teacher does: everything that holds for `Train` holds here.

    The loss is alpha times the difference from the teacher's output, plus (1 - alpha) times the loss on the targets,
    plus the differences of the features and of the attention maps that are named.

    1. Outputs as logits: the Kullback-Leibler divergence of outputs softened by a temperature, times its square (Hinton
       et al., 2015). As values: the mean squared difference.
    2. Features: the mean squared difference, behind a learned projection where the student is narrower, which is thrown
       away afterwards (FitNets, Romero et al., 2015).
    3. Attention: the mean squared difference of normalised maps of squared activations (Zagoruyko and Komodakis, 2017).
    4. The teacher runs in evaluation mode and without gradients, on its own device, and is not changed.
    5. With alpha=1 no targets are needed: the data may be batches of inputs, such as those of a calibration.

    Args:
        teacher: a module or graph that takes the same inputs; None takes the model as it was before the first pass.
        temperature: above 0; the higher, the more the small logits count.
        alpha: share of the teacher's output in the loss, 0 to 1.
        match: "logits" or "values", what outputs are.
        features: names of values that shall be alike: of layers of the model ("layer1.0") or nodes of the graph; with
            another name in the teacher, "layer1:stages.0", or a dict.
        feature_weight: how much their difference counts.
        attention: names of values whose attention maps shall be alike.
        attention_weight: how much their difference counts.
        output: key or position of the output that is compared as well, where the model returns several.
        data, epochs, ...: as for `Train`.
    """

    temperature: float = 4.0
    alpha: float = 0.5
    match: str = "logits"
    features: Any = ()
    feature_weight: float = 1.0
    attention: Any = ()
    attention_weight: float = 1000.0
    teacher: nn.Module | None = data_field()

    name: ClassVar[str] = "distill"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("features", "attention"):
            object.__setattr__(self, option, _read_names(getattr(self, option), option))
        check_choice("Distill", "match", self.match, MATCHES)
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"Distill: alpha must be at least 0 and at most 1, not {self.alpha!r}")
        if not self.temperature > 0:
            raise OptionError(f"Distill: temperature must be above 0, not {self.temperature!r}")
        for option in ("feature_weight", "attention_weight"):
            if not getattr(self, option) >= 0:
                raise OptionError(f"Distill: {option} must be at least 0, not {getattr(self, option)!r}")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Train in place."""
        resources = [context.resources.get("calibration")] if self.alpha == 1 else []
        given = [self.data, context.resources.get("train_data"), *resources]
        data = next((found for found in given if found is not None), None)
        data = context.resource(data, "train_data", "Distill")
        teacher = self._teacher(context)
        matching = Matching(
            self.alpha, self.temperature, self.match, tuple(map(Pair.of, self.features)), self.feature_weight,
            tuple(map(Pair.of, self.attention)), self.attention_weight, self.output,
        )  # fmt: skip
        with evaluation(teacher):
            with preserved(cuda=torch.cuda.is_initialized()):
                seed_everything(self.seed)  # projections begin alike in every run and process
                objective = Distillation(
                    graph_module, teacher, matching, find_loss(self.loss_function or self.loss),
                    self.loss_function is None, context.example_inputs,
                )  # fmt: skip
            return self.fit(graph_module, context, data, self._reader(context), objective)

    def _teacher(self, context: PassContext) -> nn.Module:
        teacher = self.teacher if self.teacher is not None else context.reference
        if teacher is None:
            raise InputError(
                "Distill needs a teacher: the model before the first pass is not known here, give teacher=model"
            )
        return teacher

    def _reader(self, context: PassContext) -> Reader:
        if self.alpha == 1:
            return inputs_only(context.example_inputs, "training")
        return super()._reader(context)

    def _text(self, context: PassContext) -> str:
        teacher = self._teacher(context)
        found = hashlib.blake2b(digest_size=8)
        for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):
            found.update(f"{name} {digest_of(tensor)}".encode())
        return f"{super()._text(context)}, teacher: {type(teacher).__name__} {found.hexdigest()}"


def _read_names(given: Any, option: str) -> tuple[str, ...]:
    """Read one name, several, or a mapping from names of the student to names of the teacher."""
    if isinstance(given, Mapping):
        given = [f"{student}:{teacher}" for student, teacher in given.items()]
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if not isinstance(name, str) or not all(name.split(":")) or name.count(":") > 1:
            raise OptionError(f"Distill: {option} must be names such as 'layer1' or 'layer1:stages.0', not {name!r}")
    return names
