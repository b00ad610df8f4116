"""Attention with weights in steps: near to float attention, whatever the scores, and trained as it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fxcompress.graph.capture import trace
from fxcompress.quant.arithmetic import signal_to_noise
from fxcompress.quant.attention import STEPS, ObservedAttention, fake_quantize_attention


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@given(
    st.integers(0, 1000), st.integers(1, 3), st.sampled_from([(4, 4), (4, 2), (3, 1)]), st.integers(1, 20),
    st.integers(1, 20), st.sampled_from(["none", "numbers", "booleans", "causal"]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_it_is_attention_up_to_the_steps(
    seed: int, batch: int, heads: tuple[int, int], queries: int, keys: int, mask: str
) -> None:
    q, k, v = drawn(seed, (batch, heads[0], queries, 8), (batch, heads[1], keys, 8), (batch, heads[1], keys, 5))
    options: dict[str, Any] = {"is_causal": mask == "causal", "enable_gqa": heads[0] != heads[1], "scale": 0.3}
    if mask == "numbers":
        options["attn_mask"] = drawn(seed + 1, (batch, 1, queries, keys))[0]
    if mask == "booleans":
        options["attn_mask"] = (drawn(seed + 1, (queries, keys))[0] > 0) | torch.eye(queries, keys, dtype=torch.bool)
        options["attn_mask"][:, 0] = True
    found = fake_quantize_attention(q, k, v, **options)
    wanted = F.scaled_dot_product_attention(q, k, v, **options)
    # Each weight is off by half a step of the largest one at most, as is their sum.
    assert bool(((found - wanted).abs() <= keys * v.abs().max() / STEPS).all())


def test_a_row_that_looks_everywhere_alike_loses_nothing() -> None:
    """Weights of 1/1000 are a quarter of a step of 1/255; here they are the largest ones of their row."""
    (v,) = drawn(0, (1, 1, 1000, 16))
    q, k = torch.zeros(1, 1, 3, 8), torch.randn(1, 1, 1000, 8)
    found = fake_quantize_attention(q, k, v)
    torch.testing.assert_close(found, v.mean(2, keepdim=True).expand(1, 1, 3, 16))
    plain = torch.round(torch.softmax(q @ k.transpose(2, 3), -1) * STEPS) / STEPS
    assert not plain.any()  # what a grid for the weights themselves would leave


def test_scores_of_any_size_are_fine() -> None:
    q, k, v = drawn(1, (1, 1, 4, 8), (1, 1, 6, 8), (1, 1, 6, 8))
    for factor in (1e-6, 1e3, 1e6):
        found = fake_quantize_attention(q * factor, k, v)
        assert signal_to_noise(F.scaled_dot_product_attention(q * factor, k, v), found) >= 35


def test_who_may_look_at_nothing_gets_zeros() -> None:
    q, k, v = drawn(2, (1, 1, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    found = fake_quantize_attention(q, k, v, mask)
    assert not found[:, :, 1].any()
    assert found.isfinite().all()
    hidden = torch.zeros(3, 5).masked_fill(~mask, -math.inf)
    assert torch.equal(found, fake_quantize_attention(q, k, v, hidden))


def test_gradients_are_those_of_attention() -> None:
    q, k, v = (one.requires_grad_() for one in drawn(3, (1, 2, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8)))
    found = torch.autograd.grad(fake_quantize_attention(q, k, v).square().sum(), (q, k, v))
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), (q, k, v))
    for ours, theirs in zip(found, wanted, strict=True):
        assert signal_to_noise(theirs, ours) >= 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_have_sums_in_float32(dtype: torch.dtype) -> None:
    """1,000 steps of 255 are more than float16 can hold."""
    q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1000, 8), torch.ones(1, 1, 1000, 8)
    found = fake_quantize_attention(q.to(dtype), k.to(dtype), v.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), torch.ones(1, 1, 1, 8))


def test_it_rounds_from_training_on_only() -> None:
    module = ObservedAttention(trains=True).eval()
    q, k, v = drawn(4, (1, 1, 6, 8), (1, 1, 6, 8), (1, 1, 6, 8))
    assert torch.equal(module(q, k, v), F.scaled_dot_product_attention(q, k, v))
    module.train()(q, k, v)
    assert torch.equal(module.eval()(q, k, v), fake_quantize_attention(q, k, v))
    never = ObservedAttention().train()
    assert torch.equal(never(q, k, v), F.scaled_dot_product_attention(q, k, v))


class Model(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize_attention(x, x, x)


def test_it_is_one_node_of_a_graph() -> None:
    graph: fx.GraphModule = trace(Model(), torch.randn(1, 2, 3, 4), training=False)
    assert fake_quantize_attention in {node.target for node in graph.graph.nodes}
