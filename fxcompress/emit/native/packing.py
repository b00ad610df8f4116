"""Weights and tables in the layouts that the kernels read. Everything here is plain tensor arithmetic."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from fxcompress.emit.native.memory import SLACK
from fxcompress.emit.native.steps import OUTSIDE

#: Output channels of one vector, and bytes that one instruction multiplies with each.
LANES, DEPTH = 16, 4

#: Channels of one chunk of a depthwise convolution.
CHUNK = 64


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a flat copy that starts at a multiple of 64 bytes."""
    copy = room(tensor.numel(), tensor.dtype)
    copy.view(tensor.shape).copy_(tensor)
    return copy


def room(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return memory for as many numbers, flat, that starts at a multiple of 64 bytes."""
    memory = torch.empty(count * dtype.itemsize + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + count * dtype.itemsize].view(dtype)


def rounded_up(number: int, step: int) -> int:
    """Return the smallest multiple of `step` that is not below `number`."""
    return -(-number // step) * step


def windows(size: int, kernel: int, stride: int, padding: int, dilation: int, count: int, step: int) -> torch.Tensor:
    """Return where the places of each window lie along one dimension.

    Args:
        size: of the input. count: of the output. step: bytes from one place of the input to the next.

    Returns:
        int64 (count, kernel): byte offsets, `OUTSIDE` where a place lies in the padding.
    """
    places = torch.arange(count)[:, None] * stride - padding + torch.arange(kernel)[None, :] * dilation
    return torch.where((places >= 0) & (places < size), places * step, OUTSIDE)


def adaptive_windows(size: int, count: int, step: int) -> torch.Tensor:
    """Return the same for adaptive pooling, whose windows differ in size: int64 (count, largest window)."""
    starts = [index * size // count for index in range(count)]
    ends = [-(-(index + 1) * size // count) for index in range(count)]
    longest = max(end - start for start, end in zip(starts, ends, strict=True))
    rows = [[(start + i) * step if start + i < end else OUTSIDE for i in range(longest)]
            for start, end in zip(starts, ends, strict=True)]  # fmt: skip
    return torch.tensor(rows, dtype=torch.int64)


def vectors(numbers: torch.Tensor, size: int | None = None, lanes: int = LANES) -> torch.Tensor:
    """Return one float32 number for each output channel, every `size` of them in whole vectors of `lanes` numbers."""
    size = len(numbers) if size is None else size
    groups = -(-len(numbers) // size)
    rows = torch.zeros(groups, size)
    rows.view(-1)[: len(numbers)] = numbers.detach().float()
    padded = torch.zeros(groups, rounded_up(rows.shape[1], lanes))
    padded[:, : rows.shape[1]] = rows
    return aligned(padded)


def blocks(channels: int) -> list[int]:
    """Return how many vectors of output channels each block has: four at most, and equally many where possible."""
    total = -(-channels // LANES)
    count = -(-total // 4)
    return [total // count + (index < total % count) for index in range(count)]


def convolution(weights: torch.Tensor) -> torch.Tensor:
    """Pack int8 weights (groups, out channels, places of the window, bytes at each place).

    Returns:
        int8, flat: for each group, block, place and four bytes, those of the block's output channels side by side.
    """
    groups, channels, places, run = weights.shape
    shape = (groups, rounded_up(channels, LANES), places, rounded_up(run, DEPTH))
    if weights.shape != shape:
        padded = torch.zeros(shape, dtype=torch.int8)
        padded[:, :channels, :, :run] = weights
        weights = padded
    quads = weights.unflatten(3, (-1, DEPTH)).permute(0, 2, 3, 1, 4)  # (groups, places, quads, channels, 4)
    packed = room(quads.numel(), torch.int8)  # nothing in between: large layers have no copy but this one
    rows, start = packed.view(groups, -1), 0
    for wide in blocks(channels):
        piece = quads[:, :, :, start : start + LANES * wide]
        first = start * places * shape[3]
        rows[:, first : first + piece[0].numel()].view(piece.shape).copy_(piece)
        start += LANES * wide
    return packed


def float_linear(weight: torch.Tensor) -> torch.Tensor:
    """Pack an int8 weight (out features, in features) that is multiplied as real numbers.

    Returns:
        int8, flat: for each block and input feature, the weights of the block's output channels side by side.
    """
    padded = torch.zeros(rounded_up(len(weight), LANES), weight.shape[1], dtype=torch.int8)
    padded[: len(weight)] = weight
    rows = padded.split([LANES * wide for wide in blocks(len(weight))])
    return aligned(torch.cat([block.t().flatten() for block in rows]))


def integer_vectors(numbers: torch.Tensor) -> torch.Tensor:
    """Return one int32 number for each output channel, in whole vectors."""
    padded = torch.zeros(rounded_up(len(numbers), LANES), dtype=torch.int32)
    padded[: len(numbers)] = numbers
    return aligned(padded)


def joined_groups(out_channels: int, group_in: int, groups: int) -> int:
    """Return how many groups of a convolution are computed as one, so that they have a vector of output channels.

    Where the groups cannot be divided by it, the last one reads past a pixel: not further than buffers have room for.
    """
    join = min(groups, -(-LANES // (out_channels // groups)))
    if (rounded_up(groups, join) - groups) * group_in + DEPTH > SLACK:
        join = max(number for number in range(1, join + 1) if groups % number == 0)
    return join


def merged_groups(weight: torch.Tensor, groups: int) -> tuple[torch.Tensor, int]:
    """Join groups of a grouped convolution until they have a vector of output channels; what they do not share is zero.

    Args:
        weight: int8 (out channels, in channels of a group, places).

    Returns:
        (joined groups, out channels of a joined group, in channels of a joined group, places), and how many groups are
        one. The last one is filled up with zeros.
    """
    out, join = weight.shape[0] // groups, joined_groups(weight.shape[0], weight.shape[1], groups)
    if join == 1:
        return weight.view(groups, out, *weight.shape[1:]), 1
    split = weight.new_zeros(rounded_up(groups, join), out, *weight.shape[1:])
    split[:groups] = weight.view(groups, out, *weight.shape[1:])
    split = split.unflatten(0, (-1, join))
    dense = weight.new_zeros(len(split), join, out, join, *weight.shape[1:])
    for index in range(join):
        dense[:, index, :, index] = split[:, index]
    return dense.flatten(3, 4).flatten(1, 2), join


def _vector_order() -> torch.Tensor:
    """Channels in the order in which the depthwise kernel holds a chunk: (4 vectors, 16)."""
    lane, vector, place = torch.meshgrid(torch.arange(4), torch.arange(4), torch.arange(4), indexing="ij")
    return (16 * lane + 4 * vector + place).permute(1, 0, 2).reshape(4, LANES)


def depthwise(weight: torch.Tensor) -> torch.Tensor:
    """Pack int8 weights (channels, rows, columns of the window).

    Returns:
        int8, flat: (chunks, columns, groups of four rows, 4 vectors, 16 channels, 4 rows).
    """
    channels, rows, columns = weight.shape
    padded = torch.zeros(rounded_up(channels, CHUNK), rounded_up(rows, DEPTH), columns, dtype=torch.int8)
    padded[:channels, :rows] = weight
    chunks = padded.view(-1, CHUNK, padded.shape[1] // DEPTH, DEPTH, columns).permute(0, 4, 2, 1, 3)
    return aligned(chunks[:, :, :, _vector_order().flatten()])


def depthwise_vectors(numbers: torch.Tensor) -> torch.Tensor:
    """Return one float32 number for each channel in the order of the depthwise kernel's vectors."""
    padded = torch.zeros(rounded_up(len(numbers), CHUNK))
    padded[: len(numbers)] = numbers.detach().float()
    return aligned(padded.view(-1, CHUNK)[:, _vector_order().flatten()])


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Return where a tensor's numbers lie."""
    return ctypes.c_void_p(tensor.data_ptr())


def numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Return four numbers for a step, with zeros in front."""
    return (ctypes.c_int64 * 4)(*([0] * (4 - len(values)) + list(values)))
