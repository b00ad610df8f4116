"""FuseAttention: every way to write attention becomes one operation that computes the same; what is none stays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import fxcompress as fxc
from fxcompress.graph import ops
from fxcompress.graph.capture import trace
from fxcompress.graph.compare import difference


class Written(nn.Module):
    """Attention of (batch, heads, length, features), written out in one of many ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.bias = nn.Parameter(torch.randn(1, 3, 8, 8))
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("hidden", torch.rand(8, 8).gt(0.5) & ~torch.eye(8, dtype=torch.bool))
        self.register_buffer("of_windows", torch.randn(4, 8, 8))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        result = getattr(self, self.how)(q, k, v)
        assert isinstance(result, (torch.Tensor, tuple))
        return result

    def plain(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-2, -1), -1) @ v

    def divided(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(5), dim=3)
        return torch.matmul(self.dropout(weights), v)

    def scaled_queries(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((q * 0.3) @ (k / 2).permute(0, 1, 3, 2)).softmax(-1) @ v

    def keys_turned(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        turned = k.permute(0, 1, 3, 2).contiguous() + 0.25  # no longer a transposition alone
        return (q @ turned).softmax(-1) @ v

    def biased(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (self.bias + q @ k.mT * 0.5).softmax(-1) @ v

    def two_masks(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT + self.bias + self.of_windows[0]).softmax(-1) @ v  # type: ignore[index]

    def filled(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).masked_fill(self.get_buffer("hidden"), -math.inf).softmax(-1) @ v

    def windows(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[0] // 4
        scores = (q @ k.mT + self.bias).view(n, 4, 3, 8, 8) + self.get_buffer("of_windows").unsqueeze(1).unsqueeze(0)
        return scores.view(-1, 3, 8, 8).softmax(-1) @ v

    def stacked(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (one.flatten(0, 1) for one in (q, k, v))
        return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.2, -1), v)

    def weights_are_read(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights

    def other_dimension(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).softmax(-2) @ v

    def bias_is_scaled_too(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((q @ k.mT + self.bias) * 0.3).softmax(-1) @ v

    def filled_with_a_number(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).masked_fill(self.get_buffer("hidden"), -2.0).softmax(-1) @ v

    def booleans_are_added(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT + self.get_buffer("hidden")).softmax(-1) @ v

    def no_product(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.bias.softmax(-1) @ v + q + k

    def keys_are_broadcast(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k[:, :1].mT).softmax(-1) @ v

    def values_are_broadcast(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).softmax(-1) @ v[:, :1]


FUSED = ["plain", "divided", "scaled_queries", "keys_turned", "biased", "two_masks", "filled", "windows", "stacked"]
LEFT = ["weights_are_read", "other_dimension", "bias_is_scaled_too", "filled_with_a_number", "no_product",
        "keys_are_broadcast", "values_are_broadcast", "booleans_are_added"]  # fmt: skip


def kinds(graph_module: Any) -> list[str]:
    return [ops.kind(node) for node in graph_module.graph.nodes]


@pytest.mark.parametrize("how", [*FUSED, *LEFT])
def test_it_computes_the_same(how: str) -> None:
    torch.manual_seed(0)
    model = Written(how).double().eval()
    inputs = tuple(torch.randn(8, 3, 8, 5, dtype=torch.float64) for _ in range(3))
    fused = fxc.compile(model, "fuse", inputs)
    assert difference(model(*inputs), fused(*inputs)).relative <= 1e-12
    larger = tuple(torch.randn(12, 3, 8, 5, dtype=torch.float64) for _ in range(3))
    assert difference(model(*larger), fused(*larger)).relative <= 1e-12
    assert kinds(fused).count("attention") == (how in FUSED)
    if how in FUSED:
        assert not {"softmax", "matmul", "bmm", "masked_fill"} & set(kinds(fused))


def test_dropout_that_is_trained_stays() -> None:
    model = Written("divided")
    inputs = tuple(torch.randn(2, 3, 8, 5) for _ in range(3))
    captured = trace(model.train(), inputs, training=True)
    fused = fxc.PassManager("fuse").run(captured, inputs).graph_module
    assert "attention" not in kinds(fused)


@pytest.mark.parametrize("name", ["swin_t", "vit_b_16"])
def test_networks(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    nn.init.normal_(model.heads.head.weight if name == "vit_b_16" else model.head.weight)
    x = torch.randn(1, 3, 224, 224)
    fused = fxc.compile(model, "fuse", x)
    assert kinds(fused).count("attention") == 12
    assert "softmax" not in kinds(fused)
    with torch.no_grad():
        assert difference(model(x), fused(x)).relative <= 1e-4
