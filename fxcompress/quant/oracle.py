"""8-bit convolution and linear in exact arithmetic: what every kernel is compared with.

Products are summed as integers (in float64, exact below 2^53), everything behind them is float64. A kernel that
computes in float32 may differ by one step where the exact result lies on the edge between two integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fxcompress.quant.spec import Grid

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Epilogue:
    """What follows the sum of products: bias, residual, activation, requantisation, in this order.

    bias: real numbers of shape (channels,).
    residual: integers added to the result, of its shape, with their grid.
    activation: an elementwise function.
    output: the grid of the result; None returns real numbers.
    """

    bias: torch.Tensor | None = None
    residual: tuple[torch.Tensor, Grid] | None = None
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None
    output: Grid | None = None


def to_grid(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the integers (uint8) nearest to real numbers, ties to even, clipped to the grid."""
    return (torch.round(x.double() / grid.scale) + grid.zero_point).clamp(grid.quant_min, grid.quant_max).byte()


def from_grid(q: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the real numbers (float64) that integers stand for."""
    return (q.double() - grid.zero_point) * grid.scale


def convolution(
    q: torch.Tensor,
    grid: Grid,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    epilogue: Epilogue,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Convolve integers with integers.

    Args:
        q: uint8 of shape (batch, in channels, *spatial), on `grid`. Padding stands for the real number zero.
        weight: int8 of shape (out channels, in channels / groups, *kernel).
        weight_scale: of shape (out channels,).
    """
    products = _CONVOLUTIONS[q.ndim - 2](
        q.double() - grid.zero_point, weight.double(), None, stride, padding, dilation, groups
    )
    return _finish(products, grid, weight_scale, epilogue, channel_axis=1)


def linear(
    q: torch.Tensor, grid: Grid, weight: torch.Tensor, weight_scale: torch.Tensor, epilogue: Epilogue
) -> torch.Tensor:
    """Multiply integers of shape (..., in features) with an int8 weight of shape (out features, in features)."""
    return _finish(F.linear(q.double() - grid.zero_point, weight.double()), grid, weight_scale, epilogue, -1)


def _finish(
    products: torch.Tensor, grid: Grid, weight_scale: torch.Tensor, epilogue: Epilogue, channel_axis: int
) -> torch.Tensor:
    shape = [1] * products.ndim
    shape[channel_axis] = -1
    result = products * (weight_scale.double() * grid.scale).view(shape)
    if epilogue.bias is not None:
        result = result + epilogue.bias.double().view(shape)
    if epilogue.residual is not None:
        result = result + from_grid(*epilogue.residual)
    if epilogue.activation is not None:
        result = epilogue.activation(result)
    return result if epilogue.output is None else to_grid(result, epilogue.output)
