"""The processes of a run: how many there are, which one this is, and what they tell each other.

Under `torchrun` or `accelerate launch` every process runs the same program. What needs data is shared among them, and
every process decides the same; only the first one writes files. A process group that is there already is used; without
one it is started, from the variables that these launchers set, when it is first needed.

Whatever is compiled must then be compiled by all of them. `with alone():` is for a process that works by itself.
"""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fxcompress.errors import ProcessError

T = TypeVar("T")

#: How long a process waits for the others.
TIMEOUT = datetime.timedelta(minutes=30)

_alone = False


def count() -> int:
    """Return the number of processes; 1 without a launcher."""
    return dist.get_world_size() if _is_started() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _is_started() else 0


def is_main() -> bool:
    """Whether this process is the one that writes files and draws progress bars."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Work in this process as if there were no others."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def gather(value: T, what: str = "gathering values") -> list[T]:
    """Return the values of all processes, in order; every one of them must call it.

    Args:
        value: anything that can be pickled; tensors on the CPU.
        what: for the message, should a process be gone.

    Raises:
        ProcessError: a process has ended or cannot be reached.
    """
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    with _talking(what):
        dist.all_gather_object(values, value)
    return values


def from_main(make: Callable[[], T], what: str = "waiting for the first process") -> T:
    """Return what `make()` returns in the first process; the others do not call it.

    Raises:
        ProcessError: a process has ended or cannot be reached, or `make` failed in the first one.
    """
    if count() == 1:
        return make()
    if not is_main():
        nothing: tuple[Any, str | None] = (None, None)
        value, failure = gather(nothing, what)[0]
        if failure is not None:
            raise ProcessError(f"{what}: the first process failed: {failure}")
        found: T = value
        return found
    try:
        made = make()
    except Exception as error:
        gather((None, f"{type(error).__name__}: {error}"), what)
        raise
    gather((made, None), what)
    return made


def add_up(tensors: Sequence[torch.Tensor], what: str = "adding up gradients") -> None:
    """Replace each tensor by its sum over all processes, in place. All processes get the same bits.

    Raises:
        ProcessError: a process has ended or cannot be reached.
    """
    if count() == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in kinds.values():
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in same])
        with _talking(what):
            dist.all_reduce(flat)
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))


def shared(items: Iterable[T]) -> Iterator[T]:
    """Yield the items of this process: every n-th of them, where there are n processes."""
    for index, item in enumerate(items):
        if index % count() == rank():
            yield item


def require_same(value: object, what: str) -> None:
    """Compare a value, which must be small, over all processes.

    Raises:
        ProcessError: they differ.
    """
    values = gather(value, f"comparing {what}")
    strangers = [index for index, other in enumerate(values) if other != values[0]]
    if strangers:
        raise ProcessError(
            f"{what} differs between process 0 and process {strangers[0]} of {count()}; let every process build the "
            f"same: call torch.manual_seed before making a model, or load the same weights, and give the same options"
        )


def _is_started() -> bool:
    """Whether this process is one of several, whose group is started here if nobody has."""
    if _alone or not dist.is_available():
        return False
    if dist.is_initialized():
        return True
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        return False
    on_cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with _talking("starting the group of processes"):
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=TIMEOUT)
    atexit.register(_end)
    return True


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _talking(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ProcessError(
            f"process {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')} lost the others while "
            f"{what}: {reason}. One of them has ended; its own error says why. Started again, training goes on "
            f"from its last checkpoint, where it was given a folder for it"
        ) from error
