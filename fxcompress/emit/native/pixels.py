"""Which pixels of a convolution's result lack which places of their window, and in which order they are best taken.

At the edge of an image, windows reach into the padding. Where that is zeros, nothing has to be multiplied there: of an
image of 7 x 7 pixels and windows of 3 x 3, 18 % of all products. A kernel multiplies several pixels at once, which have
to leave out the same places; so they are taken in classes of pixels that do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

#: Pixels that a kernel multiplies at once, and how many it takes the time of where there are fewer: weights take as
#: long to arrive for one.
_TILE, _LEAST = 6, 3.2

#: Classes are worth their trouble from this share of the time on.
_WORTH = 0.97

#: With more of them, images are so small, or windows so large, that looking for classes takes too long.
_MOST = 36


@dataclass(frozen=True)
class PixelClasses:
    """The order in which pixels are taken, class by class, and the places of the window that each class needs.

    order: int32 (pixels of an image,); None: as they lie. ends: int64 (classes,), of the classes in that order.
    places: int32, numbers of places, class by class. borders: int64 (classes + 1,), of the classes among them.
    """

    order: torch.Tensor | None
    ends: torch.Tensor
    places: torch.Tensor
    borders: torch.Tensor


def every_place(pixels: int, places: int) -> PixelClasses:
    """Return one class of all pixels, which needs all places."""
    ends, borders = torch.tensor([pixels]), torch.tensor([0, places])
    return PixelClasses(None, ends, torch.arange(places, dtype=torch.int32), borders)


def pixel_classes(rows: torch.Tensor, columns: torch.Tensor, images: int) -> PixelClasses:
    """Return the classes with which a batch is multiplied soonest.

    Args:
        rows: bool (height, rows of the window), whether a row of the window of pixels in a row of the image lies in
            the padding. columns: the same for columns.
        images: in a batch.
    """
    plain = every_place(len(rows) * len(columns), rows.shape[1] * columns.shape[1])
    if not rows.any() and not columns.any():
        return plain
    kinds = [torch.unique(one, dim=0, return_inverse=True) for one in (rows, columns)]
    if len(kinds[0][0]) * len(kinds[1][0]) > _MOST:
        return plain
    return _classes(*(_Kinds(tuple(map(tuple, one.tolist())), tuple(of.tolist())) for one, of in kinds), images)


@dataclass(frozen=True)
class _Kinds:
    """Along one dimension: what windows there are, each with whether its places lie outside, and which one is where."""

    outside: tuple[tuple[bool, ...], ...]
    of: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def _classes(rows: _Kinds, columns: _Kinds, images: int) -> PixelClasses:
    """Join the classes that are too small to be taken by themselves."""
    pixels: dict[tuple[int, int], list[int]] = {}
    for y, row in enumerate(rows.of):
        for x, column in enumerate(columns.of):
            pixels.setdefault((row, column), []).append(y * len(columns.of) + x)
    width = len(columns.outside[0])
    found = [
        (of, frozenset(
            y * width + x
            for y, above in enumerate(rows.outside[row]) for x, beside in enumerate(columns.outside[column])
            if not above and not beside
        ) or frozenset((0,)))
        for (row, column), of in pixels.items()
    ]  # fmt: skip
    while len(found) > 1:
        pairs = [
            (_cost(len(one[0]) + len(other[0]), one[1] | other[1], images)
             - _cost(len(one[0]), one[1], images) - _cost(len(other[0]), other[1], images), i, j)
            for i, one in enumerate(found) for j, other in enumerate(found[:i])
        ]  # fmt: skip
        saved, i, j = min(pairs)
        if saved > 0:
            break
        one, other = found.pop(i), found.pop(j)
        found.append((sorted(one[0] + other[0]), one[1] | other[1]))
    plain = every_place(len(rows.of) * len(columns.of), len(rows.outside[0]) * width)
    cost = sum(_cost(len(of), places, images) for of, places in found)
    if cost > _WORTH * _cost(int(plain.ends), frozenset(plain.places.tolist()), images):
        return plain
    found.sort(key=lambda one: one[0])
    sizes = torch.tensor([[len(of), len(places)] for of, places in found]).cumsum(0)
    return PixelClasses(
        torch.tensor([pixel for of, _ in found for pixel in of], dtype=torch.int32), sizes[:, 0].contiguous(),
        torch.tensor([place for _, places in found for place in sorted(places)], dtype=torch.int32),
        torch.cat([torch.zeros(1, dtype=torch.int64), sizes[:, 1]]),
    )  # fmt: skip


def _cost(pixels: int, places: frozenset[int], images: int) -> float:
    """About how long a class takes."""
    tiles = -(-images * pixels // _TILE)
    return len(places) * max(images * pixels, _LEAST * tiles)
