"""Architectures as users write them: heads, head positions, feed-forward and embedding widths, hidden units prune."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.graph.compare import difference

Inputs = tuple[Any, ...] | dict[str, Any]


# -- a decoder like GPT-2 -------------------------------------------------------------------------------------------


class CausalAttention(nn.Module):
    """Packed projection, scores divided by the root of the head's width, a mask that is a buffer."""

    mask: torch.Tensor

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("mask", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.size()
        query, key, value = self.qkv(x).split(width, dim=2)
        key = key.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        query = query.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        value = value.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        scores = (query @ key.transpose(-2, -1)) * (1.0 / math.sqrt(key.size(-1)))
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ value
        result: torch.Tensor = self.out(y.transpose(1, 2).contiguous().view(batch, length, width))
        return result


class DecoderBlock(nn.Module):
    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.ln1, self.attention = nn.LayerNorm(width), CausalAttention(width, heads, length)
        self.ln2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.ln1(x))
        y: torch.Tensor = x + self.down(F.gelu(self.up(self.ln2(x))))
        return y


class Gpt(nn.Module):
    """Decoder whose output layer is its token embedding."""

    def __init__(self, words: int = 50, width: int = 24, heads: int = 4, length: int = 16) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([DecoderBlock(width, heads, length) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


# -- an encoder like BERT -------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense, self.norm, self.dropout = nn.Linear(width, width), nn.LayerNorm(width), nn.Dropout(0.1)

    def transpose_for_scores(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.size()[:-1], self.heads, self.head_width).permute(0, 2, 1, 3)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = (self.transpose_for_scores(f(hidden)) for f in (self.query, self.key, self.value))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.head_width) + mask
        context = torch.matmul(self.dropout(nn.functional.softmax(scores, dim=-1)), value)
        context = context.permute(0, 2, 1, 3).contiguous()
        context = context.view(*context.size()[:-2], self.heads * self.head_width)
        normed: torch.Tensor = self.norm(self.dropout(self.dense(context)) + hidden)
        return normed


class BertLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.intermediate, self.output = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.attention(hidden, mask)
        normed: torch.Tensor = self.norm(self.output(F.gelu(self.intermediate(hidden))) + hidden)
        return normed


class Bert(nn.Module):
    """Encoder with a padding mask, keyword inputs and a dictionary of outputs."""

    def __init__(self, words: int = 40, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.words, self.segments, self.places = (nn.Embedding(n, width) for n in (words, 2, 32))
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList([BertLayer(width, heads) for _ in range(2)])
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = (1.0 - attention_mask[:, None, None, :].to(self.norm.weight.dtype)) * -1e4
        places = torch.arange(input_ids.shape[1])
        hidden = self.norm(self.words(input_ids) + self.segments(torch.zeros_like(input_ids)) + self.places(places))
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return {"logits": self.classifier(torch.tanh(self.pooler(hidden[:, 0])))}


# -- a decoder like Llama -------------------------------------------------------------------------------------------


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class GroupedAttention(nn.Module):
    """Grouped-query attention with rotary embeddings."""

    inverse_frequency: torch.Tensor

    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.heads, self.shared, self.head_width = heads, shared, width // heads
        self.q_proj = nn.Linear(width, heads * self.head_width, bias=False)
        self.k_proj = nn.Linear(width, shared * self.head_width, bias=False)
        self.v_proj = nn.Linear(width, shared * self.head_width, bias=False)
        self.o_proj = nn.Linear(heads * self.head_width, width, bias=False)
        self.register_buffer("inverse_frequency", 1.0 / 100 ** (torch.arange(0, self.head_width, 2) / self.head_width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        query = self.q_proj(x).view(batch, length, self.heads, self.head_width).transpose(1, 2)
        key = self.k_proj(x).view(batch, length, self.shared, self.head_width).transpose(1, 2)
        value = self.v_proj(x).view(batch, length, self.shared, self.head_width).transpose(1, 2)
        angles = torch.arange(length).to(x.dtype)[:, None] * self.inverse_frequency.to(x.dtype)[None, :]
        angles = torch.cat((angles, angles), dim=-1)
        cosine, sine = angles.cos(), angles.sin()
        query = query * cosine + rotate_half(query) * sine
        key = key * cosine + rotate_half(key) * sine
        times = self.heads // self.shared
        key = key[:, :, None].expand(batch, self.shared, times, length, self.head_width)
        value = value[:, :, None].expand(batch, self.shared, times, length, self.head_width)
        key = key.reshape(batch, self.heads, length, self.head_width)
        value = value.reshape(batch, self.heads, length, self.head_width)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: torch.Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, self.heads * self.head_width))
        return result


class LlamaBlock(nn.Module):
    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.norm1, self.attention = RmsNorm(width), GroupedAttention(width, heads, shared)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        z: torch.Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return z


class Llama(nn.Module):
    def __init__(self, words: int = 40, width: int = 32, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.Sequential(*(LlamaBlock(width, heads, shared) for _ in range(2)))
        self.norm, self.head = RmsNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.blocks(self.embed(tokens))))
        return logits


# -- others ---------------------------------------------------------------------------------------------------------


def double_convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = (double_convolution(*c) for c in ((3, 8), (8, 16), (16, 32)))
        self.up2, self.merge2 = nn.ConvTranspose2d(32, 16, 2, stride=2), double_convolution(32, 16)
        self.up1, self.merge1 = nn.ConvTranspose2d(16, 8, 2, stride=2), double_convolution(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        y = self.bottom(F.max_pool2d(second, 2))
        y = self.merge2(torch.cat([self.pad(self.up2(y), second), second], dim=1))
        result: torch.Tensor = self.out(self.merge1(torch.cat([self.pad(self.up1(y), first), first], dim=1)))
        return result

    @staticmethod
    def pad(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        high, wide = like.size(2) - x.size(2), like.size(3) - x.size(3)
        return F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])


class Crnn(nn.Module):
    """Convolutions, then a bidirectional LSTM over columns."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU] = nn.LSTM) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d((1, None)),
        )  # fmt: skip
        self.recurrent = kind(12, 10, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(20, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.features(x).squeeze(2).permute(0, 2, 1)
        y, _ = self.recurrent(y)
        logits: torch.Tensor = self.head(y).log_softmax(2)
        return logits


class TwoInputs(nn.Module):
    """An image and a vector, joined; several outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.image = nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.vector = nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.GELU())
        self.joint, self.label, self.box = nn.Linear(20, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, image: torch.Tensor, vector: torch.Tensor) -> dict[str, Any]:
        y = F.relu(self.joint(torch.cat([self.image(image), self.vector(vector)], dim=1)))
        return {"label": self.label(y), "boxes": [self.box(y).sigmoid()]}


