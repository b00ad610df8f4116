"""Random numbers: streams that do not disturb each other, and states that can be written to a file.

A training has two streams. The order of the data, and what a dataset draws, comes from one of them, so that it depends
on the seed alone; dropout and whatever else a model draws comes from the other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

#: States of the generators of torch, numpy and Python.
RandomState = dict[str, Any]


def capture(cuda: bool = False) -> RandomState:
    """Return the states of the global generators.

    Args:
        cuda: whether to include those of the CUDA devices.
    """
    state: RandomState = {
        "torch": torch.get_rng_state(),
        "numpy": numpy.random.get_state(legacy=False),
        "python": random.getstate(),
    }
    if cuda:
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: RandomState) -> None:
    """Put the global generators into the states that `capture` returned."""
    torch.set_rng_state(state["torch"])
    numpy.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def plain(value: Any) -> Any:
    """Return a state for a file: of tensors, numbers and tuples, without numpy's arrays."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value.tolist() if isinstance(value, (numpy.ndarray, numpy.generic)) else value


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch (CUDA's as well), numpy and Python."""
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def preserved(cuda: bool = False) -> Iterator[None]:
    """Put the global generators back afterwards into the states that they had before."""
    state = capture(cuda)
    try:
        yield
    finally:
        restore(state)


class RandomStream:
    """Global generators of one's own: inside `with stream:` they go on from where this stream has stopped.

    Args:
        seed: where the stream begins.
    """

    def __init__(self, seed: int) -> None:
        with preserved():
            seed_everything(seed)
            self.state = capture()
        self._outer: RandomState | None = None

    def __enter__(self) -> None:
        self._outer = capture()
        restore(self.state)

    def __exit__(self, *error: object) -> None:
        self.state = capture()
        if self._outer is not None:
            restore(self._outer)


def generators_of(data: object) -> list[Any]:
    """Return the generators that a loader or its samplers and dataset hold: torch's, numpy's and Python's own."""
    sampler = getattr(data, "sampler", None)
    batch_sampler = getattr(data, "batch_sampler", None)
    holders = (data, sampler, batch_sampler, getattr(batch_sampler, "sampler", None), getattr(data, "dataset", None))
    found: dict[int, Any] = {}
    for holder in holders:
        for value in getattr(holder, "__dict__", {}).values():
            if isinstance(value, (torch.Generator, numpy.random.Generator, numpy.random.RandomState, random.Random)):
                found[id(value)] = value
    return list(found.values())


def generator_state(generator: Any) -> Any:
    """Return the state of a generator, made of tensors, numbers and tuples."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, numpy.random.Generator):
        return plain(generator.bit_generator.state)
    if isinstance(generator, numpy.random.RandomState):
        return plain(generator.get_state(legacy=False))
    return generator.getstate()


def set_generator_state(generator: Any, state: Any) -> None:
    """Put a generator into a state that `generator_state` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, numpy.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)
