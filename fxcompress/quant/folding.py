"""A batch norm as part of the weights of the layer beside it: the algebra, through which gradients pass.

Computed in float64 and rounded once to the dtype of the layer's weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fxcompress.errors import UnsupportedError

Layer = _ConvNd | nn.Linear


@dataclass(frozen=True)
class Folded:
    """The new weight and bias of a layer, in its own shape and dtype."""

    weight: torch.Tensor
    bias: torch.Tensor


def folded_backward(layer: Layer, norm: _BatchNorm) -> Folded:
    """Return weight and bias of one layer that computes `norm(layer(x))`."""
    scale, shift = scale_and_shift(norm)
    bias = shift if layer.bias is None else shift + scale * layer.bias.double()
    return Folded(scaled_rows(layer, scale), bias.to(layer.weight.dtype))


def scaled_rows(layer: Layer, scale: torch.Tensor) -> torch.Tensor:
    """Return the weight of a layer with every output channel multiplied by its entry of `scale`, shape (channels,)."""
    weight = grouped(layer, layer.weight.double())
    return ungrouped(layer, weight * scale.view(len(weight), -1, 1, 1)).to(layer.weight.dtype)


def folded_forward(layer: Layer, norm: _BatchNorm) -> Folded:
    """Return weight and bias of one layer that computes `layer(norm(x))`, where every tap reads the input."""
    weight = grouped(layer, layer.weight.double())
    scale, shift = scale_and_shift(norm)
    bias = (weight * shift.view(len(weight), 1, -1, 1)).sum((2, 3)).flatten()
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    scaled = weight * scale.view(len(weight), 1, -1, 1)
    return Folded(ungrouped(layer, scaled).to(layer.weight.dtype), bias.to(layer.weight.dtype))


def scale_and_shift(norm: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch norm with its running statistics as scale * x + shift, one number per channel, in float64."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise UnsupportedError("a batch norm without running statistics is no fixed scale and shift")
    scale = torch.rsqrt(variance.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -scale * mean.double()
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def grouped(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight, or its mask, in the one form of all layers.

    That is (groups, out / groups, in / groups, kernel elements).
    """
    if isinstance(layer, nn.Linear):
        return weight[None, :, :, None]
    groups, kernel = layer.groups, math.prod(layer.kernel_size)
    rows = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], kernel)
    return rows.transpose(1, 2) if layer.transposed else rows


def ungrouped(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """Undo `grouped`."""
    if not isinstance(layer, nn.Linear) and layer.transposed:
        weight = weight.transpose(1, 2)
    return weight.reshape(layer.weight.shape)
