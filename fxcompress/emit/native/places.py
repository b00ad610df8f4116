"""Where views lie, in the numbers that steps have for it."""

from __future__ import annotations

import torch

from fxcompress.emit.native import steps
from fxcompress.emit.native.memory import View


def place_of(view: View) -> steps.Place:
    """Return where a value lies, with the strides of its images and pixels if it has any."""
    strides = view.strides()
    if len(strides) == 4:
        return steps.Place(view.buffer.index, view.offset, strides[3], strides[0])
    return steps.Place(view.buffer.index, view.offset, strides[0] if len(strides) == 2 else 0, 0)


def start_of(view: View) -> steps.Place:
    """Return where the first number of a value lies."""
    return steps.Place(view.buffer.index, view.offset, 0, 0)


def place_of_rows(view: View) -> steps.Place:
    """Return where a value (..., features) lies whose rows have equal distances."""
    pixel = view.strides()[-2] if view.meta.ndim > 1 else 0
    return steps.Place(view.buffer.index, view.offset, pixel, 0)


def side_by_side(meta: torch.Tensor) -> bool:
    """Return whether a tensor holds images whose channels lie side by side."""
    return meta.ndim == 4 and meta.stride(1) == 1 and (meta.shape[1] > 1 or meta.shape[2:].numel() == 1)