def small_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    made: nn.Module = SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5)
    return made


class CrossAttention(nn.Module):
    """torch.nn's own attention between two sequences, with a padding mask, and an encoder layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 16), nn.Linear(4, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        y = self.right(memory)
        seen, _ = self.attention(self.left(x), y, y, key_padding_mask=padding, need_weights=False)
        result: torch.Tensor = self.head(self.layer(self.left(x) + seen))
        return result


def tokens(batch: int, length: int = 10) -> torch.Tensor:
    return torch.randint(0, 40, (batch, length))


def bert_inputs(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 9, dtype=torch.long)
    mask[:, 7:] = 0
    return {"input_ids": tokens(batch, 9), "attention_mask": mask}


def cross_inputs(batch: int) -> tuple[Any, ...]:
    padding = torch.zeros(batch, 7, dtype=torch.bool)
    padding[:, 5:] = True
    return torch.randn(batch, 5, 6), torch.randn(batch, 7, 4), padding


#: name -> (model, inputs for a batch size, largest share of parameters left at ratio 0.5).
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs], float]] = {
    "gpt": (Gpt, lambda n: (tokens(n),), 0.40),
    "bert": (Bert, bert_inputs, 0.40),
    "llama": (Llama, lambda n: (tokens(n),), 0.40),
    "u-net": (UNet, lambda n: (torch.randn(n, 3, 20, 20),), 0.30),
    "swin": (small_swin, lambda n: (torch.randn(n, 3, 40, 40),), 0.40),
    "crnn-lstm": (Crnn, lambda n: (torch.randn(n, 1, 16, 24),), 0.35),
    "crnn-gru": (lambda: Crnn(nn.GRU), lambda n: (torch.randn(n, 1, 16, 24),), 0.35),
    "two-inputs": (TwoInputs, lambda n: {"image": torch.randn(n, 3, 8, 8), "vector": torch.randn(n, 5)}, 0.45),
    "cross-attention": (CrossAttention, cross_inputs, 0.40),
}


def build(name: str) -> nn.Module:
    """A model in float64 with numbers at random where defaults hide mistakes (normalisation, tables of biases)."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name][0]().double().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1 or "table" in path:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
                module.running_var.uniform_(0.5, 2.0)
    return model


