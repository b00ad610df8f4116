"""The training loop behind the passes that train."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fxcompress import processes
from fxcompress.errors import CheckpointError, InputError
from fxcompress.train import random_state
from fxcompress.train.checkpoint import CheckpointFile, load_tensors, tensors_of
from fxcompress.train.data import Batch, Feed
from fxcompress.train.evaluation import Evaluation, telling_batch
from fxcompress.train.layout import channels_last
from fxcompress.train.masks import HeldMasks
from fxcompress.train.modes import followers, frozen_modules, training
from fxcompress.train.objectives import Objective
from fxcompress.train.sharding import is_split, local, split_state, whole

#: Steps between two looks at the losses on a device that computes ahead of Python.
_LOOK_EVERY = 20

#: Between the seeds of two processes, so that they drop out other values.
_RANK_STRIDE = 1_000_003

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How a training goes on; see `fxcompress.passes.Train` for what the options mean.

    Either `epochs` or `steps` says when it ends; where both are given, whichever is first.
    """

    epochs: int | None = 1
    steps: int | None = None
    accumulate: int = 1
    clip: float | None = None
    precision: str = "fp32"
    patience: int | None = None
    checkpoint_every: int | None = None
    seed: int = 0

    def planned_steps(self, batches: int | None) -> int | None:
        """Return how many steps the optimiser will take, given the batches of an epoch; None if nobody knows."""
        by_epochs = None
        if self.epochs is not None and batches is not None:
            by_epochs = self.epochs * math.ceil(batches / self.accumulate)
        known = [number for number in (self.steps, by_epochs) if number is not None]
        return min(known) if known else None


@dataclass
class History:
    """The figures of every epoch: lists of one length.

    loss: mean over the samples. metric: of the evaluation, if there is one. learning_rate: at the end. seconds: of
    training, without evaluation.
    """

    loss: list[float] = field(default_factory=list)
    metric: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass
