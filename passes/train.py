"""Train: fine-tuning as a pass. The graph stays, its numbers change."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxcompress import processes
from fxcompress.errors import InputError, OptionError, UnsupportedError
from fxcompress.graph.metadata import Stage
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult, check_choice, data_field
from fxcompress.train.checkpoint import CheckpointFile, fingerprint, load_tensors, tensors_of
from fxcompress.train.data import Batch, Feed, Reader, anything, pairs
from fxcompress.train.evaluation import (
    HIGHER_IS_BETTER,
    LOSS,
    Evaluation,
    Metric,
    check_metric,
    find_metric,
    of_function,
    over_batches,
)
from fxcompress.train.loop import PRECISIONS, History, Recipe, Trainer
from fxcompress.train.losses import find_loss, is_of_classes
from fxcompress.train.objectives import Objective, OwnStep, Supervised, output_of, pick
from fxcompress.train.optimisers import check_optimiser, check_schedule, make_optimiser, make_schedule
from fxcompress.train.sharding import is_wanted, sharded_copy


@dataclass(frozen=True)
class TrainingOptions(Pass):
    """The options that `Train` and `Distill` share; they are described at `Train`."""

    data: Any = data_field()
    epochs: int | None = None
    learning_rate: float = 1e-3
    loss: str = "cross_entropy"
    optimiser: str = "adam"
    weight_decay: float = 0.0
    seed: int = 0
    steps: int | None = None
    schedule: str = "constant"
    warmup: float = 0.0
    clip: float | None = None
    accumulate: int = 1
    precision: str = "fp32"
    metric: str | None = None
    higher_is_better: bool = True
    patience: int | None = None
    checkpoint: str | None = None
    checkpoint_every: int | None = None
    output: int | str | None = None
    shard: bool = False
    validation: Any = data_field()
    loss_function: Callable[[Any, Any], torch.Tensor] | None = data_field()
    metric_function: Callable[[Any, Any], Any] | None = data_field()
    evaluate: Callable[[nn.Module], float] | None = data_field()
    optimiser_factory: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = data_field()
    schedule_factory: Callable[[torch.optim.Optimizer, int | None], Any] | None = data_field()

    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FLOAT, Stage.OBSERVED})
    contract: ClassVar[Contract] = Contract.TRAINS
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.checkpoint, Path):
            object.__setattr__(self, "checkpoint", str(self.checkpoint))
        for option, least in (("epochs", 0), ("steps", 1), ("accumulate", 1), ("patience", 1), ("checkpoint_every", 1)):
            self._check_number(option, least)
        if not self.learning_rate > 0:
            raise OptionError(f"{self._title}: learning_rate must be above 0, not {self.learning_rate!r}")
        if not 0 <= self.warmup < 1:
            raise OptionError(f"{self._title}: warmup must be a share of the steps, at least 0 and below 1")
        if self.clip is not None and not self.clip > 0:
            raise OptionError(f"{self._title}: clip must be above 0, not {self.clip!r}")
        if self.checkpoint_every is not None and self.checkpoint is None:
            raise OptionError(f"{self._title}: checkpoint_every needs a folder: checkpoint='folder'")
        check_choice(self._title, "precision", self.precision, PRECISIONS)
        find_loss(self.loss_function or self.loss)
        check_optimiser(self.optimiser)
        check_schedule(self.schedule)
        if self.metric is not None:
            check_metric(self.metric)

    @property
    def _title(self) -> str:
        return type(self).__name__

    def _check_number(self, option: str, least: int) -> None:
        value = getattr(self, option)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise OptionError(f"{self._title}: {option} must be a whole number of at least {least}, not {value!r}")

    def recipe(self) -> Recipe:
        """Return the options that the loop reads. Without epochs and steps it is one epoch."""
        epochs = 1 if self.epochs is None and self.steps is None else self.epochs
        return Recipe(
            epochs, self.steps, self.accumulate, self.clip, self.precision, self.patience, self.checkpoint_every,
            self.seed,
        )  # fmt: skip

    def fit(
        self, graph_module: fx.GraphModule, context: PassContext, data: Any, reader: Reader, objective: Objective
    ) -> PassResult:
        """Train with an objective."""
        recipe = self.recipe()
        if recipe.epochs == 0:
            return PassResult(graph_module, modified=False)
        device = _device_of(graph_module)
        _check_precision(self.precision, device)
        _require_own_device(device)
        if isinstance(data, Iterator) and (recipe.epochs or 2) > 1:
            raise InputError(
                f"{self._title}: the training data is an iterator, which can be used for one epoch only; give a list "
                f"or a DataLoader"
            )
        feed = Feed(data, reader, device, self.seed)
        checkpoint = self._checkpoint(graph_module, context, feed)
        trained = graph_module
        if is_wanted(self.shard):
            trained = self._split(graph_module, objective, device)
        optimiser = self._optimiser(trained, objective.helper)
        trainer = Trainer(
            trained, feed, objective, optimiser, self._schedule(optimiser, recipe.planned_steps(feed.length())), recipe,
            model=context.model, evaluation=self._evaluation(context, objective, device), checkpoint=checkpoint,
            progress=context.progress,
        )  # fmt: skip
        try:
            history = trainer.run()
            if trained is not graph_module:
                trainer.kept = tensors_of(trained)
        finally:
            if trained is not graph_module and trainer.kept:
                load_tensors(graph_module, trainer.kept)
        return PassResult(graph_module, True, trainer.position.step, *self._told(history, trainer))

    def _split(self, graph_module: fx.GraphModule, objective: Objective, device: torch.device) -> fx.GraphModule:
        if objective.looks_inside:
            raise UnsupportedError(
                f"{self._title}: features and attention cannot be compared while weights are split over processes; "
                f"leave shard and --use_fsdp out"
            )
        return sharded_copy(graph_module, device)

    def _optimiser(self, graph_module: fx.GraphModule, helper: nn.Module | None) -> torch.optim.Optimizer:
        trainable = [parameter for parameter in graph_module.parameters() if parameter.requires_grad]
        if not trainable:
            raise InputError(
                f"{self._title} found no parameter with requires_grad=True; nothing can be trained. Call "
                f"requires_grad_(True) on the layers to train before compiling"
            )
        trainable += helper.parameters() if helper is not None else []
        if self.optimiser_factory is not None:
            return self.optimiser_factory(trainable)
        return make_optimiser(self.optimiser, trainable, self.learning_rate, self.weight_decay)

    def _schedule(self, optimiser: torch.optim.Optimizer, steps: int | None) -> Any:
        if self.schedule_factory is not None:
            return self.schedule_factory(optimiser, steps)
        return make_schedule(self.schedule, self.warmup, optimiser, steps)

    def _checkpoint(self, graph_module: fx.GraphModule, context: PassContext, feed: Feed) -> CheckpointFile | None:
        if self.checkpoint is None:
            return None
        path = Path(self.checkpoint) / f"{context.run_name(self.name)}.checkpoint"
        return CheckpointFile(path, fingerprint(graph_module, self._text(context), feed.length()))

    def _text(self, context: PassContext) -> str:
        """The pass as text, without the folder of its checkpoints, and with the names of functions."""
        options = ("loss_function", "metric_function", "evaluate", "optimiser_factory", "schedule_factory")
        given = {option: getattr(self, option) for option in options if getattr(self, option) is not None}
        names = [f"{option}: {getattr(value, '__qualname__', type(value).__name__)}" for option, value in given.items()]
        return ", ".join([str(_without_folder(self)), *names])

    def _evaluation(self, context: PassContext, objective: Objective, device: torch.device) -> Evaluation | None:
        if self.evaluate is not None:
            return Evaluation("evaluation", self.higher_is_better, self.evaluate)
        data = self.validation if self.validation is not None else context.resources.get("validation")
        if data is None:
            if self.patience is not None or self.metric is not None or self.metric_function is not None:
                raise InputError(
                    f"{self._title}: patience and metrics need data that is not trained on: validation=..., here or in "
                    f"fxcompress.compile, or evaluate=function(module) -> number"
                )
            return None
        by_loss = isinstance(objective, OwnStep) or not (self.metric or is_of_classes(self.loss_function or self.loss))
        if self.metric == LOSS or (by_loss and self.metric_function is None):
            feed = Feed(data, self._reader(context), device, self.seed, "validation")
            return Evaluation(LOSS, False, over_batches(feed, _loss_of(objective)))
        feed = Feed(data, pairs(context.example_inputs, "validation"), device, self.seed, "validation")
        if self.metric_function is not None:
            name, metric = getattr(self.metric_function, "__name__", "metric"), of_function(self.metric_function)
            return Evaluation(name, self.higher_is_better, over_batches(feed, _output(metric)))
        text = self.metric or "accuracy"
        better = text.partition("(")[0].strip() in HIGHER_IS_BETTER
        return Evaluation(text, better, over_batches(feed, self._picked(find_metric(text))))

    def _picked(self, metric: Metric) -> Callable[..., tuple[torch.Tensor, int]]:
        return _output(lambda output, target: metric(pick(output, self.output), target))

    def _reader(self, context: PassContext) -> Reader:
        return pairs(context.example_inputs, "training")

    def _told(self, history: History, trainer: Trainer) -> tuple[tuple[Note, ...], dict[str, Any]]:
        """The ledger and the figures of a training."""
        position = trainer.position
        losses = " -> ".join(f"{value:.3f}" for value in (history.loss[0], history.loss[-1]))
        text = f"{position.epoch} epochs, {position.step} steps, mean loss {losses}"
        metrics: dict[str, Any] = {
            "loss": history.loss, "learning_rate": history.learning_rate, "epoch_seconds": history.seconds,
        }  # fmt: skip
        if trainer.evaluation is not None:
            name, best = trainer.evaluation.name, position.best_epoch
            metrics |= {"metric": name, "validation": history.metric, "best_epoch": best}
            text += f"; best {name} {history.metric[best - 1]:.4g} after epoch {best}, kept"
        return (Note("training", text),), metrics


@dataclass(frozen=True)
class Train(TrainingOptions):
    """Train the graph.

    1. Masked weights stay zero, whatever momentum and weight decay do.
    2. Batch norms, dropout and what else has a mode train as they did in the caller's model; parts that somebody put in
       evaluation mode, in a model that is itself in training mode, stay there. Modules that have a method
       `follow_training(done)` are told before every step how much is over (`fxcompress.train.modes`).
    3. The weights that `validation` finds best are kept, or the last ones where there is none.
    4. The same seed gives the same training, bit for bit on one machine's CPU, for data whose order follows the global
       generators of torch, numpy and Python, as that of a DataLoader does. A generator that the data has of its own
       goes on from where it stands. The global generators are left as they were.
    5. With `checkpoint`, a training that was killed goes on from its last checkpoint when the same program runs again,
       and ends with the same weights, bit for bit; one that is over is not done again. Each training of a pipeline has
       a file of its own there. A checkpoint that began with another graph, weights or options is refused.
    6. Of several processes (`torchrun`, `accelerate launch`) each takes a part of every batch, and gradients are
       averaged, so that learning rate and steps mean what they mean in one process. Data with a `DistributedSampler` is
       already shared. Statistics of batch norms are those of the parts, averaged after each epoch.

    Args:
        data: an iterable of (input, target) batches that can be iterated once per epoch, such as a DataLoader; or
            `fxc.compile(train_data=...)`. Batches go to the device of the model.
        epochs: passes over the data; 1 if `steps` is not given either.
        learning_rate: of the optimiser.
        loss: "cross_entropy", "mse", "l1", "smooth_l1", "bce_with_logits", "nll", also with options of torch:
            "cross_entropy(label_smoothing=0.1)"; or give `loss_function`.
        optimiser: "adam", "adamw", "sgd" (with Nesterov momentum 0.9), "rmsprop", "nadam", "radam", "adagrad", also
            with options: "sgd(momentum=0.8)"; or give `optimiser_factory`.
        weight_decay: of the optimiser.
        seed: of the order of the data, dropout and whatever else draws at random.
        steps: of the optimiser, instead of epochs, or as a limit to them.
        schedule: of the learning rate, over the whole training: "constant", "linear", "cosine", "step", also with
            options: "cosine(end=0.01)", "step(at=(0.5, 0.75), factor=0.1)"; or give `schedule_factory`.
        warmup: share of the steps during which the learning rate rises to the full one.
        clip: largest norm of all gradients together.
        accumulate: batches whose gradients make one step. Their samples count the same, as if they were one batch.
        precision: "fp32"; "bf16" or, on CUDA, "fp16": of products and convolutions, weights keep 32 bits.
        metric: what `validation` is measured by: "accuracy", "accuracy(top=5)", "binary_accuracy", "mse", "mae" or
            "loss"; None takes the accuracy for losses of classes, otherwise the loss. Or give `metric_function`.
        higher_is_better: what `metric_function` and `evaluate` mean.
        patience: stop after so many epochs without a better value.
        checkpoint: a folder for checkpoints, one after every epoch.
        checkpoint_every: also one after every so many steps.
        output: key or position of the output that losses and metrics by name look at, where the model returns several;
            None: the first tensor. Functions get all of it.
        shard: whether several processes split weights, gradients and the optimiser's state among them (FSDP) instead of
            each having all of them; `accelerate launch --use_fsdp` asks for it as well.
        validation: batches of (input, target) that are not trained on; or `fxc.compile(validation=...)`.
        loss_function: loss(output, target) -> scalar tensor, the mean over the samples, instead of a name.
        metric_function: metric(output, target) -> number, the mean over the samples of a batch.
        evaluate: evaluate(module) -> number, instead of validation data.
        optimiser_factory: optimiser_factory(parameters) -> optimiser.
        schedule_factory: schedule_factory(optimiser, steps or None) -> scheduler of torch, stepped after each step of
            the optimiser; or a `ReduceLROnPlateau`, stepped after each epoch.
        step: step(module, batch) -> loss, for batches of any form, such as dicts of a tokeniser.
    """

    step: Callable[[nn.Module, Any], torch.Tensor] | None = data_field()

    name: ClassVar[str] = "train"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Train in place."""
        data = context.resource(self.data, "train_data", "Train")
        objective: Objective
        if self.step is not None:
            objective = OwnStep(self.step)
        else:
            loss = find_loss(self.loss_function or self.loss)
            objective = Supervised(loss, self.loss_function is None, self.output)
        return self.fit(graph_module, context, data, self._reader(context), objective)

    def _reader(self, context: PassContext) -> Reader:
        return anything if self.step is not None else super()._reader(context)


