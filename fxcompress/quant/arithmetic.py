"""From ranges to scales, and from real numbers to integers and back.

Everything here rounds as PyTorch's `fake_quantize_*_affine` does: q = clamp(round_half_even(x / scale) + zero_point).
Scheme: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
2018.
"""

from __future__ import annotations

import math

import torch

from fxcompress.quant.spec import QuantSpec

#: Scales below this would overflow when they are inverted or underflow when they are multiplied in float32.
SMALLEST_SCALE = 1e-18


#: A coarse scale may fall short of the range by this share: by one step of 128 at each end.
SLACK = 1 / 128


def affine_parameters(
    minimum: torch.Tensor, maximum: torch.Tensor, spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale (float32) and the zero point (int32) with which a format covers [minimum, maximum].

    The range is widened to hold zero, which every grid represents exactly (padding depends on it). A range that is
    nothing but zero gets the scale 1.

    Args:
        minimum, maximum: finite tensors of one shape: () or, with a scale for each channel, (channels,).
    """
    low = minimum.detach().float().clamp(max=0.0)
    high = maximum.detach().float().clamp(min=0.0)
    if spec.symmetric:
        scale = coarse_scale(_symmetric_scale(low, high, spec), spec.significands)
        return scale, torch.full_like(scale, spec.middle, dtype=torch.int32)
    scale = _safe((high.double() - low.double()).div(spec.quant_max - spec.quant_min).float())
    scale = coarse_scale(scale, spec.significands)
    return scale, zero_point_for(low, scale, spec)


def zero_point_for(low: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return the integer (int32) for zero with which the grid starts next to `low`; even where scales are coarse."""
    multiple = 2 if spec.significands else 1
    steps = torch.round((spec.quant_min - low / scale) / multiple) * multiple
    lowest = -(-spec.quant_min // multiple) * multiple
    highest = spec.quant_max // multiple * multiple
    return steps.clamp(lowest, highest).to(torch.int32)


def _symmetric_scale(low: torch.Tensor, high: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    below, above = spec.middle - spec.quant_min, spec.quant_max - spec.middle
    if spec.dtype == torch.int8 and below == above + 1:
        below = above  # -128 .. 127: the spare number below is not worth a coarser grid
    return _safe(torch.maximum(-low / below, high / above))


def _safe(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, scale.clamp(min=SMALLEST_SCALE), torch.ones_like(scale))


def coarse_scale(scale: torch.Tensor, significands: tuple[int, ...]) -> torch.Tensor:
    """Return the next number upwards that is one of the significands times a power of two; see `QuantSpec`.

    Args:
        scale: positive, float32, of any shape.
        significands: whole numbers, the largest below twice the smallest; empty: the scale is returned as it is.
    """
    if not significands:
        return scale
    base = min(significands)
    fraction, exponent = torch.frexp(scale.double())  # 0.5 <= fraction < 1
    steps = torch.tensor([*sorted(significands), 2 * base], dtype=torch.float64, device=scale.device) / (2 * base)
    chosen = steps[torch.searchsorted(steps, fraction * (1 - SLACK))]
    return torch.ldexp(chosen, exponent).float()


def nearest_coarse_scale(scale: torch.Tensor, significands: tuple[int, ...]) -> torch.Tensor:
    """Return the number nearest to a scale, as a ratio, that is one of the significands times a power of two.

    Args:
        scale: positive, float32, of any shape.
        significands: as `coarse_scale` takes them.
    """
    if not significands:
        return scale
    base = min(significands)
    fraction, exponent = torch.frexp(scale.double())  # 0.5 <= fraction < 1
    steps = torch.tensor([*sorted(significands), 2 * base], dtype=torch.float64, device=scale.device) / (2 * base)
    chosen = steps[torch.searchsorted((steps[:-1] * steps[1:]).sqrt(), fraction)]
    return torch.ldexp(chosen, exponent).float()


def coarsened(scale: torch.Tensor, zero_point: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of a grid with the coarse scale and even zero point of `spec` that covers the same range."""
    wider = coarse_scale(scale, spec.significands)
    if spec.symmetric or not spec.significands:
        return wider, zero_point
    return wider, zero_point_for(scale * (spec.quant_min - zero_point), wider, spec)


def broadcast(parameter: torch.Tensor, ndim: int, axis: int | None) -> torch.Tensor:
    """Shape a scale or zero point of shape () or (channels,) so that it multiplies a tensor along `axis`."""
    if axis is None or parameter.ndim == 0:
        return parameter
    shape = [1] * ndim
    shape[axis] = -1
    return parameter.view(shape)


def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return the integers, of dtype `spec.dtype`, that stand for a float tensor."""
    scale, zero_point = (broadcast(p, x.ndim, spec.channel_axis) for p in (scale, zero_point))
    steps = torch.round(x.float() * scale.reciprocal())
    return (steps + zero_point).clamp(spec.quant_min, spec.quant_max).to(spec.dtype)


def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None = None) -> torch.Tensor:
    """Return the float32 numbers that integers stand for."""
    scale, zero_point = (broadcast(p, q.ndim, axis) for p in (scale, zero_point))
    return (q.float() - zero_point) * scale


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return `x` rounded to the grid and clipped to its range; gradients pass where nothing was clipped."""
    if spec.channel_axis is None:
        return torch.fake_quantize_per_tensor_affine(
            x, scale.reshape(()), zero_point.reshape(()).to(torch.int32), spec.quant_min, spec.quant_max
        )
    return torch.fake_quantize_per_channel_affine(
        x, scale, zero_point.to(torch.int32), spec.channel_axis, spec.quant_min, spec.quant_max
    )


def signal_to_noise(reference: torch.Tensor, result: torch.Tensor) -> float:
    """Return the signal-to-quantisation-noise ratio of `result` in decibels: 10 log10(|reference|^2 / |difference|^2).

    Infinite where both are equal.
    """
    signal = reference.double().square().sum().item()
    noise = (reference.double() - result.double()).square().sum().item()
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
