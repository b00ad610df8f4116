"""Statistics of observers, brought together from all processes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from fxcompress import processes
from fxcompress.quant.fake_quantize import FakeQuantize


def merge_over_processes(observers: Mapping[str, Any]) -> None:
    """Give every process the statistics of all: each observer then knows what it would have seen in one process.

    Args:
        observers: by path, the same ones in every process; each has `merge(other)`.

    Raises:
        UnsupportedError: an observer cannot be merged.
        ProcessError: a process has ended.
    """
    if processes.count() == 1:
        return
    own: dict[str, nn.Module] = {
        path: observer.observer if isinstance(observer, FakeQuantize) else observer
        for path, observer in observers.items()
    }
    states = {path: {name: tensor.cpu() for name, tensor in one.state_dict().items()} for path, one in own.items()}
    everywhere = processes.gather(states, "bringing statistics of observers together")
    for path, observer in own.items():
        fresh = copy.deepcopy(observer)
        fresh.reset()  # type: ignore[operator]
        observer.reset()  # type: ignore[operator]
        for found in everywhere:  # in the same order everywhere, so that all get the same bits
            donor = copy.deepcopy(fresh)
            donor.load_state_dict(found[path])
            observer.merge(donor)  # type: ignore[operator]
