"""Where the values of a plan lie: views of buffers, and one arena in which buffers share memory when they can."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT = 64

#: Bytes behind each buffer that kernels may read: four channels are read at once, and groups of them together.
SLACK = 64


@dataclass
class Buffer:
    """Memory of one value or of several that are views of it.

    place: what provides it: "arena", "input", "output", "python" (a result of a Python function) or "constant".
    bytes: its size. first, last: indices of the first and the last item of the plan that touch it.
    """

    index: int
    place: str
    bytes: int
    first: int = -1
    last: int = -1

    def touch(self, item: int) -> None:
        """Note that an item reads or writes it."""
        self.first = item if self.first < 0 else self.first
        self.last = item


@dataclass(frozen=True)
class View:
    """A tensor in a buffer; `meta` has its shape, strides, dtype and offset, and no memory."""

    buffer: Buffer
    meta: torch.Tensor

    @property
    def offset(self) -> int:
        """Bytes from the start of the buffer to the first number."""
        return int(self.meta.storage_offset()) * self.meta.element_size()

    def strides(self) -> list[int]:
        """Bytes from one index to the next, for each dimension."""
        return [stride * self.meta.element_size() for stride in self.meta.stride()]

    def other(self, meta: torch.Tensor) -> View:
        """Another view of the same buffer."""
        return View(self.buffer, meta)


def meta_tensor(shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> torch.Tensor:
    """Return a tensor without memory."""
    if strides is None:
        return torch.empty(tuple(shape), dtype=dtype, device="meta")
    return torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device="meta")


def extent(meta: torch.Tensor) -> int:
    """Return the bytes from the start of a tensor's memory to the end of its last number."""
    if meta.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(meta.shape, meta.stride(), strict=True))
    return int(meta.storage_offset() + last + 1) * meta.element_size()


def arrange(buffers: Iterable[Buffer]) -> tuple[dict[int, int], int]:
    """Give each buffer of the arena an offset, so that those in use at the same time do not overlap.

    The largest come first, each at the lowest place that is free all the while (greedy by size; Pisarchyk and Lee,
    Efficient Memory Management for Deep Neural Net Inference, 2020).

    Returns:
        Offsets by index, and the size of the arena.
    """
    placed: list[tuple[int, int, Buffer]] = []  # offset, end, buffer
    found: dict[int, int] = {}
    for buffer in sorted(buffers, key=lambda one: -one.bytes):
        size = -(-(buffer.bytes + SLACK) // ALIGNMENT) * ALIGNMENT
        offset = 0
        for start, end, other in sorted(placed, key=lambda one: one[0]):
            if other.last < buffer.first or buffer.last < other.first:
                continue
            if offset + size <= start:
                break
            offset = max(offset, end)
        placed.append((offset, offset + size, buffer))
        found[buffer.index] = offset
    return found, max((end for _, end, _ in placed), default=0)
