"""Scales, zero points and rounding, against their definitions and against PyTorch's fake quantisation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import OptionError
from fxcompress.quant.arithmetic import (
    SLACK,
    affine_parameters,
    coarse_scale,
    dequantize,
    fake_quantize,
    quantize,
    signal_to_noise,
)
from fxcompress.quant.spec import ACTIVATION, REDUCED_WEIGHT, WEIGHT, Grid, QuantSpec

FORMATS = [
    ACTIVATION,
    QuantSpec(torch.uint8, 0, 127),
    QuantSpec(torch.uint8, 0, 255, symmetric=True),
    QuantSpec(torch.int8, -128, 127),
    QuantSpec(torch.int8, -127, 127, symmetric=True),
    QuantSpec(torch.int8, -128, 127, symmetric=True),
    QuantSpec(significands=()),
]
EXACT_WEIGHT = replace(WEIGHT, significands=())
finite = st.floats(-1e6, 1e6, width=32)


@given(a=finite, b=finite, spec=st.sampled_from(FORMATS))
@settings(max_examples=200, deadline=None)
def test_the_grid_covers_the_range_and_holds_zero(a: float, b: float, spec: QuantSpec) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero_point = affine_parameters(torch.tensor(low), torch.tensor(high), spec)
    step = float(scale)
    assert spec.quant_min <= int(zero_point) <= spec.quant_max
    lowest = step * (spec.quant_min - int(zero_point))
    highest = step * (spec.quant_max - int(zero_point))
    slack = step * (
        1.0 + 255 * 2 * SLACK
    )  # the zero point is rounded to an even number, which moves both ends by a step at most
    if spec.symmetric and spec.quant_min == -128:
        lowest = -highest
    assert lowest - slack <= min(low, 0.0)
    assert highest + slack >= max(high, 0.0)
    zero = quantize(torch.zeros(1), scale, zero_point, spec)
    assert dequantize(zero, scale, zero_point).item() == 0.0


@given(seed=st.integers(0, 10_000), spec=st.sampled_from(FORMATS), spread=st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_integers_and_pytorchs_fake_quantisation_agree_bit_for_bit(seed: int, spec: QuantSpec, spread: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(500) * spread
    scale, zero_point = affine_parameters(x.min() * 0.8, x.max() * 0.8, spec)
    integers = quantize(x, scale, zero_point, spec)
    assert integers.dtype == spec.dtype
    assert int(integers.min()) >= spec.quant_min
    assert int(integers.max()) <= spec.quant_max
    assert torch.equal(dequantize(integers, scale, zero_point), fake_quantize(x, scale, zero_point, spec))


@pytest.mark.parametrize(("weight", "reached"), [(EXACT_WEIGHT, 127), (WEIGHT, 101)])  # coarse: up to 5/4 too wide
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_channels_are_quantised_one_by_one(axis: int, weight: QuantSpec, reached: int) -> None:
    x = torch.randn(3, 4, 2, 5) * torch.logspace(-3, 3, 60).view(3, 4, 1, 5)
    spec = weight.along(axis)
    dims = [d for d in range(4) if d != axis]
    scale, zero_point = affine_parameters(x.amin(dims), x.amax(dims), spec)
    together = quantize(x, scale, zero_point, spec)
    for index in range(x.shape[axis]):
        alone = quantize(
            x.select(axis, index), scale[index], zero_point[index], QuantSpec(torch.int8, -127, 127, symmetric=True)
        )
        assert torch.equal(together.select(axis, index), alone)
    assert torch.equal(dequantize(together, scale, zero_point, axis), fake_quantize(x, scale, zero_point, spec))
    assert int(together.abs().amax()) >= reached


def test_a_range_of_nothing_but_zero_has_scale_one() -> None:
    scale, zero_point = affine_parameters(torch.tensor(0.0), torch.tensor(0.0), ACTIVATION)
    assert (float(scale), int(zero_point)) == (1.0, 0)
    scale, _ = affine_parameters(torch.tensor([0.0, -2.54]), torch.tensor([0.0, 1.0]), EXACT_WEIGHT)
    assert scale.tolist() == pytest.approx([1.0, 0.02])


@given(st.floats(2.0**-60, 2.0**60, width=32), st.sampled_from([ACTIVATION, WEIGHT]))
@settings(max_examples=200, deadline=None)
def test_coarse_scales_are_the_next_few_bits_upwards(scale: float, spec: QuantSpec) -> None:
    found = float(coarse_scale(torch.tensor(scale), spec.significands))
    fraction, _ = math.frexp(found)
    base = min(spec.significands)
    assert fraction * 2 * base in (*spec.significands, 2 * base)
    assert scale * (1 - 2 * SLACK) <= found <= scale * 4 / 3 * (1 + 1e-5)
    assert float(coarse_scale(torch.tensor(found), spec.significands)) == found


def test_reduced_weights_cannot_saturate_16_bits() -> None:
    """Without VNNI a CPU adds two products of 8-bit numbers in 16 bits."""
    assert 2 * 255 * max(-REDUCED_WEIGHT.quant_min, REDUCED_WEIGHT.quant_max) <= 2**15 - 1 < 2 * 255 * WEIGHT.quant_max


def test_gradients_pass_where_nothing_is_clipped() -> None:
    x = torch.tensor([-5.0, 0.3, 1.1, 9.0], requires_grad=True)
    fake_quantize(x, torch.tensor(0.01), torch.tensor(0), ACTIVATION).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_signal_to_noise_in_decibels() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert signal_to_noise(reference, reference + torch.tensor([0.0, 0.5])) == pytest.approx(20.0)
    assert signal_to_noise(reference, reference) == math.inf


@pytest.mark.parametrize(
    "arguments", [(torch.int32, 0, 255), (torch.uint8, -1, 255), (torch.int8, 5, 5), (torch.uint8, 0, 256)]
)
def test_impossible_formats_are_refused(arguments: tuple[torch.dtype, int, int]) -> None:
    with pytest.raises(OptionError):
        QuantSpec(*arguments)


@pytest.mark.parametrize("arguments", [(0.0, 0), (math.nan, 0), (1.0, 256), (1.0, 5, 6, 255), (-1.0, 3)])
def test_impossible_grids_are_refused(arguments: tuple[float, int]) -> None:
    with pytest.raises(OptionError):
        Grid(*arguments)


def test_a_signed_grid_is_the_unsigned_one_with_the_same_numbers() -> None:
    grid = Grid.unsigned(0.5, -3, -128, 127)
    assert grid == Grid(0.5, 125, 0, 255)
    assert Grid.from_config(grid.config()) == grid
    x = torch.linspace(-100, 100, 401)
    signed = torch.fake_quantize_per_tensor_affine(x, 0.5, -3, -128, 127)
    assert torch.equal(signed, torch.fake_quantize_per_tensor_affine(x, *grid.config()))
