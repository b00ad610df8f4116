"""Dynamic quantisation: every row of a linear layer's input has a grid of its own, measured when it arrives.

A row is what a linear layer multiplies with its weight: one token of a transformer, all features of it. Its grid is
affine and covers the row from its smallest to its largest number, and zero. Against one grid for the whole tensor that
is finer for every row but the one with the largest numbers; against a symmetric grid it is finer wherever a row leans
to one side, and kernels that multiply unsigned with signed bytes do it at no cost. Scales are not coarse
(`quant.spec.QuantSpec`): what arrives has passed through normalisation and softmax, whose last bits no two kernels
share.

Source: Yao et al., ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers, 2022
(scales of tokens).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from fxcompress.quant.arithmetic import SMALLEST_SCALE
from fxcompress.quant.spec import QuantSpec
from fxcompress.quant.unobserved import Unobserved

#: What infinities count as, so that neither the width of a range nor the ends of its grid overflow.
_LARGEST = torch.finfo(torch.float32).max / 2


def row_parameters(x: torch.Tensor, quant_min: int, quant_max: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale (float32) and the zero point (int32) of every row.

    Numbers beyond half of the largest float32 number count as that, infinities too. A row of zeros gets scale 1, one
    with a NaN gets NaN.

    Args:
        x: (..., features), of at least one feature.
        quant_min, quant_max: the smallest and the largest integer used.

    Returns:
        Two tensors (..., 1).
    """
    x = x.detach().float()
    low = x.amin(-1, keepdim=True).clamp(-_LARGEST, 0.0)
    high = x.amax(-1, keepdim=True).clamp(0.0, _LARGEST)
    scale = (high - low) / (quant_max - quant_min)
    scale = torch.where(scale == 0, 1.0, scale.clamp(min=SMALLEST_SCALE))
    zero_point = torch.round(quant_min - low / scale).clamp(quant_min, quant_max)
    return scale, zero_point.nan_to_num(quant_min).to(torch.int32)


def quantize_rows(x: torch.Tensor, quant_min: int, quant_max: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the integers of every row as float32 numbers, its scale and its zero point.

    Args:
        x, quant_min, quant_max: as `row_parameters` takes them.
    """
    scale, zero_point = row_parameters(x, quant_min, quant_max)
    steps = torch.round(x.detach().float() * scale.reciprocal())
    return (steps + zero_point).clamp(quant_min, quant_max), scale, zero_point


def fake_quantize_rows(input: torch.Tensor, quant_min: int, quant_max: int) -> torch.Tensor:
    """Return `input` with every row rounded to its own grid, in plain float operators; gradients pass straight through.

    Args:
        input: a float tensor (..., features).
        quant_min, quant_max: as `row_parameters` takes them.
    """
    if has_torch_function_unary(input):  # a proxy of torch.fx, for which this is one operation
        traced: torch.Tensor = handle_torch_function(fake_quantize_rows, (input,), input, quant_min, quant_max)
        return traced
    q, scale, zero_point = quantize_rows(input, quant_min, quant_max)
    rounded = (q - zero_point) * scale
    if torch.is_grad_enabled() and input.requires_grad:
        straight: torch.Tensor = _StraightThrough.apply(input, rounded)
        return straight
    return rounded


class _StraightThrough(torch.autograd.Function):
    """The second tensor, with gradients as if it were the first."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class DynamicQuantize(Unobserved):
    """Stands where rows will be quantised; measures nothing beforehand, as each row brings its own range.

    Returns what it is given, and rounds its rows once training has started (`Unobserved`).

    Args:
        spec: the format of the integers.
        trains: see `Unobserved`.
    """

    def __init__(self, spec: QuantSpec, trains: bool = False) -> None:
        super().__init__(trains)
        self.spec = spec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, its rows rounded once training has started."""
        return fake_quantize_rows(x, self.spec.quant_min, self.spec.quant_max) if self.rounds(x) else x

    def extra_repr(self) -> str:
        """The integers, for the printed module."""
        return f"[{self.spec.quant_min},{self.spec.quant_max}]"
