"""Integers of up to 4 bits, two to a byte, as files hold them. Kernels compute with the whole bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def fits(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a weight of integers that 4 bits can hold, from -8 to 7."""
    if tensor.dtype != torch.int8 or tensor.ndim < 2 or not tensor.numel() or tensor.is_meta:
        return False
    low, high = torch.aminmax(tensor)
    return int(low) >= -8 and int(high) <= 7


def pack(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes (uint8, one dimension) for integers that fit, the first of each two in the lower half."""
    flat = tensor.flatten().view(torch.uint8).bitwise_and(15)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[::2] | flat[1::2] << 4


def unpack(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the int8 tensor of a shape that `pack` made bytes of.

    Raises:
        ValueError: they are not the bytes for that many integers.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != ((count + 1) // 2,):
        raise ValueError(f"{packed.dtype} of shape {tuple(packed.shape)} does not hold {count} integers of 4 bits")
    halves = torch.stack([packed & 15, packed >> 4], 1).flatten()[:count]
    return (halves.view(torch.int8) ^ 8).sub_(8).reshape(tuple(shape))
