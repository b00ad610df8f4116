"""Statistics of observers, brought together from all processes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fxcompress import processes
from fxcompress.quant.fake_quantize import FakeQuantize


def can_merge(observers: Mapping[str, Any]) -> bool:
    """Whether the statistics of all these observers can be brought together; others must see all data themselves."""
    return all(getattr(_inner(observer), "merges", False) for observer in observers.values())


def merge_over_processes(observers: Mapping[str, Any]) -> None:
    """Give every process the statistics of all: each observer then knows what it would have seen in one process.

    Args:
        observers: by path, the same ones in every process; all of them can be merged.

    Raises:
        ProcessError: a process has ended.
    """
    own = {path: _inner(observer) for path, observer in observers.items()}
    states = {path: {name: tensor.cpu() for name, tensor in one.state_dict().items()} for path, one in own.items()}
    everywhere = processes.gather(states, "bringing statistics of observers together")
    for path, observer in own.items():
        observer.reset()
        fresh = copy.deepcopy(observer)
        for found in everywhere:  # in the same order everywhere, so that all get the same bits
            donor = copy.deepcopy(fresh)
            donor.load_state_dict(found[path])
            observer.merge(donor)


def _inner(observer: Any) -> Any:
    return observer.observer if isinstance(observer, FakeQuantize) else observer