def doubled(inputs: Inputs) -> Inputs:
    def double(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value

    if isinstance(inputs, dict):
        return {key: double(value) for key, value in inputs.items()}
    return tuple(double(value) for value in inputs)


def call(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("heads", ["positions", "whole", "both"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_removed_equals_masked_at_any_batch_size(name: str, heads: str) -> None:
    model, (_, inputs, share) = build(name), ARCHITECTURES[name]
    example = doubled(inputs(2))
    masked = fxc.compile(model, [P.MaskChannels(0.5, scope="layer", heads=heads)], example)
    removed = fxc.compile(model, [P.PruneChannels(0.5, scope="layer", heads=heads)], example)
    assert count(removed) <= (share if heads != "both" else 1.2 * share) * count(model)
    for batch in (1, 2, 5):
        x = doubled(inputs(batch))
        with torch.no_grad():
            expected, found = call(masked, x), call(removed, x)
        assert difference(expected, found).relative <= 1e-10


@pytest.mark.parametrize("name", ["gpt", "bert", "llama", "swin", "cross-attention"])
def test_heads_and_positions_are_separate_choices(name: str) -> None:
    """Whole heads change how many there are, positions how wide they are; the count of channels falls alike."""
    model, inputs = build(name), doubled(ARCHITECTURES[name][1](2))
    shapes = {}
    for heads in ("positions", "whole"):
        pruned = fxc.compile(model, [P.PruneChannels(0.5, scope="layer", heads=heads)], inputs)
        shapes[heads] = [
            tuple(size for size in node.args[1] if isinstance(size, int) and size > 1)
            for node in pruned.graph.nodes
            if node.target is torch.reshape and isinstance(node.args[1], tuple)
        ]
    assert shapes["positions"] != shapes["whole"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pruned_model_trains(name: str) -> None:
    model, inputs = build(name), doubled(ARCHITECTURES[name][1](2))
    pruned = fxc.compile(model, [P.PruneChannels(0.5, scope="layer"), P.Fuse()], inputs).train()
    outputs = call(pruned, inputs)
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    torch.stack([leaf.square().mean() for leaf in leaves]).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_ledger_names_every_parameter(name: str) -> None:
    model, inputs = build(name), doubled(ARCHITECTURES[name][1](2))
    removed = fxc.compile(model, [P.PruneChannels(0.5, scope="layer")], inputs)
    assert removed.report is not None
    said = {line.layer: line.notes for line in removed.report.layers}
    shapes = {path: parameter.shape for path, parameter in removed.named_parameters()}
    for path, shape in shapes.items():
        parts = path.split(".")
        notes = [note for end in range(1, len(parts) + 1) for note in said.get(".".join(parts[:end]), ())]
        verdicts = [note for note in notes if note.startswith(("pruned ", "not pruned: "))]
        assert len(verdicts) == 1, path
        if verdicts[0].startswith("pruned "):
            assert shape.numel() == 0 or int(verdicts[0].split()[-1]) in shape
