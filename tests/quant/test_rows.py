"""Rows on grids of their own: the numbers, against the arithmetic of single grids; edges; gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from fxcompress.quant.arithmetic import affine_parameters, quantize, signal_to_noise
from fxcompress.quant.rows import DynamicQuantize, fake_quantize_rows, quantize_rows, row_parameters
from fxcompress.quant.spec import ACTIVATION, QuantSpec

INFINITY, NAN = float("inf"), float("nan")


@given(
    st.lists(st.integers(0, 5), max_size=3), st.integers(1, 40), st.floats(-30, 30), st.floats(0, 5),
    st.sampled_from([255, 127, 15, 3]), st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_every_row_is_quantised_as_a_tensor_of_its_own(
    sizes: list[int], features: int, exponent: float, shift: float, largest: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(*sizes, features, generator=generator) + shift) * 2.0**exponent
    q, scale, zero_point = quantize_rows(x, 0, largest)
    assert q.shape == x.shape
    assert scale.shape == zero_point.shape == (*sizes, 1)
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    spec = QuantSpec(quant_max=largest, significands=())
    for row, integers, s, z in zip(
        x.view(-1, features), q.view(-1, features), scale.flatten(), zero_point.flatten(), strict=True
    ):
        expected = affine_parameters(row.min(), row.max(), spec)
        torch.testing.assert_close(s, expected[0], rtol=3e-7, atol=0)
        assert z == expected[1]
        assert torch.equal(integers, quantize(row, s, z, spec).float())
        # within half a step, and another half for the zero that was rounded
        assert ((integers - z) * s - row).abs().max() <= s * 1.001
    assert torch.equal(fake_quantize_rows(x, 0, largest), (q - zero_point) * scale)


@pytest.mark.parametrize("value", [0.0, 3.7, -1e-5, 2e30])
def test_rows_of_equal_numbers_stay_what_they_are(value: float) -> None:
    x = torch.full((2, 7), value)
    torch.testing.assert_close(fake_quantize_rows(x, 0, 255), x, rtol=3e-7, atol=0)


def test_zero_stays_zero_in_every_row() -> None:
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) + 2
    x[:, 4] = 0
    assert not fake_quantize_rows(x, 0, 255)[:, 4].any()


def test_infinities_saturate_and_nan_stays_in_its_row() -> None:
    x = torch.tensor([[INFINITY, 1, 0], [-INFINITY, INFINITY, 0], [NAN, 1, 0], [3e38, -3e38, 0], [2, 1, 0]])
    found = fake_quantize_rows(x, 0, 255)
    assert torch.isfinite(found[[0, 1, 3, 4]]).all()
    assert found[0, 0] >= 1.7e38
    assert found[1, 0] <= -1.6e38
    assert found[1, 1] >= 1.6e38
    assert found[2].isnan().all()
    assert torch.equal(found[4], fake_quantize_rows(x[4], 0, 255))
    assert not found[[0, 1, 3, 4], 2].any()


def test_a_row_depends_on_no_other() -> None:
    x = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))
    x[2] *= 1000
    for index in range(6):
        assert torch.equal(fake_quantize_rows(x, 0, 255)[index], fake_quantize_rows(x[index], 0, 255))


def test_grids_of_rows_are_finer_than_one_grid_and_than_symmetric_ones() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 64)[:, None]
    x = torch.nn.functional.gelu(x)
    together = fake_quantize_rows(x.view(1, -1), 0, 255).view(x.shape)
    symmetric = x.abs().amax(1, keepdim=True) / 127
    of_rows = signal_to_noise(x, fake_quantize_rows(x, 0, 255))
    assert of_rows > signal_to_noise(x, (x / symmetric).round() * symmetric) + 4
    assert of_rows > signal_to_noise(x, together) + 4


def test_gradients_pass_straight_through() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    (fake_quantize_rows(x, 0, 255) * torch.arange(15.0).view(3, 5)).sum().backward()
    assert torch.equal(x.grad, torch.arange(15.0).view(3, 5))  # type: ignore[arg-type]


def test_it_is_one_operation_of_a_graph() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fake_quantize_rows(x, 0, 255)

    assert [node.op for node in fx.symbolic_trace(Model()).graph.nodes] == ["placeholder", "call_function", "output"]


def test_observed_rows_pass_unchanged_until_training_starts() -> None:
    x = torch.randn(4, 6)
    for trains in (False, True):
        module = DynamicQuantize(ACTIVATION, trains).eval()
        assert module(x) is x
        trained = module.train()(x)
        assert torch.equal(trained, fake_quantize_rows(x, 0, 255)) == trains
        assert torch.equal(module.eval()(x), trained)
        assert bool(module.state_dict()["started"]) == trains


def test_scales_of_tiny_rows_can_be_inverted() -> None:
    scale, zero_point = row_parameters(torch.tensor([[1e-42, 0.0], [1e-30, -1e-30]]), 0, 255)
    assert torch.isfinite(scale.reciprocal()).all()
    assert ((zero_point >= 0) & (zero_point <= 255)).all()
