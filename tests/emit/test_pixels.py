"""The order in which a convolution takes pixels: all of them once, and no product left out but those with zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.emit.cpu_int8 import Int8Conv
from fxcompress.emit.native import steps
from fxcompress.emit.native.packing import windows
from fxcompress.emit.native.pixels import PixelClasses, every_place, pixel_classes
from tests.kernels import NEEDED, POSITIVE, SIGNED, assert_same, chain, filled, numbers


@st.composite
def outside(draw: Any) -> torch.Tensor:
    kernel, stride, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding = draw(st.integers(0, 5))
    reach = dilation * (kernel - 1) + 1
    size = draw(st.integers(max(1, reach - 2 * padding), 30))
    count = (size + 2 * padding - reach) // stride + 1
    return windows(size, kernel, stride, padding, dilation, count, 1) == steps.OUTSIDE


def pieces(classes: PixelClasses) -> list[tuple[list[int], set[int]]]:
    """The pixels and the places of every class."""
    order = torch.arange(int(classes.ends[-1])) if classes.order is None else classes.order
    sizes = classes.ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()
    split = zip(order.split(sizes), classes.places.split(classes.borders.diff().tolist()), strict=True)
    return [(pixels.tolist(), set(places.tolist())) for pixels, places in split]


@given(outside(), outside(), st.sampled_from([1, 2, 16]))
@settings(max_examples=200, deadline=None)
def test_every_pixel_has_the_places_that_it_needs(rows: torch.Tensor, columns: torch.Tensor, images: int) -> None:
    found = pieces(pixel_classes(rows, columns, images))
    assert sorted(pixel for pixels, _ in found for pixel in pixels) == list(range(len(rows) * len(columns)))
    for pixels, places in found:
        assert places <= set(range(rows.shape[1] * columns.shape[1]))
        assert places  # a class without any would have no work to share
        for pixel in pixels:
            inside = ~rows[pixel // len(columns)][:, None] & ~columns[pixel % len(columns)][None]
            assert set(inside.flatten().nonzero().flatten().tolist()) <= places


def products(classes: PixelClasses) -> int:
    return sum(len(pixels) * len(places) for pixels, places in pieces(classes))


def test_images_of_7_by_7_need_a_seventh_less() -> None:
    edge = windows(7, 3, 1, 1, 1, 7, 1) == steps.OUTSIDE
    assert products(every_place(49, 9)) == 441
    assert products(pixel_classes(edge, edge, 16)) == 361
    assert products(pixel_classes(edge, edge, 1)) <= 399  # corners are too few to be taken by themselves


def test_where_little_is_outside_pixels_stay_in_their_order() -> None:
    edge = windows(112, 3, 1, 1, 1, 112, 1) == steps.OUTSIDE
    assert pixel_classes(edge, edge, 1).order is None
    inside = windows(9, 3, 1, 0, 1, 7, 1) == steps.OUTSIDE
    assert pixel_classes(inside, inside, 1).order is None


@NEEDED
@pytest.mark.parametrize("grid", [POSITIVE, SIGNED])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "channels", "groups", "images"),
    [(7, 3, 1, 1, 96, 1, 1), (7, 3, 1, 1, 512, 1, 3), (14, 3, 1, 1, 64, 2, 2), (9, 5, 2, 2, 40, 1, 4),
     (4, 3, 1, 3, 32, 1, 2), (5, 3, 1, 1, 20, 1, 17)],
)  # fmt: skip
def test_convolutions_of_small_images(
    grid: Any, threads: int, residual: bool, size: int, kernel: int, stride: int, padding: int, channels: int,
    groups: int, images: int,
) -> None:  # fmt: skip
    layer = filled(Int8Conv(
        channels, channels, [kernel] * 2, [stride] * 2, [padding] * 2, [1, 1], groups, bias=True,
        input=grid.config(), output=SIGNED.config(), residual=POSITIVE.config() if residual else None,
    ), 3)  # fmt: skip
    x = numbers(images, channels, size, size, seed=5)
    shape = layer._result_shape(x.shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(chain(layer, inputs=1 + residual), x, *([numbers(*shape, seed=7)] if residual else []))
    finally:
        torch.set_num_threads(before)
