"""Attention on bytes, from float graphs to kernels: equal to the quantise-dequantise graph, near to float."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.emit.compact_module import CompactModule
from fxcompress.emit.cpu_int8 import Int8Attention
from fxcompress.emit.native.plan import PythonCall
from fxcompress.graph import ops
from fxcompress.quant.arithmetic import signal_to_noise
from fxcompress.quant.attention import fake_quantize_attention
from tests.kernels import NEEDED

QDQ = "fuse, fuse-activation, insert-observers, calibrate, convert-observed"


class SelfAttention(nn.Module):
    """Tokens (batch, count, width), with heads of keys that several queries may share, and a mask if it is given."""

    def __init__(self, heads: int, key_heads: int, features: int, causal: bool = False) -> None:
        super().__init__()
        width = heads * features
        self.heads, self.key_heads, self.causal = heads, key_heads, causal
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = (nn.Linear(width, key_heads * features) for _ in range(2))
        with torch.no_grad():  # so that it matters which key a query meets
            self.query.weight.mul_(4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        def split(y: torch.Tensor, heads: int) -> torch.Tensor:
            z: torch.Tensor = y.unflatten(-1, (heads, -1)).transpose(1, 2)
            return z

        y = F.scaled_dot_product_attention(
            split(self.query(x), self.heads), split(self.key(x), self.key_heads), split(self.value(x), self.key_heads),
            attn_mask=mask, is_causal=self.causal, enable_gqa=self.heads != self.key_heads,
        )  # fmt: skip
        z: torch.Tensor = self.out(y.transpose(1, 2).flatten(2))
        return z


def count(compact: CompactModule) -> int:
    return sum(isinstance(module, Int8Attention) for module in compact.modules())


def by_graph(compact: CompactModule, *inputs: torch.Tensor) -> torch.Tensor:
    other = copy.deepcopy(compact)
    other.executor = "graph"
    found: torch.Tensor = other(*inputs)
    return found


@NEEDED
@given(
    st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]), st.integers(1, 70), st.integers(1, 90), st.integers(1, 3),
    st.sampled_from(["none", "numbers", "booleans", "rows", "causal"]), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_kernels_compute_what_the_graph_computes(
    heads: tuple[int, int], features: int, length: int, batch: int, mask: str, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = SelfAttention(*heads, features, causal=mask == "causal").eval()
    inputs = [torch.randn(batch, length, heads[0] * features)]
    if mask == "numbers":
        inputs.append(torch.randn(batch, heads[0], length, length))
    if mask == "rows":  # the same for all queries
        inputs.append(torch.randn(batch, 1, 1, length))
    if mask == "booleans":
        inputs.append((torch.rand(batch, 1, length, length) > 0.5) | torch.eye(length, dtype=torch.bool))
    compact = fxc.compile(model, "fuse, quantize", tuple(inputs), calibration=[tuple(inputs)], verify=False)
    assert count(compact) == 1
    given_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = compact(*inputs)
    finally:
        torch.set_num_threads(given_threads)
    assert compact._native is not None
    made: Any = compact._native.made
    plans = [plan for plan in made.plans.values() if plan is not None]
    assert plans
    assert not any(isinstance(item, PythonCall) for plan in plans for item in plan.plan.items)
    wanted = by_graph(compact, *inputs)
    # Exponentials differ in their last bits, so that a weight in a million is one step off.
    assert signal_to_noise(wanted, found) >= 45


@pytest.mark.parametrize("mask", [None, "numbers", "booleans"])
def test_lowered_equals_the_graph_before(mask: str | None) -> None:
    torch.manual_seed(0)
    model, x = SelfAttention(4, 4, 12).eval(), torch.randn(3, 19, 48)
    masks = {"numbers": torch.randn(3, 1, 19, 19), "booleans": torch.rand(3, 1, 1, 19) > 0.3}
    inputs: tuple[torch.Tensor, ...] = (x,) if mask is None else (x, masks[mask])
    before = fxc.compile(model, QDQ, inputs, calibration=[inputs])
    after = fxc.compile(model, "fuse, quantize", inputs, calibration=[inputs])
    assert [node.target for node in before.graph.nodes].count(fake_quantize_attention) == 1
    assert count(after) == 1
    wanted = before(*inputs)
    assert signal_to_noise(wanted, by_graph(after, *inputs)) >= 60
    assert signal_to_noise(wanted, after(*inputs)) >= 45
    assert signal_to_noise(model(*inputs), wanted) >= 28


def test_query_key_and_value_have_grids_of_their_own() -> None:
    """They are parts of one tensor here; on one grid the values, a hundredth as large, would be lost."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        model.in_proj_weight[64:] *= 0.01
    x = torch.randn(2, 9, 32)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
            return y

    wrapped = Wrapped().eval()
    compact = fxc.compile(wrapped, "fuse, quantize", x, calibration=[x])
    (module,) = (one for one in compact.modules() if isinstance(one, Int8Attention))
    assert module.value.scale < 0.05 * module.key.scale
    want = wrapped(x) - wrapped.attention.out_proj.bias
    assert signal_to_noise(want, compact(x) - wrapped.attention.out_proj.bias) >= 25


def test_it_can_be_left_out() -> None:
    torch.manual_seed(0)
    model, x = SelfAttention(2, 2, 8).eval(), torch.randn(2, 5, 16)
    without = [
        fxc.compile(model, [P.Fuse(), P.Quantize([x], attention=False)], x),
        fxc.compile(model, [P.Fuse(), P.Quantize([x], ignore="out")], x),
        fxc.compile(model, "fuse, quantize{mode=dynamic}", x),
    ]
    for compact in without:
        assert count(compact) == 0
        assert "attention" in {ops.kind(node) for node in compact.graph.nodes}
    reason = without[0].report
    assert reason is not None
    assert "no int8 kernel for attention" in str(reason)


def test_it_is_trained_as_it_is_lowered() -> None:
    torch.manual_seed(0)
    model, x = SelfAttention(2, 2, 8).eval(), torch.randn(16, 7, 16)
    data = [(x, torch.randn(16, 7, 16))]
    passes = [P.InsertObservers(qat=True), P.Train(data, epochs=2, loss="mse", learning_rate=1e-4)]
    trained = fxc.compile(model, passes, x)
    lowered = fxc.compile(trained, [P.ConvertObserved(), P.Lower()], x)
    assert count(lowered) == 1
    assert signal_to_noise(trained.eval()(x), lowered(x)) >= 35


def test_files_states_and_costs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = SelfAttention(4, 2, 8).eval(), torch.randn(2, 6, 32)
    compact = fxc.compile(model, "fuse, quantize", x, calibration=[x])
    compact.save(tmp_path / "model.fxc")
    loaded: Any = fxc.load(tmp_path / "model.fxc")
    assert torch.equal(loaded(x), compact(x))
    other = fxc.compile(model, "fuse, quantize", x, calibration=[3 * x])
    other.load_state_dict(compact.state_dict())
    assert torch.equal(other(x), compact(x))
    report = compact.report
    assert report is not None
    assert report.after.macs == report.before.macs


def test_shapes_that_do_not_fit_are_refused() -> None:
    grid = [0.05, 128, 0, 255]
    module = Int8Attention(grid, grid, grid)
    q = torch.randn(1, 2, 3, 4, device="meta")
    with pytest.raises(fxc.errors.InputError, match="do not fit each other"):
        module.outline(q, torch.randn(1, 2, 3, 5, device="meta"), q)
    with pytest.raises(fxc.errors.InputError, match="do not fit each other"):
        module.outline(q, q, q, torch.randn(1, 2, 3, 9, device="meta"))
