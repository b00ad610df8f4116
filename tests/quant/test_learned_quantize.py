"""Fake quantisation in training: gradients against autograd of the formulas, first grids, freezing, resuming."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import OptionError
from fxcompress.quant.arithmetic import affine_parameters, coarse_scale, fake_quantize, nearest_coarse_scale
from fxcompress.quant.fake_quantize import FakeQuantize, LearnedQuantize
from fxcompress.quant.observers import MinMax, MovingAverageMinMax, PerChannelError, PerChannelMinMax
from fxcompress.quant.spec import ACTIVATION, REDUCED_WEIGHT, WEIGHT, QuantSpec, activation_spec, weight_spec

few = settings(max_examples=40, deadline=None)


def formula(x: torch.Tensor, step: torch.Tensor, offset: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
    """The rounding as autograd sees it: straight through the rounding itself, everything else differentiated.

    `step` and `offset` have as many dimensions as `x`.
    """
    ratio = x / step
    integers = ratio.detach().round() + (ratio - ratio.detach())
    lowest = torch.full_like(step, spec.quant_min) if offset is None else (offset / step).round()
    highest = lowest + spec.quant_max - spec.quant_min
    below = lowest.detach() * step if offset is None else offset
    above = torch.where(integers > highest, below + (spec.quant_max - spec.quant_min) * step, integers * step)
    return torch.where(integers < lowest, below, above)


@few
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]))
def test_gradients_of_a_weight_are_those_of_the_formula(seed: int, bits: int) -> None:
    torch.manual_seed(seed)
    spec = weight_spec(bits)
    weight = torch.randn(5, 3, 2, 2) * torch.logspace(-2, 2, 5).view(-1, 1, 1, 1)
    module = LearnedQuantize(PerChannelError(spec), is_weight=True, channels=5)
    module(weight / 2)  # so that something is clipped
    expected, found = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    result = module(found)
    step = module.scale.view(-1, 1, 1, 1).clone().requires_grad_()
    reference = formula(expected, step, None, spec)
    assert torch.allclose(result, reference, rtol=1e-6, atol=0)
    towards = torch.randn_like(weight)
    result.backward(towards)
    reference.backward(towards)
    assert found.grad is not None and expected.grad is not None and step.grad is not None  # noqa: PT018
    assert torch.allclose(found.grad, expected.grad, rtol=1e-5, atol=0)
    assert not torch.equal(found.grad, towards)
    factor = 1 / math.sqrt(12 * spec.quant_max)
    assert module.step.grad is not None
    wanted = factor * step.grad.flatten() / module.initial_step
    assert torch.allclose(module.step.grad, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


@few
@given(st.integers(0, 10**6), st.sampled_from([3, 4, 8]), st.floats(-0.5, 1.5))
def test_gradients_of_values_are_those_of_the_formula(seed: int, bits: int, shift: float) -> None:
    torch.manual_seed(seed)
    spec = activation_spec(bits)
    module = LearnedQuantize(MinMax(spec))
    module(torch.randn(4, 6) * 0.5 + shift)  # a narrow first batch, so that later ones are clipped
    x = torch.randn(4, 3, 2) * 9 + shift
    expected, found = x.clone().requires_grad_(), x.clone().requires_grad_()
    result = module(found)
    step = module.scale.clone().requires_grad_()
    offset = (module.scale * (spec.quant_min - module.zero_point)).requires_grad_()
    reference = formula(expected, step, offset, spec)
    assert torch.allclose(result, reference, rtol=1e-5, atol=1e-6)
    towards = torch.randn_like(x)
    result.backward(towards)
    reference.backward(towards)
    assert found.grad is not None and expected.grad is not None  # noqa: PT018
    assert torch.allclose(found.grad, expected.grad, rtol=1e-5, atol=0)
    assert not torch.equal(found.grad, towards)
    factor = 1 / math.sqrt(6 * spec.quant_max)
    assert step.grad is not None and module.step.grad is not None  # noqa: PT018
    assert float(module.step.grad) == pytest.approx(factor * float(step.grad / module.initial_step), rel=1e-3, abs=1e-6)
    assert offset.grad is not None and module.offset is not None and module.offset.grad is not None  # noqa: PT018
    start = float(module.initial_offset)
    wanted = factor * float(offset.grad) / start if start else 0.0
    assert float(module.offset.grad) == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_plain_descent_moves_the_step_as_if_it_were_learned_itself_and_adam_moves_it_by_shares() -> None:
    torch.manual_seed(0)
    spec = replace(weight_spec(4), significands=())  # fine steps, which show a small move
    weight = torch.randn(3, 8) * torch.tensor([[0.01], [1.0], [100.0]])

    def moved(optimiser: type[torch.optim.Optimizer], rate: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        module = LearnedQuantize(PerChannelError(spec), is_weight=True, channels=3)
        module(weight).square().sum().backward()
        before = module.scale.clone()
        step = before.view(-1, 1).clone().requires_grad_()
        formula(weight, step, None, spec).square().sum().backward()
        optimiser(module.parameters(), lr=rate).step()  # type: ignore[call-arg]
        module(weight)
        assert step.grad is not None
        return before, module.scale - before, step.grad.flatten()

    before, change, gradient = moved(torch.optim.SGD, 1e-2)
    assert torch.allclose(change, -1e-2 * gradient / math.sqrt(8 * 7), rtol=0.01)
    assert bool((change.abs() > 1e-5 * before).all())
    before, change, _ = moved(torch.optim.Adam, 1e-3)
    assert (change / before).abs().tolist() == pytest.approx([1e-3] * 3, rel=0.01)


def test_a_range_from_zero_stays_so() -> None:
    module = LearnedQuantize(MinMax(ACTIVATION))
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(5):
        optimiser.zero_grad()
        module(torch.rand(8, 10) * 3).sum().backward()
        optimiser.step()
    assert int(module.zero_point) == 0
    assert not torch.equal(module.step, torch.ones(1))
    assert module.offset is not None
    assert torch.equal(module.offset, torch.ones(1))


@few
@given(st.floats(2.0**-60, 2.0**60), st.sampled_from([ACTIVATION, WEIGHT]))
def test_the_nearest_coarse_scale(scale: float, spec: QuantSpec) -> None:
    found = float(nearest_coarse_scale(torch.tensor(scale), spec.significands))
    exponents = range(-70, 70)
    allowed = [math.ldexp(s, e) for s in spec.significands for e in exponents]
    best = min(allowed, key=lambda one: abs(math.log(one / float(torch.tensor(scale)))))
    assert found == pytest.approx(best, rel=1e-6) or abs(math.log(found / scale)) <= abs(math.log(best / scale)) + 1e-6
    assert float(nearest_coarse_scale(torch.tensor(found), spec.significands)) == found
    assert float(coarse_scale(torch.tensor(found), spec.significands)) == found


@pytest.mark.parametrize("kind", [FakeQuantize, LearnedQuantize])
def test_the_first_batch_in_training_sets_the_first_grid(kind: type[FakeQuantize]) -> None:
    first, second = torch.linspace(-1, 3, 50).view(5, 10), torch.linspace(-8, 8, 50).view(5, 10)
    module = kind(MinMax())
    module.eval()
    assert torch.equal(module(second), second)  # transparent before training
    module.train()
    expected = affine_parameters(torch.tensor(-1.0), torch.tensor(3.0), ACTIVATION)
    assert torch.equal(module(first), fake_quantize(first, *expected, ACTIVATION))
    module.eval()
    assert torch.equal(module(first), fake_quantize(first, *expected, ACTIVATION))


def test_calibration_before_training_sets_the_first_grid() -> None:
    module = LearnedQuantize(MinMax()).eval()
    module.recording = True
    module(torch.linspace(-4, 4, 9))
    module.recording = False
    module.train()
    module(torch.linspace(0, 1, 9).view(1, -1))
    assert torch.equal(module.scale, affine_parameters(torch.tensor(-4.0), torch.tensor(4.0), ACTIVATION)[0])


def test_following_fake_quantisers_forget_old_weights_and_average_values() -> None:
    weights = FakeQuantize(PerChannelMinMax(WEIGHT), is_weight=True, channels=2)
    weights(torch.tensor([[1.0, 100.0], [2.0, -3.0]]))
    weights(torch.tensor([[1.0, 0.5], [2.0, -3.0]]))
    assert torch.equal(weights.scale, affine_parameters(torch.tensor([0.5, -3.0]), torch.tensor([1.0, 2.0]), WEIGHT)[0])
    values = FakeQuantize(MovingAverageMinMax(momentum=0.5))
    values(torch.tensor([0.0, 1.0]))
    values(torch.tensor([0.0, 3.0]))
    assert torch.equal(values.scale, affine_parameters(torch.tensor(0.0), torch.tensor(2.0), ACTIVATION)[0])


@pytest.mark.parametrize("kind", [FakeQuantize, LearnedQuantize])
def test_grids_stay_from_a_share_of_training_on(kind: type[FakeQuantize]) -> None:
    def trained(module: FakeQuantize, done: float) -> torch.Tensor:
        module.follow_training(done)
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1)), *module.parameters()], lr=1e-5)
        for _ in range(4):
            optimiser.zero_grad()
            module(torch.arange(16.0, requires_grad=True).view(2, 8)).sum().backward()
            assert all(parameter.grad is not None for parameter in module.parameters())  # for several processes
            optimiser.step()
        return module.scale.clone()

    spec = replace(ACTIVATION, significands=())  # fine, so that every move shows
    module = kind(MovingAverageMinMax(spec), freeze_at=0.75)
    module(torch.arange(16.0).view(2, 8) / 3)
    first = module.scale.clone()
    assert not torch.equal(trained(module, 0.5), first)
    kept = module.scale.clone()
    assert torch.equal(trained(module, 0.75), kept)
    assert not torch.equal(trained(module, 0.0), kept)  # the next training starts anew


@pytest.mark.parametrize("kind", [FakeQuantize, LearnedQuantize])
@pytest.mark.parametrize("spec", [WEIGHT, ACTIVATION])
def test_the_state_dict_holds_all_of_the_state(kind: type[FakeQuantize], spec: QuantSpec) -> None:
    def fresh() -> FakeQuantize:
        if spec is WEIGHT:
            return kind(PerChannelMinMax(spec), is_weight=True, channels=3, freeze_at=0.5)
        return kind(MovingAverageMinMax(spec), freeze_at=0.5)

    def step(module: FakeQuantize, index: int) -> torch.Tensor:
        module.follow_training(index / 10)
        result: torch.Tensor = module(torch.randn(3, 4, generator=torch.Generator().manual_seed(index)))
        if list(module.parameters()):
            result.square().sum().backward()
            torch.optim.SGD(module.parameters(), lr=0.01).step()
            module.zero_grad()
        return result.detach()

    uninterrupted = fresh()
    for index in range(3):
        step(uninterrupted, index)
    resumed = fresh()
    resumed.load_state_dict(copy.deepcopy(uninterrupted.state_dict()))
    for index in range(3, 8):
        assert torch.equal(step(uninterrupted, index), step(resumed, index))
    resumed.eval(), uninterrupted.eval()
    x = torch.randn(3, 4)
    assert torch.equal(resumed(x), uninterrupted(x))


def test_steps_follow_the_scale_that_weights_are_multiplied_by() -> None:
    """What a batch norm does to a folded weight does not clip it."""
    weight, gain = torch.randn(3, 20), torch.tensor([1.0, 2.0, 0.0])
    module = LearnedQuantize(PerChannelMinMax(WEIGHT), is_weight=True, channels=3)
    first = module(weight * gain[:, None], gain)
    later = module(weight * gain[:, None] * 16, gain * 16)
    assert torch.equal(later, first * 16)
    clipped = module(weight * gain[:, None] * 16, gain)  # without being told
    assert not torch.equal(clipped, later)
    assert bool(later.isfinite().all())


def test_half_precision_is_rounded_in_float() -> None:
    module = LearnedQuantize(MinMax())
    x = torch.linspace(-1, 3, 50).view(5, 10)
    assert module(x.bfloat16()).dtype == torch.float32


# -- formats and ranges for fewer bits -------------------------------------------------------------------------------


def test_formats_of_some_bits() -> None:
    assert (weight_spec(4).quant_min, weight_spec(4).quant_max) == (-8, 7)
    assert weight_spec(8) == WEIGHT
    assert weight_spec(8, reduced=True) == REDUCED_WEIGHT
    assert weight_spec(7, reduced=True).quant_min >= -64
    assert activation_spec(4).quant_max == 15
    assert activation_spec(8) == ACTIVATION


@few
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4]))
def test_ranges_of_least_error_beat_those_of_everything(seed: int, bits: int) -> None:
    torch.manual_seed(seed)
    weight, spec = torch.randn(4, 200), weight_spec(bits)

    def error(observer: Any) -> torch.Tensor:
        observer.recording = True
        observer(weight)
        scale, zero_point = observer.calculate_qparams()
        return (fake_quantize(weight, scale, zero_point, spec) - weight).square().sum(1)

    best, everything = error(PerChannelError(spec)), error(PerChannelMinMax(spec))
    assert bool((best <= everything).all())
    assert best.sum() < 0.9 * everything.sum()


def test_a_format_without_channels_is_refused() -> None:
    with pytest.raises(OptionError, match="channel_axis"):
        PerChannelError(ACTIVATION)
    with pytest.raises(OptionError, match="freeze_at"):
        FakeQuantize(MinMax(), freeze_at=1.5)
