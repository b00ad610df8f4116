"""What observers propose, against the definitions and against brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.errors import InputError, OptionError
from fxcompress.quant.arithmetic import fake_quantize, signal_to_noise
from fxcompress.quant.observers import (
    OBSERVERS,
    ExternalObserver,
    Histogram,
    MinMax,
    MovingAverageMinMax,
    Observer,
    Percentile,
    PerChannelMinMax,
    external_spec,
    make_observer,
)
from fxcompress.quant.spec import ACTIVATION, WEIGHT, QuantSpec

SYMMETRIC = QuantSpec(torch.int8, -127, 127, symmetric=True)


def record(observer: Any, *batches: torch.Tensor) -> Any:
    observer.recording = True
    for batch in batches:
        assert observer(batch) is batch
    observer.recording = False
    return observer


def squared_error(x: torch.Tensor, observer: Observer) -> float:
    return float((fake_quantize(x, *observer.calculate_qparams(), observer.spec) - x).square().sum())


@pytest.mark.parametrize("name", ["minmax", "moving-average", "histogram", "percentile"])
def test_observers_record_only_when_told_to(name: str) -> None:
    observer = make_observer(name, ACTIVATION)
    state = {key: value.clone() for key, value in observer.state_dict().items()}
    observer(torch.randn(100))
    assert all(torch.equal(value, state[key]) for key, value in observer.state_dict().items())
    with pytest.raises(InputError, match="recorded nothing"):
        observer.calculate_qparams()  # type: ignore[operator]


def test_minmax_covers_what_it_saw() -> None:
    exact = replace(ACTIVATION, significands=())
    observer = record(MinMax(exact), torch.tensor([-1.0, 2.0]), torch.tensor([4.0, 0.5]))
    scale, zero_point = observer.calculate_qparams()
    assert float(scale) == pytest.approx(5 / 255)
    assert int(zero_point) == 51
    observer.reset()
    with pytest.raises(InputError):
        observer.calculate_qparams()


def test_moving_average_forgets_slowly() -> None:
    observer = record(MovingAverageMinMax(momentum=0.25), torch.tensor([0.0, 4.0]), torch.tensor([0.0, 8.0]))
    assert [float(end) for end in observer.range()] == [0.0, 5.0]
    with pytest.raises(OptionError):
        MovingAverageMinMax(momentum=0.0)


@pytest.mark.parametrize("axis", [0, 1])
def test_each_channel_has_its_own_range(axis: int) -> None:
    x = torch.randn(4, 6, 3)
    low, high = record(PerChannelMinMax(WEIGHT.along(axis)), x, x / 2).range()
    dims = [d for d in range(3) if d != axis]
    assert torch.equal(low, x.amin(dims))
    assert torch.equal(high, x.amax(dims))


def test_channel_statistics_survive_a_state_dict() -> None:
    observer = record(PerChannelMinMax(WEIGHT), torch.randn(5, 7))
    copy = PerChannelMinMax(WEIGHT)
    copy.load_state_dict(observer.state_dict())
    assert torch.equal(copy.calculate_qparams()[0], observer.calculate_qparams()[0])


@given(seed=st.integers(0, 10_000), spread=st.floats(1e-4, 1e4), pieces=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_histogram_counts_the_same_whatever_the_batches(seed: int, spread: float, pieces: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(3000) * spread * torch.linspace(0.01, 1, 3000)  # later batches are wider
    together, apart = record(Histogram(), x), record(Histogram(), *x.chunk(pieces))
    merged = Histogram()
    for piece in reversed(x.chunk(pieces)):
        merged.merge(record(Histogram(), piece))
    for other in (apart, merged):
        assert all(torch.equal(value, together.state_dict()[key]) for key, value in other.state_dict().items())
    assert int(together.counts.sum()) == 3000
    width = math.ldexp(1.0, int(together.exponent))
    values, counts = together.distribution()
    exact = torch.floor(x.double() / width).mul(width).unique(return_counts=True)
    assert torch.equal(counts, exact[1].double())
    assert torch.all((values - exact[0]).abs() <= width)


@pytest.mark.parametrize(
    "sample",
    [
        lambda: torch.randn(20_000),
        lambda: torch.randn(20_000).relu(),
        lambda: torch.distributions.Laplace(0.0, 1.0).sample((20_000,)),
        lambda: torch.cat([torch.randn(20_000), torch.tensor([25.0])]),
        lambda: nn.functional.hardswish(torch.randn(20_000) * 3),
        lambda: -torch.rand(20_000) - 3,
        lambda: torch.full((100,), 0.7),
    ],
)
@pytest.mark.parametrize("spec", [ACTIVATION, SYMMETRIC])
def test_histogram_comes_close_to_the_least_squared_error(sample: Callable[[], torch.Tensor], spec: QuantSpec) -> None:
    torch.manual_seed(0)
    x = sample()
    found = squared_error(x, record(Histogram(spec), x))
    best = math.inf
    for share in torch.linspace(0.05, 1.0, 100).tolist():  # brute force over clipped ranges, on the numbers themselves
        clipped = record(MinMax(spec), x * share)
        best = min(best, squared_error(x, clipped))
    assert found <= best * 1.05 + 1e-9
    assert found <= squared_error(x, record(MinMax(spec), x)) * 1.001 + 1e-9


def test_percentile_clips_the_share_it_was_told_to() -> None:
    torch.manual_seed(0)
    x = torch.rand(100_000) * 2 - 1
    low, high = record(Percentile(share=99.0), x).range()
    assert float(high) == pytest.approx(0.98, abs=0.01)
    assert float(low) == pytest.approx(-0.98, abs=0.01)
    low, high = record(Percentile(share=100), x).range()
    assert (low, high) == (x.min(), x.max())
    with pytest.raises(OptionError):
        Percentile(share=40)


@pytest.mark.parametrize("name", ["minmax", "histogram", "percentile", "moving-average"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_told(name: str, value: float) -> None:
    observer = record(make_observer(name, ACTIVATION), torch.tensor([1.0, value]))
    with pytest.raises(InputError, match="NaN or infinity"):
        observer.calculate_qparams()


@pytest.mark.parametrize("name", OBSERVERS)
def test_tensors_without_elements_change_nothing(name: str) -> None:
    spec = WEIGHT if name.startswith("per-channel") else ACTIVATION
    observer = record(make_observer(name, spec), torch.empty(2, 0))
    with pytest.raises(InputError):
        observer.calculate_qparams()


class Foreign(nn.Module):
    """An observer as PyTorch users write them."""

    peak: torch.Tensor

    def __init__(self, dtype: torch.dtype = torch.quint8) -> None:
        super().__init__()
        self.dtype, self.qscheme = dtype, torch.per_tensor_affine
        self.quant_min, self.quant_max = 0, 127
        self.register_buffer("peak", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.peak.copy_(torch.maximum(self.peak, x.abs().max()))
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.peak / 63).reshape(1), torch.tensor([64])


def test_an_observer_from_elsewhere_takes_part() -> None:
    observer = make_observer(Foreign, ACTIVATION)
    assert isinstance(observer, ExternalObserver)
    assert observer.spec == QuantSpec(torch.uint8, 0, 127)
    observer(torch.tensor([1000.0]))  # not recording
    record(observer, torch.tensor([-6.3, 1.0]))
    scale, zero_point = observer.calculate_qparams()
    assert (tuple(scale.shape), float(scale), int(zero_point)) == ((), 0.125, 52)  # 0.1 and 64 on a coarse grid
    observer.reset()
    with pytest.raises(InputError, match="Foreign"):
        observer.calculate_qparams()


def test_what_is_no_observer_is_refused() -> None:
    for wanted, words in [
        ("histogramm", "did you mean 'histogram'"),
        (nn.ReLU, "calculate_qparams"),
        (lambda: 3, "no observer"),
        (3, "name, a class"),
        (lambda: Foreign(torch.qint32), "int32"),
    ]:
        with pytest.raises(OptionError, match=words):
            make_observer(wanted, ACTIVATION)
    with pytest.raises(OptionError):
        PerChannelMinMax(ACTIVATION)
    with pytest.raises(OptionError):
        Histogram(WEIGHT)
    assert external_spec(MinMax(SYMMETRIC)) is SYMMETRIC


def _numbers(observer: Observer) -> tuple[torch.Tensor, torch.Tensor]:
    return observer.calculate_qparams()


def test_histogram_is_better_than_minmax_with_outliers() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(50_000), torch.tensor([60.0])])
    quality = {
        name: signal_to_noise(x, fake_quantize(x, *_numbers(record(observer, x)), ACTIVATION))
        for name, observer in (("minmax", MinMax()), ("histogram", Histogram()))
    }
    assert quality["histogram"] > quality["minmax"] + 1
