"""Data: batches of inputs, with or without targets, read and compared with the example inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map

from fxcompress.errors import InputError
from fxcompress.graph.inputs import ExampleInputs

#: A tensor of more samples than this is taken in pieces, for the sake of memory.
_LARGEST_BATCH = 32


def read_batches(
    data: object, example: ExampleInputs, what: str = "calibration", first: int = 1
) -> Iterator[ExampleInputs]:
    """Yield the inputs of each batch of data without targets.

    Args:
        data: a tensor of samples; for one batch a tuple of the model's positional inputs or a dict of its keyword
            inputs; or an iterable of batches, each a tensor, a tuple of inputs, possibly with a target behind them,
            which is left out, or a dict of keyword inputs.
        example: inputs that fit the model.
        what: the data in one word, for messages.
        first: number of the first batch, for messages.

    Raises:
        InputError: the data is in none of these forms, or a batch is empty, does not fit the example or holds NaN or
            infinity; the message has the number of the batch.
    """
    for number, batch in enumerate(_batches(data, example, what), start=first):
        inputs = _inputs_of(batch, example, number, what)
        _check(inputs, example, number, what)
        yield inputs.map(lambda tensor: tensor.to(example.tensors()[0].device))


def _batches(data: object, example: ExampleInputs, what: str) -> Iterable[object]:
    if isinstance(data, torch.Tensor):
        return data.split(_LARGEST_BATCH) if data.ndim and len(data) else [data]
    if isinstance(data, tuple) and not _is_sequence_of_batches(data, example):
        return [data]
    if isinstance(data, (Mapping, ExampleInputs)):
        return [data]
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise InputError(
            f"{what} data must be a tensor, a tuple, an iterable of batches or a DataLoader, not {type(data).__name__}"
        )
    return data


def _is_sequence_of_batches(data: tuple[object, ...], example: ExampleInputs) -> bool:
    """Whether a tuple holds batches of a model with one input, rather than the inputs of one batch."""
    if len(example.args) != 1 or example.kwargs or not isinstance(example.args[0], torch.Tensor):
        return False
    first = example.args[0]
    return all(isinstance(item, torch.Tensor) and item.shape[1:] == first.shape[1:] for item in data)


def _inputs_of(batch: object, example: ExampleInputs, number: int, what: str) -> ExampleInputs:
    if isinstance(batch, ExampleInputs):
        return batch
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Mapping) and example.kwargs:
        batch = batch[0]  # a target stands behind it
    if isinstance(batch, torch.Tensor) or (isinstance(batch, Mapping) and _takes_one_mapping(example)):
        batch = (batch,)
    if isinstance(batch, Mapping):
        return _keywords_of(batch, example, number, what)
    if not isinstance(batch, (tuple, list)):
        raise InputError(f"{what} batch {number} is a {type(batch).__name__}, not a tensor, tuple or dict")
    if example.kwargs or len(batch) < len(example.args):
        raise InputError(
            f"{what} batch {number} has {len(batch)} inputs, but the model was traced with {_describe_call(example)}"
        )
    return ExampleInputs(tuple(batch[: len(example.args)]))


def _takes_one_mapping(example: ExampleInputs) -> bool:
    return not example.kwargs and len(example.args) == 1 and isinstance(example.args[0], Mapping)


def _keywords_of(batch: Mapping[Any, Any], example: ExampleInputs, number: int, what: str) -> ExampleInputs:
    """The keyword inputs that a mapping holds; it may hold more, targets for example."""
    missing = [name for name in example.kwargs if name not in batch]
    if missing or example.args:
        advice = f"it lacks {', '.join(missing)}" if missing else (
            "give batches as tuples in the order of the inputs, or example_inputs as a dict, too"
        )  # fmt: skip
        raise InputError(
            f"{what} batch {number} has the keywords {', '.join(map(str, batch))}, but the model was traced "
            f"with {_describe_call(example)}; {advice}"
        )
    return ExampleInputs((), {name: batch[name] for name in example.kwargs})


def _describe_call(example: ExampleInputs) -> str:
    keywords = f" and the keywords {', '.join(example.kwargs)}" if example.kwargs else ""
    inputs = "input" if len(example.args) == 1 else "inputs"
    return f"{len(example.args)} positional {inputs}{keywords}"


def _check(inputs: ExampleInputs, example: ExampleInputs, number: int, what: str) -> None:
    """Compare a batch with the example inputs, tensor by tensor."""
    found, wanted = inputs.tensors(), example.tensors()
    if len(found) != len(wanted):
        raise InputError(f"{what} batch {number} holds {len(found)} tensors, the example inputs {len(wanted)}")
    for tensor, model in zip(found, wanted, strict=True):
        if tensor.ndim != model.ndim or tensor.dtype != model.dtype:
            raise InputError(
                f"{what} batch {number} ({inputs.describe()}) does not fit the example inputs "
                f"({example.describe()}): dimensions and dtypes must be the same"
            )
        if tensor.numel() == 0:
            raise InputError(f"{what} batch {number} is empty: {inputs.describe()}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{what} batch {number} holds NaN or infinity")


def read_pairs(
    data: object, example: ExampleInputs, what: str = "training", first: int = 1
) -> Iterator[tuple[ExampleInputs, Any]]:
    """Yield the inputs and the target of each batch.

    Args:
        data: an iterable of (input, target) batches, such as a DataLoader; an input is a tensor, a tuple of positional
            inputs or a dict of keyword inputs.
        example: inputs that fit the model.
        what: the data in one word, for messages.
        first: number of the first batch, for messages.

    Raises:
        InputError: a batch is no such pair, or its inputs do not fit the example.
    """
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, torch.Tensor, Mapping)):
        raise InputError(f"{what} data must be an iterable of (input, target), not {type(data).__name__}")
    for number, batch in enumerate(data, start=first):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise InputError(f"{what} batch {number} is a {type(batch).__name__}{size}, not a pair (input, target)")
        inputs = _inputs_of(batch[0], example, number, what)
        _check(inputs, example, number, what)
        device = example.tensors()[0].device

        def move(leaf: Any, device: torch.device = device) -> Any:
            return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf

        yield inputs.map(move), tree_map(move, batch[1])