class Position:
    """How far a training has come.

    epoch, batch: complete ones, and batches of the one that runs. step: steps of the optimiser. loss_sum, samples: of
    this epoch. seconds: of this epoch. batches: in an epoch, if known. best: value of the evaluation. stale: epochs
    since then. best_epoch: from 1. finished: whether it is over.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    batches: int | None = None
    best: float | None = None
    best_epoch: int = 0
    stale: int = 0
    finished: bool = False

    def next_epoch(self) -> None:
        """Begin another epoch."""
        self.batches = self.batch if self.batches is None else self.batches
        self.epoch += 1
        self.batch, self.samples, self.loss_sum, self.seconds = 0, 0, 0.0, 0.0


class Trainer:
    """Trains a graph in place.

    Masked weights stay zero, frozen parts stay in evaluation mode, modules that follow the training are told of it. The
    global random numbers, and the modes of the modules, are afterwards what they were.

    Args:
        module: the graph. model: the caller's model, which tells what is frozen.
        feed: yields the batches. objective: their loss.
        optimiser: over the module's and the objective's parameters. schedule: of its learning rate; stepped after every
            step of the optimiser, or after every epoch if it is a `ReduceLROnPlateau`.
        recipe: how long, and how.
        evaluation: after every epoch; the best weights are kept.
        checkpoint: where the training is saved, and goes on from.
        progress: called as progress(description, done, total).
    """

    def __init__(
        self,
        module: fx.GraphModule,
        feed: Feed,
        objective: Objective,
        optimiser: torch.optim.Optimizer,
        schedule: Any,
        recipe: Recipe,
        *,
        model: nn.Module | None = None,
        evaluation: Evaluation | None = None,
        checkpoint: CheckpointFile | None = None,
        progress: Callable[[str, int, int | None], None] = lambda description, done, total: None,
    ) -> None:
        self.module, self.feed, self.objective, self.recipe = module, feed, objective, recipe
        self.optimiser, self.schedule = optimiser, schedule
        self.evaluation, self.checkpoint, self.progress = evaluation, checkpoint, progress
        self.frozen = frozen_modules(module, model)
        self.followers = followers(module)
        self.masks = HeldMasks(module)
        self.parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        self.device = feed.device
        self.is_split = any(is_split(parameter) for parameter in self.parameters)
        self.weight = processes.count() if self.is_split and feed.is_shared else 1  # of a loss, where means are taken
        feed.keeps_empty = self.is_split
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self.position, self.history = Position(batches=feed.length()), History()
        self.kept: dict[str, Any] = {}  # weights that are known to be good: the best ones, or those of the last epoch
        self.digest: str | None = None  # of the batch before the place where a checkpoint goes on
        self.recent: list[tuple[int, torch.Tensor, int]] = []  # losses not looked at: (batch, loss, samples)

    def run(self) -> History:
        """Train until the epochs, the steps or the patience are over, and return the figures of every epoch.

        Raises:
            InputError: data that does not fit, or a loss or weights that are not finite. The module then has the best
                weights so far, or those of the last complete epoch.
            CheckpointError: the checkpoint cannot be used.
            ProcessError: another process has ended.
        """
        on_cuda = self.device.type == "cuda"
        moved = channels_last(self.module, not self.is_split and (not on_cuda or self.recipe.precision != "fp32"))
        with random_state.preserved(on_cuda), training(self.module, self.frozen), moved:
            random_state.seed_everything(self.recipe.seed + _RANK_STRIDE * processes.rank())
            self.kept = tensors_of(self.module)
            try:
                self._begin()
                while not self.position.finished:
                    self._epoch()
            except Exception:
                load_tensors(self.module, self.kept)
                raise
            if self.evaluation is not None:
                load_tensors(self.module, self.kept)
        return self.history

    # One epoch

    def _epoch(self) -> None:
        position = self.position
        started = time.perf_counter()
        for group in self._groups():
            self._step(group)
            position.batch += len(group)
            if self.recipe.steps is not None and position.step >= self.recipe.steps:
                break
            if self.recipe.checkpoint_every and position.step % self.recipe.checkpoint_every == 0:
                self._look()
                before, position.seconds = position.seconds, position.seconds + time.perf_counter() - started
                self._save()
                position.seconds = before
        self._look()
        position.seconds += time.perf_counter() - started
        self._require_batches()
        self._end_epoch()

    def _groups(self) -> Iterator[list[Batch]]:
        """The batches of each step of the optimiser; the last group of an epoch may have fewer."""
        group: list[Batch] = []
        for batch in self.feed.batches(self.position.batch, self.digest):
            group.append(batch)
            if len(group) == self.recipe.accumulate:
                yield group
                group = []
        if group:
            yield group

    def _require_batches(self) -> None:
        position = self.position
        if not position.batch and not position.epoch:
            raise InputError("the training data holds no batch")
        if not position.batch:
            raise InputError(
                f"the training data holds no batch any more after epoch {position.epoch}: an iterator can be used for "
                f"one epoch only; give a list or a DataLoader"
            )

    def _end_epoch(self) -> None:
        position, history = self.position, self.history
        agree_on_statistics(self.module)
        history.loss.append(position.loss_sum / position.samples)
        history.learning_rate.append(float(self.optimiser.param_groups[0]["lr"]))
        history.seconds.append(position.seconds)
        self._require_finite_weights()
        position.next_epoch()
        self._evaluate()
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(history.metric[-1] if history.metric else history.loss[-1])
        position.finished = self._is_over()
        self.digest = None
        self.feed.start_epoch(position.epoch)
        self._save()

    def _is_over(self) -> bool:
        position, recipe = self.position, self.recipe
        ran_out = recipe.patience is not None and position.stale >= recipe.patience
        enough = recipe.epochs is not None and position.epoch >= recipe.epochs
        return ran_out or enough or (recipe.steps is not None and position.step >= recipe.steps)

    def _evaluate(self) -> None:
        """Keep the weights if they are the best so far, or if nobody asks."""
        position = self.position
        if self.evaluation is None:
            self.kept = tensors_of(self.module)
            return
        value = self.evaluation.value(self.module)
        if not math.isfinite(value):
            raise InputError(
                f"the evaluation ({self.evaluation.name}) gave {value} after epoch {position.epoch}; it must be a "
                f"number. {self._what_is_kept()}"
            )
        self.history.metric.append(value)
        position.stale += 1
        if self.evaluation.is_better(value, position.best):
            self.kept = tensors_of(self.module)
            position.best, position.best_epoch, position.stale = value, position.epoch, 0

    # One step

    def _step(self, group: list[Batch]) -> None:
        for follower in self.followers:
            follower.follow_training(self._done())
        self.optimiser.zero_grad(set_to_none=True)
        size = sum(batch.size for batch in group)
        loss = torch.zeros((), device=self.device)
        for batch in group:
            if batch.here or self.is_split:
                value = self._loss(batch)
                share = value if batch.here == size else value * (batch.here / size)
                self.scaler.scale(share * self.weight if self.weight > 1 else share).backward()
                loss += share.detach().float()
        self._average(loss)
        self._update()
        self.position.step += 1
        self._keep_loss(group[-1].number, loss, size)

    def _loss(self, batch: Batch) -> torch.Tensor:
        dtype = PRECISIONS[self.recipe.precision]
        casting = contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)
        with casting, telling_batch(batch, self.feed.what):
            return self.objective(self.module, batch)

    def _average(self, loss: torch.Tensor) -> None:
        """Add up gradients and loss over all processes; each has counted its samples as a share of all."""
        if processes.count() == 1:
            return
        own = [] if self.is_split else self.parameters  # gradients of split weights are averaged on their way back
        used = torch.tensor([float(p.grad is not None) for p in own], device=self.device)
        for parameter in own:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in own if p.grad is not None]
        if not self.feed.is_shared:  # every process has other batches, of which each counts the same
            for tensor in (loss, *gradients):
                tensor.div_(processes.count())
        processes.add_up([*gradients, loss, used])
        for parameter, users in zip(own, used.tolist(), strict=True):
            if not users:
                parameter.grad = None

    def _update(self) -> None:
        self.scaler.unscale_(self.optimiser)
        self.masks.hold_gradients()
        if self.recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.masks.hold_weights()
        if self.schedule is not None and not isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step()

    def _done(self) -> float:
        """The share of the training that is over."""
        planned = self.recipe.planned_steps(self.position.batches)
        return min(self.position.step / planned, 1.0 - 1e-9) if planned else 0.0

    # Losses

    def _keep_loss(self, batch: int, loss: torch.Tensor, size: int) -> None:
        self.recent.append((batch, loss, size))
        if self.device.type == "cpu" or len(self.recent) >= _LOOK_EVERY:
            self._look()

    def _look(self) -> None:
        """Read the losses of the last steps.

        Raises:
            InputError: one is not finite.
        """
        if not self.recent:
            return
        values = torch.stack([loss for _, loss, _ in self.recent]).tolist()
        for (batch, _, size), value in zip(self.recent, values, strict=True):
            if not math.isfinite(value):
                raise InputError(
                    f"the loss is {value} in epoch {self.position.epoch + 1}, batch {batch}; check the data for NaN, "
                    f"lower the learning rate ({self.optimiser.param_groups[0]['lr']:g}), or clip gradients "
                    f"(clip=1.0). {self._what_is_kept()}"
                )
            self.position.loss_sum += value * size
            self.position.samples += size
        self.recent.clear()
        if processes.is_main():
            whole = f"/{self.recipe.epochs}" if self.recipe.epochs is not None else ""
            self.progress(
                f"epoch {self.position.epoch + 1}{whole}, loss {values[-1]:.3f}",
                self.position.step, self.recipe.planned_steps(self.position.batches),
            )  # fmt: skip

    def _require_finite_weights(self) -> None:
        broken = [name for name, weight in self.module.named_parameters() if not torch.isfinite(local(weight)).all()]
        if self.is_split:
            broken = [name for names in processes.gather(broken, "looking at weights") for name in names]
        if broken:
            raise InputError(
                f"the weights {broken[0]!r} are not finite after epoch {self.position.epoch + 1}, although the losses "
                f"were; lower the learning rate, or clip gradients (clip=1.0). {self._what_is_kept()}"
            )

    def _what_is_kept(self) -> str:
        epoch = self.position.epoch if self.evaluation is None else self.position.best_epoch
        return f"The weights are again those {f'after epoch {epoch}' if epoch else 'from before the training'}"

    # Checkpoints

    def _begin(self) -> None:
        """Start anew, or go on from the checkpoint."""
        state = None
        if self.checkpoint is not None:
            state = processes.from_main(self.checkpoint.read, "reading the checkpoint")
        if state is None:
            self.feed.start_epoch(0)
        else:
            self._load(state)

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        self._require_finite_weights()
        agree_on_statistics(self.module)
        own = random_state.plain(random_state.capture(self.device.type == "cuda"))
        streams = processes.gather(own, "writing a checkpoint")
        helper = self.objective.helper
        self.checkpoint.write(
            {
                "position": asdict(self.position),
                "history": asdict(self.history),
                "module": tensors_of(self.module),
                "helper": helper.state_dict() if helper is not None else {},
                "kept": self.kept,
                "optimiser": whole(self.optimiser.state_dict()),
                "schedule": self.schedule.state_dict() if self.schedule is not None else {},
                "scaler": self.scaler.state_dict(),
                "random": streams,
                "data": self.feed.at_start,
                "digest": self.feed.digest() if self.position.batch else None,
            }
        )

    def _load(self, state: dict[str, Any]) -> None:
        try:
            self.position, self.history = Position(**state["position"]), History(**state["history"])
            load_tensors(self.module, state["module"])
            if self.objective.helper is not None:
                self.objective.helper.load_state_dict(state["helper"])
            self.optimiser.load_state_dict(split_state(self.optimiser, state["optimiser"]))
            if self.schedule is not None:
                self.schedule.load_state_dict(state["schedule"])
            self.scaler.load_state_dict(state["scaler"])
            self.feed.resume(self.position.epoch, state["data"])
            random_state.restore(state["random"][processes.rank()])
            self.kept = {name: _on(value, self.device) for name, value in state["kept"].items()}
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint cannot be used here: {type(error).__name__}: {error}") from error
        self.digest = state["digest"]


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def agree_on_statistics(module: nn.Module) -> None:
    """Give all processes the same buffers: averages of batch norms' statistics, and the first process's other ones.

    Raises:
        ProcessError: a process has ended.
    """
    if processes.count() == 1:
        return
    averaged: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, buffer in module.named_buffers():
        (averaged if name.endswith(("running_mean", "running_var")) else others).append(buffer)
    with torch.no_grad():
        for buffer in averaged:
            buffer.div_(processes.count())
    processes.add_up(averaged, "averaging statistics")
    processes.copy_from_main(others, "agreeing on statistics")