def _without_folder(item: TrainingOptions) -> TrainingOptions:
    return dataclasses.replace(item, checkpoint=None, checkpoint_every=None)


def _device_of(graph_module: fx.GraphModule) -> torch.device:
    return next((parameter.device for parameter in graph_module.parameters()), torch.device("cpu"))


def _check_precision(precision: str, device: torch.device) -> None:
    if precision == "fp16" and device.type != "cuda":
        raise OptionError(f"precision='fp16' needs a model on CUDA, this one is on {device}; take 'bf16' or 'fp32'")


def _require_own_device(device: torch.device) -> None:
    """Several processes with one GPU would wait for each other forever."""
    if processes.count() == 1 or device.type != "cuda":
        return
    places = processes.gather((socket.gethostname(), device.index), "comparing devices")
    if len(set(places)) < len(places):
        raise InputError(
            f"several processes have their model on one GPU (this one on {device}): move it before compiling, "
            f"model.to(f\"cuda:{{os.environ['LOCAL_RANK']}}\"), and the example inputs as well"
        )


def _loss_of(objective: Objective) -> Callable[[nn.Module, Batch], tuple[torch.Tensor, int]]:
    return lambda module, batch: (objective(module, batch).double() * batch.here, batch.here)


def _output(metric: Metric) -> Callable[..., tuple[torch.Tensor, int]]:
    return lambda module, batch: metric(output_of(module, batch), batch.target)
