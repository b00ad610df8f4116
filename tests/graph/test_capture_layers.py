"""Transformers, recurrent networks and layers alone: which layers stay whole, and that the graphs compute the same."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.graph.compare import difference, run, without_fast_path
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import info


class Text(nn.Module):
    """An encoder over token numbers, with padding or with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
        self.embedding, self.encoder = nn.Embedding(50, 16), nn.TransformerEncoder(layer, 2)
        self.position = nn.Parameter(torch.randn(1, 32, 16))

    def forward(self, tokens: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        count = tokens.shape[1]
        x = self.embedding(tokens) + self.position[:, :count]
        if padding is not None:
            return self.encoder(x, src_key_padding_mask=padding)  # type: ignore[no-any-return]
        mask = nn.Transformer.generate_square_subsequent_mask(count)
        return self.encoder(x, mask=mask, is_causal=True)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, 2, batch_first=True, bidirectional=True)
        self.gru, self.head = nn.GRU(32, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, (_, cell) = self.lstm(x)
        y, _ = self.gru(y)
        return self.head(y[:, -1]), cell


def sequence(length: int = 5, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(length))


TOKENS = torch.arange(14).reshape(2, 7)
PADDING = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
MODELS: dict[str, tuple[Any, tuple[torch.Tensor, ...]]] = {
    "encoder layer": (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (sequence(),)),
    "decoder layer": (lambda: nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), (sequence(), sequence(6))),
    "transformer": (lambda: nn.Transformer(16, 4, 1, 1, 32, batch_first=True), (sequence(), sequence(6))),
    "padded text": (Text, (TOKENS, PADDING)),
    "causal text": (Text, (TOKENS,)),
    "recurrent": (Recurrent, (torch.randn(2, 5, 8),)),
    "attention alone": (lambda: nn.MultiheadAttention(16, 4, batch_first=True), (sequence(), sequence(), sequence())),
    "lstm alone": (lambda: nn.LSTM(16, 8, batch_first=True), (sequence(),)),
}


def layers(graph_module: fx.GraphModule) -> set[str]:
    return {
        type(graph_module.get_submodule(str(node.target))).__name__
        for node in graph_module.graph.nodes if node.op == "call_module"
    }  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_traced_and_fused_at_any_batch_size(name: str) -> None:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    compact = fxc.compile(model, [P.Fuse()], example_inputs=inputs)
    assert not [node for node in compact.graph.nodes if info(node).opaque]
    other = ExampleInputs(tuple(torch.cat([tensor, tensor[:1]]) for tensor in inputs))
    with without_fast_path():
        assert difference(run(model, other), run(compact, other)).relative < 1e-5


def test_layers_that_stay_whole() -> None:
    assert layers(fxc.trace(Text().eval(), (TOKENS,))) == {
        "Embedding", "MultiheadAttention", "Linear", "LayerNorm", "Dropout",
    }  # fmt: skip
    assert layers(fxc.trace(Recurrent().eval(), torch.randn(2, 5, 8))) == {"LSTM", "GRU", "Linear"}


def test_causal_text_of_another_length() -> None:
    torch.manual_seed(0)
    model = Text().eval()
    traced, longer = fxc.trace(model, (TOKENS,)), ExampleInputs((torch.arange(22).reshape(2, 11),))
    assert difference(run(model, longer), run(traced, longer)).relative < 1e-5


class Straight(torch.autograd.Function):
    """Rounds; its gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def test_autograd_functions_keep_their_gradient() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Straight.apply(self.layer(x)) * 2  # type: ignore[no-any-return]

    model, x = Rounded().eval(), torch.randn(3, 4)
    compact = fxc.compile(model, [P.Fuse()], x)
    for module in (model, compact, copy.deepcopy(compact)):
        module.zero_grad()
        module(x).sum().backward()
        gradient = module.get_parameter("layer.bias").grad
        assert gradient is not None
        assert torch.equal(gradient, torch.full((8,), 6.0))


def test_python_asks_for_the_class_of_a_value_and_c_code_does_not() -> None:
    class Asking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = [isinstance(x, torch.Tensor), torch.is_tensor(x), isinstance(x.shape, torch.Size)]
            found += [isinstance(x.shape[0], int), isinstance(x, (nn.Parameter, list, float, nn.Module))]
            return x * 2 if found == [True, True, True, True, False] else x

    original, x = isinstance, torch.randn(2, 3)
    assert torch.equal(fxc.trace(Asking(), x)(x), x * 2)
    assert isinstance is original


def test_a_tensor_that_the_code_makes_and_fills_is_made_anew_at_every_call() -> None:
    class Filling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            table = torch.zeros(2, 3)
            table[0] = x.sum()
            table[1].add_(x[0])
            return table

    model, x = Filling(), torch.randn(2, 3)
    traced = fxc.trace(model, x)
    first, second = traced(x), traced(2 * x)
    assert torch.equal(first, model(x))
    assert torch.equal(second, model(2 * x))


def test_a_decoder_written_by_hand_is_pruned_and_saved(tmp_path: Path) -> None:
    class Decoder(nn.Module):
        mask: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(40, 32), nn.Embedding(64, 32)
            self.heads, self.out = nn.Linear(32, 96), nn.Linear(32, 40)
            self.register_buffer("mask", torch.tril(torch.ones(64, 64))[None, None])

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            batch, count = tokens.size()
            assert count <= 64, f"at most 64 words, not {count}"
            places = torch.arange(0, count, dtype=torch.long, device=tokens.device)
            x = self.words(tokens) + self.places(places)
            q, k, v = (part.view(batch, count, 4, 8).transpose(1, 2) for part in self.heads(x).split(32, dim=2))
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.mask[:, :, :count, :count] == 0, float("-inf"))
            y = scores.softmax(-1) @ v
            return self.out(y.transpose(1, 2).contiguous().view(batch, count, -1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Decoder().eval()
    masked = fxc.compile(model, [P.MaskChannels(0.5, scope="layer")], TOKENS)
    compact = fxc.compile(model, [P.PruneChannels(0.5, scope="layer")], TOKENS)
    compact.save(tmp_path / "decoder.fxc")
    loaded = fxc.load(tmp_path / "decoder.fxc")
    for tokens in (TOKENS, torch.arange(33).reshape(3, 11)):
        inputs = ExampleInputs((tokens,))
        assert difference(run(masked, inputs), run(compact, inputs)).relative < 1e-5
        assert difference(run(compact, inputs), run(loaded, inputs)).relative == 0
