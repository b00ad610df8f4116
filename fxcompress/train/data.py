"""Data for training: batches in an order that can be repeated, from any place, shared among processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data.distributed import DistributedSampler

from fxcompress import processes
from fxcompress.errors import CheckpointError, InputError
from fxcompress.graph.batches import read_batches, read_pairs
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.train.random_state import RandomStream, generator_state, generators_of, plain, set_generator_state


@dataclass(frozen=True)
class Batch:
    """One batch, on the device of the model.

    inputs: of the model; None where the batch is given to a function as it is. target: None where there is none.
    whole: the batch as the data yields it. number: in its epoch, from 1. size: samples of this batch in all processes.
    here: those of them that this process has.
    """

    inputs: ExampleInputs | None
    target: Any
    whole: Any
    number: int
    size: int
    here: int

    def describe(self) -> str:
        """Return the shapes of the batch, for messages."""
        shapes = [str(tuple(leaf.shape)) for leaf in tree_leaves(self.whole) if isinstance(leaf, torch.Tensor)]
        return f"batch {self.number} (shapes {', '.join(shapes)})"


#: Reads batches from items of data: (items, number of the first) -> batches.
Reader = Callable[[Iterator[Any], int], Iterator[Batch]]


def pairs(example: ExampleInputs, what: str) -> Reader:
    """Read (input, target), see `graph.batches.read_pairs`."""

    def read(items: Iterator[Any], first: int) -> Iterator[Batch]:
        for number, (inputs, target) in enumerate(read_pairs(items, example, what, first), start=first):
            yield _batch(inputs, target, (inputs.args, inputs.kwargs, target), number)

    return read


def inputs_only(example: ExampleInputs, what: str) -> Reader:
    """Read inputs and leave out targets, see `graph.batches.read_batches`."""

    def read(items: Iterator[Any], first: int) -> Iterator[Batch]:
        for number, inputs in enumerate(read_batches(items, example, what, first), start=first):
            yield _batch(inputs, None, (inputs.args, inputs.kwargs), number)

    return read


def anything(items: Iterator[Any], first: int) -> Iterator[Batch]:
    """Read batches of any form, for functions that know what they are."""
    for number, item in enumerate(items, start=first):
        yield _batch(None, None, item, number)


def _batch(inputs: ExampleInputs | None, target: Any, whole: Any, number: int) -> Batch:
    size = _size(inputs.tensors() if inputs else tree_leaves(_opened(whole)))
    return Batch(inputs, target, whole, number, size, size)


def _opened(item: Any) -> Any:
    """A mapping of another class than dict, as tokenisers return them, as a dict."""
    return dict(item) if isinstance(item, Mapping) and type(item) is not dict else item


def _size(leaves: list[Any]) -> int:
    return next((len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim), 1)


class Feed:
    """Yields the batches of each epoch, on a device, from a random stream of its own.

    With several processes each gets a part of the samples of every batch, unless the data has a `DistributedSampler`.

    Args:
        data: an iterable of batches that can be iterated once per epoch.
        reader: makes batches of its items.
        device: where they go.
        seed: of the stream that the order of the data and what a dataset draws come from.
        what: the data in one word, for messages.
    """

    def __init__(self, data: Any, reader: Reader, device: torch.device, seed: int, what: str = "training") -> None:
        if not isinstance(data, Iterable) or isinstance(data, (str, bytes, torch.Tensor, Mapping)):
            raise InputError(f"{what} data must be an iterable of batches, not {type(data).__name__}")
        self.data: Any = data
        self.reader, self.device, self.seed, self.what = reader, device, seed, what
        self.stream = RandomStream(seed)
        self.is_shared = is_shared(data)
        self.keeps_empty = (
            False  #: whether a process without samples gets the whole batch, to run along with the others
        )
        self.last: Any = None  #: the item of the data that was read last
        self.at_start: dict[str, Any] = {}  #: state of the data at the beginning of the epoch

    def length(self) -> int | None:
        """Return the number of batches in an epoch, if the data knows it."""
        try:
            return len(self.data)
        except TypeError:
            return None

    def start_over(self) -> None:
        """Get ready for an epoch in which everything is drawn as in the first one."""
        self.stream = RandomStream(self.seed)
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Get ready for an epoch, and keep the state in which it begins."""
        for holder in (self.data, getattr(self.data, "sampler", None), getattr(self.data, "batch_sampler", None)):
            if callable(getattr(holder, "set_epoch", None)):
                holder.set_epoch(epoch)  # type: ignore[union-attr]
        self.at_start = {
            "stream": plain(self.stream.state),
            "generators": [generator_state(generator) for generator in generators_of(self.data)],
            "own": self.data.state_dict() if hasattr(self.data, "load_state_dict") else None,
        }

    def resume(self, epoch: int, at_start: dict[str, Any]) -> None:
        """Get ready for an epoch that begins in the state given.

        Raises:
            CheckpointError: the data has other random generators than the state is of.
        """
        generators = generators_of(self.data)
        if len(generators) != len(at_start["generators"]):
            raise CheckpointError(
                f"the {self.what} data has {len(generators)} random generators, the checkpoint is of data with "
                f"{len(at_start['generators'])}: give the same data"
            )
        for generator, state in zip(generators, at_start["generators"], strict=True):
            set_generator_state(generator, state)
        if at_start["own"] is not None:
            self.data.load_state_dict(at_start["own"])
        self.stream.state = at_start["stream"]
        self.start_epoch(epoch)

    def batches(self, skip: int = 0, digest: str | None = None) -> Iterator[Batch]:
        """Yield the batches of the epoch that `start_epoch` or `resume` has got ready.

        Args:
            skip: how many to read and leave out.
            digest: of the last one left out, as `digest()` returned it.

        Raises:
            InputError: a batch is not in the form that the reader expects.
            CheckpointError: the data is another, or comes in another order.
        """
        for batch in self.reader(self._items(skip, digest), skip + 1):
            part = self._part(batch) if self.is_shared else batch
            yield self._moved(part)

    def digest(self) -> str:
        """Return a digest of the item that was read last."""
        found = hashlib.blake2b(digest_size=16)
        for leaf in tree_leaves(_opened(self.last)):
            if isinstance(leaf, torch.Tensor):
                found.update(digest_of(leaf).encode())
        return found.hexdigest()

    def _items(self, skip: int, digest: str | None) -> Iterator[Any]:
        items = self._plain_items() if isinstance(self.data, (list, tuple)) else self._drawn_items()
        for index, item in enumerate(items, start=1):
            self.last = item
            if index == skip and digest is not None and self.digest() != digest:
                raise CheckpointError(
                    f"batch {skip} of the {self.what} data is another one than before the interruption: give the same "
                    f"data in an order that can be repeated, such as a DataLoader, whose shuffling follows the seed"
                )
            if index > skip:
                yield item

    def _plain_items(self) -> Iterator[Any]:
        return iter(self.data)

    def _drawn_items(self) -> Iterator[Any]:
        with self.stream:
            iterator = iter(self.data)
        while True:
            with self.stream:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _part(self, batch: Batch) -> Batch:
        """The samples of a batch that are this process's."""
        size, count, rank = batch.size, processes.count(), processes.rank()
        first, last = size * rank // count, size * (rank + 1) // count
        if first == last and self.keeps_empty:
            return replace(batch, here=0)

        def cut(leaf: Any) -> Any:
            same = isinstance(leaf, torch.Tensor) and leaf.ndim and len(leaf) == size
            return leaf[first:last] if same else leaf

        def cut_targets(target: Any) -> Any:
            if isinstance(target, (list, tuple)) and len(target) == size:  # one a sample, as detectors take them
                return target[first:last]
            return tree_map(cut, target)

        if not any(cut(leaf) is not leaf for leaf in tree_leaves(_opened(batch.whole))):
            if size == 1:
                return batch if rank == 0 else replace(batch, here=0)
            raise InputError(
                f"{self.what} {batch.describe()} cannot be shared among {count} processes; give data with a "
                f"torch.utils.data.DistributedSampler"
            )
        inputs = batch.inputs.map(cut) if batch.inputs else None
        whole = batch.whole if batch.inputs else tree_map(cut, _opened(batch.whole))
        return replace(batch, inputs=inputs, target=cut_targets(batch.target), whole=whole, here=last - first)

    def _moved(self, batch: Batch) -> Batch:
        def move(leaf: Any) -> Any:
            return leaf.to(self.device, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf

        if batch.inputs is None:
            return replace(batch, whole=tree_map(move, _opened(batch.whole)))
        return replace(batch, inputs=batch.inputs.map(move), target=tree_map(move, batch.target))


def is_shared(data: Any) -> bool:
    """Whether data is still to be shared among processes: there are several, and it has no `DistributedSampler`."""
    samplers = (getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None))
    return processes.count() > 1 and not any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def digest_of(tensor: torch.Tensor) -> str:
    """Return a digest of a tensor's dtype, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    found = hashlib.blake2b(f"{plain.dtype} {tuple(plain.shape)}".encode(), digest_size=16)
    found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
