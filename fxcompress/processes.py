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

#: Where launchers say which process this is, and how many there are: torchrun, and MPI behind `accelerate launch`.
_VARIABLES = (
    ("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"),
)  # fmt: skip

_alone = False


def count() -> int:
    """Return the number of processes; 1 without a launcher. This asks nobody, and waits for nobody."""
    if _alone or not dist.is_available():
        return 1
    return dist.get_world_size() if dist.is_initialized() else _from_launcher()[1]


def rank() -> int:
    """Return the number of this process, from 0. This asks nobody, and waits for nobody."""
    if count() == 1:
        return 0
    return dist.get_rank() if dist.is_initialized() else _from_launcher()[0]


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
        what: what this is for, in a message, should a process be gone.

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

    Args:
        make: returns anything that can be pickled; tensors on the CPU.
        what: for the message, should a process be gone.

    Raises:
        ProcessError: a process has ended or cannot be reached, or `make` failed in the first one.
    """
    if count() == 1:
        return make()
    made: list[Any] = [None, None]  # the value, or why there is none
    failure: Exception | None = None
    if is_main():
        try:
            made[0] = make()
        except Exception as error:
            failure = error
            made[1] = f"{type(error).__name__}: {error}"
    with _talking(what):
        dist.broadcast_object_list(made, src=0)
    if failure is not None:
        raise failure
    if made[1] is not None:
        raise ProcessError(f"{what}: the first process failed: {made[1]}")
    value: T = made[0]
    return value


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


def copy_from_main(tensors: Sequence[torch.Tensor], what: str = "copying tensors") -> None:
    """Give each tensor the values that it has in the first process, in place.

    Raises:
        ProcessError: a process has ended or cannot be reached.
    """
    if count() == 1:
        return
    values = from_main(lambda: [tensor.detach().cpu() for tensor in tensors], what)
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


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
    values = gather(value, f"comparing the {what}")
    strangers = [index for index, other in enumerate(values) if other != values[0]]
    if strangers:
        raise ProcessError(
            f"processes 0 and {strangers[0]} of {count()} do not have the same {what}: call torch.manual_seed before "
            f"making a model, or load the same weights, and give the same passes"
        )


def _from_launcher() -> tuple[int, int]:
    """The number of this process, and how many there are, as the launcher says."""
    for number_name, total_name in _VARIABLES:
        number, total = os.environ.get(number_name, ""), os.environ.get(total_name, "")
        if number.isdigit() and total.isdigit() and int(total) > 1 and "MASTER_ADDR" in os.environ:
            return int(number), int(total)
    return 0, 1


def _start() -> None:
    """Start the group of processes, if nobody has."""
    if dist.is_initialized():
        return
    on_cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    number, total = _from_launcher()
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, rank=number, world_size=total)
    atexit.register(_end)


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _talking(what: str) -> Iterator[None]:
    try:
        _start()
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ProcessError(
            f"process {rank()} of {count()} lost the others while "
            f"{what}: {reason}. One of them has ended; its own error says why. Started again, training goes on "
            f"from its last checkpoint, where it was given a folder for it"
        ) from error
