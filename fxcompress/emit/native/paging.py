"""Weights that have been packed for kernels, out of the way: in a file that has no name, until somebody reads them."""

from __future__ import annotations

import contextlib
import ctypes
import tempfile

import torch

#: Smaller tensors stay where they are, in bytes.
SMALLEST = 1 << 16


def page_out(tensor: torch.Tensor) -> int:
    """Move a tensor's numbers to a temporary file, from which the system reads them when they are next looked at.

    The tensor stays the same object with the same numbers, and can be changed: changes stay in memory, in this process
    alone. Where no file can be written, or the system cannot remove one that is in use, nothing happens.

    Returns:
        Bytes that have become free.
    """
    if tensor.numel() * tensor.element_size() < SMALLEST or not tensor.is_contiguous() or tensor.device.type != "cpu":
        return 0
    with (
        contextlib.suppress(OSError, RuntimeError),
        torch.inference_mode(False),  # it is to be an ordinary tensor, wherever the first call happens
        tempfile.NamedTemporaryFile(prefix="fxcompress-") as file,
    ):
        flat = tensor.detach().flatten()
        flat.view(torch.uint8).numpy().tofile(file)
        file.flush()
        mapped = torch.from_file(file.name, shared=False, size=flat.numel(), dtype=tensor.dtype)
        tensor.data = mapped.view(tensor.shape)
        return flat.numel() * flat.element_size()
    return 0


def give_back() -> None:
    """Return memory that is free to the system (glibc keeps it)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
