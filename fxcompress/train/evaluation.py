"""Evaluation during training: metrics by name, and what the best value is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxcompress import processes
from fxcompress.errors import FxCompressError, InputError
from fxcompress.graph.shapes import evaluation
from fxcompress.train.calls import read_call
from fxcompress.train.data import Batch, Feed
from fxcompress.train.random_state import preserved

#: A metric over one batch: (output, target) -> (sum, count). The metric is the sum of the sums over that of the counts.
Metric = Callable[[Any, Any], tuple[torch.Tensor, int]]


def accuracy(output: torch.Tensor, target: torch.Tensor, top: int = 1) -> tuple[torch.Tensor, int]:
    """The share of labels that are among the `top` largest scores. Output (n, classes, ...), target (n, ...)."""
    best = output.topk(top, dim=1).indices if top > 1 else output.argmax(dim=1, keepdim=True)
    return (best == target.unsqueeze(1)).any(dim=1).sum(), target.numel()


def binary_accuracy(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The share of logits whose sign says what the target (0 or 1, of the same shape) says."""
    return ((output > 0) == (target > 0.5)).sum(), target.numel()


def mean_squared_error(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The mean of the squared differences."""
    return (output - target).double().square().sum(), target.numel()


def mean_absolute_error(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The mean of the absolute differences."""
    return (output - target).double().abs().sum(), target.numel()


METRICS: dict[str, Callable[..., tuple[torch.Tensor, int]]] = {
    "accuracy": accuracy,
    "binary_accuracy": binary_accuracy,
    "mse": mean_squared_error,
    "mae": mean_absolute_error,
}

#: Metrics that are better the higher they are. "loss" is that of the training, and lower is better.
HIGHER_IS_BETTER = ("accuracy", "binary_accuracy")

LOSS = "loss"


def check_metric(text: str) -> None:
    """Raise `OptionError` unless `text` is the name of a metric, with options that it has."""
    if text != LOSS:
        read_call(text, {**METRICS, LOSS: mean_squared_error}, "metric")


def find_metric(text: str) -> Metric:
    """Return a metric by name, for example "accuracy(top=5)"."""
    name, options = read_call(text, METRICS, "metric")
    return lambda output, target: METRICS[name](output, target, **options)


def of_function(function: Callable[[Any, Any], Any]) -> Metric:
    """Make a metric of a function(output, target) -> number, the mean over the samples of the batch."""

    def metric(output: Any, target: Any) -> tuple[torch.Tensor, int]:
        size = len(target) if hasattr(target, "__len__") else 1
        return torch.as_tensor(function(output, target)).double() * size, size

    return metric


@dataclass(frozen=True)
class Evaluation:
    """How good a model is, after each epoch.

    name: of the figure in the report. higher_is_better: what better means. measure: returns the figure of a module in
    evaluation mode; every process gets the same.
    """

    name: str
    higher_is_better: bool
    measure: Callable[[nn.Module], float]

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best so far."""
        if best is None:
            return True
        return value > best if self.higher_is_better else value < best

    def value(self, module: nn.Module) -> float:
        """Measure a module, in evaluation mode, without gradients and without a trace in random numbers or modes."""
        with preserved(cuda=torch.cuda.is_initialized()), evaluation(module), torch.no_grad():
            value = self.measure(module)
        return processes.from_main(lambda: value, "evaluating")


def over_batches(feed: Feed, measure: Callable[[nn.Module, Batch], tuple[torch.Tensor, int]]) -> Callable[..., float]:
    """Return a function that adds up sums and counts over all batches of some data, in all processes.

    Raises:
        InputError: when called: the data holds no batch.
    """

    def mean(module: nn.Module) -> float:
        total = torch.zeros(2, dtype=torch.float64)
        batches = 0
        feed.start_over()
        for batch in feed.batches():
            batches += 1
            if batch.here or feed.keeps_empty:
                with telling_batch(batch, feed.what):
                    value, count = measure(module, batch)
            if batch.here:
                total += torch.tensor([float(value), count], dtype=torch.float64)
        if not batches:
            raise InputError(f"the {feed.what} data holds no batch; give a list or a DataLoader, not an iterator")
        processes.add_up([total], "evaluating")
        return float(total[0] / total[1])

    return mean


@contextmanager
def telling_batch(batch: Batch, what: str) -> Iterator[None]:
    """Say which batch it was where torch raises.

    Raises:
        InputError: instead of torch's errors.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{what} {batch.describe()} needs more memory than there is: give smaller batches, and accumulate=... for "
            f"steps of the same size ({first_line(error)})"
        ) from error
    except InputError as error:
        raise InputError(f"{what} {batch.describe()}: {error}") from error
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, FxCompressError):
            raise
        raise InputError(
            f"{what} {batch.describe()} does not fit the model or the loss: {type(error).__name__}: {first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().split("\n")[0]
