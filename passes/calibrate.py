"""Calibrate: data through the observers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxcompress.errors import InputError
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import Stage
from fxcompress.graph.shapes import evaluation
from fxcompress.passes.insert_observers import observers_of
from fxcompress.pipeline.base import Contract, Pass, PassContext, PassResult, data_field, parameters_equal

#: A tensor of more samples than this is taken in pieces, for the sake of memory.
_LARGEST_BATCH = 32


@dataclass(frozen=True)
class Calibrate(Pass):
    """Run data through a graph with observers, in evaluation mode and without gradients.

    The observers forget what they have seen before, so the statistics are those of this data alone, and a second run
    on the same data changes nothing.

    Args:
        calibration: batches of inputs; None takes what was given to `fxcompress.compile(calibration=...)`. One of:
            a tensor of samples; for one batch a tuple of the model's positional inputs or a dict of its keyword inputs;
            an iterable of batches, a DataLoader for example, where each batch is a tensor, a tuple of inputs, possibly
            with a target behind them, which is left out, or a dict of keyword inputs.
        batches: how many batches to take at most; None takes all.
    """

    calibration: Any = data_field()
    batches: int | None = None

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.OBSERVED})
    contract: ClassVar[Contract] = Contract.EXACT
    whole: ClassVar[bool] = True

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Record, and compare the statistics with those before."""
        observers = observers_of(graph_module)
        if not observers:
            return PassResult(graph_module, modified=False)
        data = context.resource(self.calibration, "calibration", type(self).__name__)
        before = {path: _statistics(observer) for path, observer in observers.items()}
        total = len(data) if isinstance(data, Sized) and not isinstance(data, (torch.Tensor, tuple, Mapping)) else None
        count = 0
        try:
            for observer in observers.values():
                observer.reset()
                observer.recording = True
            with evaluation(graph_module), torch.no_grad():
                for count, batch in enumerate(read_batches(data, context.example_inputs), start=1):
                    _run(graph_module, batch, count)
                    context.progress("calibrate", count, total)
                    if count == self.batches:
                        break
        finally:
            for observer in observers.values():
                observer.recording = False
        if count == 0:
            raise InputError("the calibration data is empty: it yields no batch")
        edits = sum(not parameters_equal(before[path], _statistics(observer)) for path, observer in observers.items())
        return PassResult(graph_module, edits > 0, edits, metrics={"batches": count})


def _statistics(observer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in observer.state_dict().items()}


def _run(graph_module: fx.GraphModule, batch: ExampleInputs, number: int) -> None:
    try:
        batch.call(graph_module)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"calibration batch {number} ({batch.describe()}) does not fit the model: {reason}") from error


def read_batches(data: object, example: ExampleInputs) -> Iterator[ExampleInputs]:
    """Yield the inputs of each batch in data of any of the forms that `Calibrate` takes.

    Args:
        data: see `Calibrate`.
        example: inputs that fit the model.

    Raises:
        InputError: the data is in none of these forms, or a batch is empty, does not fit the example or holds NaN or
            infinity; the message has the number of the batch.
    """
    for number, batch in enumerate(_batches(data, example), start=1):
        inputs = _inputs_of(batch, example, number)
        _check(inputs, example, number)
        yield inputs.map(lambda tensor: tensor.to(example.tensors()[0].device))


def _batches(data: object, example: ExampleInputs) -> Iterable[object]:
    if isinstance(data, torch.Tensor):
        return data.split(_LARGEST_BATCH) if data.ndim and len(data) else [data]
    if isinstance(data, tuple) and not _is_sequence_of_batches(data, example):
        return [data]
    if isinstance(data, (Mapping, ExampleInputs)):
        return [data]
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise InputError(
            f"calibration data must be a tensor, a tuple, an iterable of batches or a DataLoader, "
            f"not {type(data).__name__}"
        )
    return data


def _is_sequence_of_batches(data: tuple[object, ...], example: ExampleInputs) -> bool:
    """Whether a tuple holds batches of a model with one input, rather than the inputs of one batch."""
    if len(example.args) != 1 or example.kwargs or not isinstance(example.args[0], torch.Tensor):
        return False
    first = example.args[0]
    return all(isinstance(item, torch.Tensor) and item.shape[1:] == first.shape[1:] for item in data)


def _inputs_of(batch: object, example: ExampleInputs, number: int) -> ExampleInputs:
    if isinstance(batch, ExampleInputs):
        return batch
    if isinstance(batch, torch.Tensor):
        batch = (batch,)
    if isinstance(batch, Mapping):
        wanted = example.kwargs or batch
        missing = [name for name in wanted if name not in batch]
        if missing or example.args:
            raise InputError(
                f"calibration batch {number} has the keywords {', '.join(map(str, batch))}, but the model was traced "
                f"with {_describe_call(example)}"
            )
        return ExampleInputs((), {name: batch[name] for name in wanted})
    if not isinstance(batch, (tuple, list)):
        raise InputError(f"calibration batch {number} is a {type(batch).__name__}, not a tensor, tuple or dict")
    if example.kwargs or len(batch) < len(example.args):
        raise InputError(
            f"calibration batch {number} has {len(batch)} inputs, but the model was traced with "
            f"{_describe_call(example)}"
        )
    return ExampleInputs(tuple(batch[: len(example.args)]))


def _describe_call(example: ExampleInputs) -> str:
    keywords = f" and the keywords {', '.join(example.kwargs)}" if example.kwargs else ""
    return f"{len(example.args)} positional inputs{keywords}"


def _check(inputs: ExampleInputs, example: ExampleInputs, number: int) -> None:
    """Compare a batch with the example inputs, tensor by tensor."""
    found, wanted = inputs.tensors(), example.tensors()
    if len(found) != len(wanted):
        raise InputError(f"calibration batch {number} holds {len(found)} tensors, the example inputs {len(wanted)}")
    for tensor, model in zip(found, wanted, strict=True):
        if tensor.ndim != model.ndim or tensor.dtype != model.dtype:
            raise InputError(
                f"calibration batch {number} ({inputs.describe()}) does not fit the example inputs "
                f"({example.describe()}): dimensions and dtypes must be the same"
            )
        if tensor.numel() == 0:
            raise InputError(f"calibration batch {number} is empty: {inputs.describe()}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"calibration batch {number} holds NaN or infinity")
