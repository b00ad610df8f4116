"""Random models for Hypothesis: small convolutional programs over the operators that the channel rules know."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from fxcompress.graph.modules import StochasticDepth

Tensor = torch.Tensor
Step = Callable[["Program", list[Tensor]], None]


class Program(nn.Module):
    """A model that runs a fixed list of steps over a list of values, as a user's forward would."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.scales = nn.ParameterList()
        self.steps: list[Step] = []

    def add(self, layer: nn.Module) -> int:
        self.layers.append(layer)
        return len(self.layers) - 1

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step in self.steps:
            step(self, values)
        return values[-1]


@dataclass
class _Builder:
    """Draws steps and keeps track of the shapes of the values, (channels, height and width)."""

    draw: Callable[..., Any]
    program: Program = field(default_factory=Program)
    shapes: list[tuple[int, int]] = field(default_factory=lambda: [(3, 8)])

    def pick(self) -> int:
        """One of the latest values."""
        return int(self.draw(st.integers(max(0, len(self.shapes) - 3), len(self.shapes) - 1)))

    def push(self, step: Callable[[Program, list[Tensor]], Tensor], channels: int, size: int) -> None:
        self.program.steps.append(lambda program, values: values.append(step(program, values)))
        self.shapes.append((channels, size))

    def layer(self, module: nn.Module, source: int, channels: int, size: int) -> None:
        index = self.program.add(module)
        self.push(lambda program, values: program.layers[index](values[source]), channels, size)

    # -- steps ----------------------------------------------------------------------------------------------------

    def convolution(self) -> None:
        source = self.pick()
        channels, size = self.shapes[source]
        out = self.draw(st.sampled_from([4, 6, 8]))
        kernel = self.draw(st.sampled_from([1, 3]))
        dilation = self.draw(st.sampled_from([1, 2])) if size >= 8 else 1
        padding = self.draw(st.sampled_from([0, dilation * (kernel // 2)])) if size > 2 * dilation + 2 else (
            dilation * (kernel // 2))  # fmt: skip
        mode = self.draw(st.sampled_from(["zeros", "zeros", "circular"])) if size > 2 else "zeros"
        after = size + 2 * padding - dilation * (kernel - 1)
        bias = self.draw(st.booleans())
        settings: Any = {"bias": bias, "padding_mode": mode}
        self.layer(nn.Conv2d(channels, out, kernel, 1, padding, dilation, **settings), source, out, after)

    def grouped(self) -> None:
        source = self.pick()
        channels, size = self.shapes[source]
        if channels % 2:
            return
        groups = self.draw(st.sampled_from([2, channels]))
        out = channels * self.draw(st.sampled_from([1, 2])) if channels <= 8 else channels
        self.layer(nn.Conv2d(channels, out, 3, padding=1, groups=groups), source, out, size)

    def transposed(self) -> None:
        source = self.pick()
        channels, size = self.shapes[source]
        groups = self.draw(st.sampled_from([1, 2])) if channels % 2 == 0 else 1
        if size <= 8:
            self.layer(nn.ConvTranspose2d(channels, 4, 2, stride=2, groups=groups), source, 4, 2 * size)

    def normalisation(self) -> None:
        source = self.pick()
        channels, size = self.shapes[source]
        kinds: list[nn.Module] = [nn.BatchNorm2d(channels), nn.BatchNorm2d(channels, affine=False), nn.PReLU(channels)]
        if channels % 2 == 0:
            kinds.append(nn.GroupNorm(channels // 2, channels))
        kinds.append(nn.InstanceNorm2d(channels, affine=True))
        if size == 1:
            kinds = kinds[:2]
        self.layer(self.draw(st.sampled_from(kinds)), source, channels, size)

    def activation(self) -> None:
        source = self.pick()
        channels, size = self.shapes[source]
        function = self.draw(st.sampled_from(_ACTIVATIONS))
        self.push(lambda program, values: function(values[source]), channels, size)

    def inactive(self) -> None:
        source = self.pick()
        channels, size = self.shapes[source]
        layer = self.draw(st.sampled_from([nn.Dropout(0.5), StochasticDepth(0.3), nn.Identity()]))
        self.layer(layer, source, channels, size)

    def residual(self) -> None:
        left, right = self.pick(), self.pick()
        channels, size = self.shapes[left]
        if self.shapes[right] != (channels, size):
            return
        kind = self.draw(st.sampled_from(["add", "sub", "mul", "maximum"]))
        functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "maximum": torch.maximum,
        }  # fmt: skip
        self.push(lambda program, values: functions[kind](values[left], values[right]), channels, size)

    def concatenation(self) -> None:
        left, right = self.pick(), self.pick()
        size = self.shapes[left][1]
        channels = self.shapes[left][0] + self.shapes[right][0]
        if self.shapes[right][1] == size and channels <= 24:
            self.push(lambda program, values: torch.cat([values[left], values[right]], dim=1), channels, size)

    def piece(self) -> None:
        source = self.pick()
        channels, size = self.shapes[source]
        if channels % 2 or channels < 4:
            return
        half = channels // 2
        kind = self.draw(st.sampled_from(["chunk", "split", "slice"]))
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "chunk": lambda x: x.chunk(2, dim=1)[1],
            "split": lambda x: torch.split(x, [channels - half, half], 1)[0] * 1.5,
            "slice": lambda x: x[:, half:],
        }
        self.push(lambda program, values: functions[kind](values[source]), half, size)

    def squeeze_and_excitation(self) -> None:
        source = self.pick()
        channels, size = self.shapes[source]
        first = self.program.add(nn.Conv2d(channels, 4, 1))
        second = self.program.add(nn.Conv2d(4, channels, 1))

        def step(program: Program, values: list[Tensor]) -> Tensor:
            x = values[source]
            squeezed = F.relu(program.layers[first](F.adaptive_avg_pool2d(x, 1)))
            return x * torch.sigmoid(program.layers[second](squeezed))

        self.push(step, channels, size)

    def layer_scale(self) -> None:
        source = self.pick()
        channels, size = self.shapes[source]
        self.program.scales.append(nn.Parameter(torch.randn(channels, 1, 1)))
        index = len(self.program.scales) - 1
        self.push(lambda program, values: values[source] * program.scales[index], channels, size)

    def channels_last_norm(self) -> None:
        source = self.pick()
        channels, size = self.shapes[source]
        norm, linear = self.program.add(nn.LayerNorm(channels)), self.program.add(nn.Linear(channels, channels))

        def step(program: Program, values: list[Tensor]) -> Tensor:
            x = program.layers[norm](values[source].permute(0, 2, 3, 1))
            return program.layers[linear](x).permute(0, 3, 1, 2)  # type: ignore[no-any-return]

        self.push(step, channels, size)

    def shuffle(self) -> None:
        source = self.pick()
        channels, size = self.shapes[source]
        if channels % 2:
            return

        def step(program: Program, values: list[Tensor]) -> Tensor:
            x = values[source]
            batch, _, height, width = x.size()
            x = x.contiguous().view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
            return x.view(batch, channels, height, width)

        self.push(step, channels, size)

    def resize(self) -> None:
        source = self.pick()
        channels, size = self.shapes[source]
        kind = self.draw(st.sampled_from(["max", "average", "up", "pad"]))
        if kind == "up" and size <= 8:
            self.push(lambda program, values: F.interpolate(values[source], scale_factor=2.0), channels, 2 * size)
        elif kind == "pad" and size <= 12:
            self.push(lambda program, values: F.pad(values[source], (1, 1, 1, 1)), channels, size + 2)
        elif kind == "max" and size >= 4:
            self.push(lambda program, values: F.max_pool2d(values[source], 2), channels, size // 2)
        elif kind == "average" and size >= 4:
            self.push(lambda program, values: F.avg_pool2d(values[source], 3, 2, 1), channels, (size - 1) // 2 + 1)

    def reused(self) -> None:
        """The same layer twice, in a row."""
        source = self.pick()
        channels, size = self.shapes[source]
        index = self.program.add(nn.Conv2d(channels, channels, 3, padding=1))

        def step(program: Program, values: list[Tensor]) -> Tensor:
            return program.layers[index](F.relu(program.layers[index](values[source])))  # type: ignore[no-any-return]

        self.push(step, channels, size)

    def tied(self) -> None:
        """Two layers that share one weight."""
        source = self.pick()
        channels, size = self.shapes[source]
        first, second = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1, bias=False)
        second.weight = first.weight
        left, right = self.program.add(first), self.program.add(second)

        def step(program: Program, values: list[Tensor]) -> Tensor:
            x = values[source]
            return program.layers[left](x) + torch.tanh(program.layers[right](x))  # type: ignore[no-any-return]

        self.push(step, channels, size)

    def attention(self) -> None:
        """Self-attention over positions, in the spellings that people use."""
        source = self.pick()
        channels, size = self.shapes[source]
        if size > 8:
            return
        heads, width = self.draw(st.sampled_from([1, 2, 3])), self.draw(st.sampled_from([2, 4]))
        shared = self.draw(st.sampled_from([1, heads]))  # heads of key and value
        program = self.program
        layers = [nn.Linear(channels, n * width) for n in (heads, shared, shared)]
        query, key, value = (program.add(layer) for layer in layers)
        out = program.add(nn.Linear(heads * width, channels))
        program.scales.append(nn.Parameter(torch.randn(heads, 1, size * size)))
        table = len(program.scales) - 1
        spelling = self.draw(st.sampled_from(["sdpa", "matmul", "einsum", "rotary", "table", "norm"]))
        norm = program.add(nn.RMSNorm(width, eps=1e-3))

        def split(x: Tensor, count: int) -> Tensor:
            batch, length, _ = x.shape
            return x.view(batch, length, count, width).transpose(1, 2).repeat_interleave(heads // count, dim=1)

        def turn(x: Tensor) -> Tensor:
            half = x.shape[-1] // 2
            return x * 0.6 + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * 0.8

        def step(program: Program, values: list[Tensor]) -> Tensor:
            x = values[source]
            batch, _, height, breadth = x.shape
            y = x.flatten(2).transpose(1, 2)
            q, k, v = (split(program.layers[i](y), n) for i, n in ((query, heads), (key, shared), (value, shared)))
            if spelling == "norm":
                q, k = program.layers[norm](q), program.layers[norm](k)
            if spelling == "rotary":
                q, k = turn(q), turn(k)
            if spelling in ("sdpa", "rotary", "norm"):
                z = F.scaled_dot_product_attention(q, k, v)
            elif spelling == "einsum":
                weights = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
                z = torch.einsum("bhij,bhjd->bhid", weights.softmax(-1), v)
            else:
                scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
                scores = scores + program.scales[table] if spelling == "table" else scores
                z = scores.softmax(dim=-1) @ v
            z = program.layers[out](z.transpose(1, 2).reshape(batch, height * breadth, heads * width))
            return z.transpose(1, 2).reshape(batch, -1, height, breadth)  # type: ignore[no-any-return]

        self.push(step, channels, size)

    def packed_attention(self) -> None:
        """torch.nn's own attention, and one projection cut into (3, heads, width)."""
        source = self.pick()
        channels, size = self.shapes[source]
        if channels % 2 or size > 8:
            return
        own = self.draw(st.booleans())
        first = self.program.add(
            nn.MultiheadAttention(channels, 2, batch_first=True) if own else nn.Linear(channels, 3 * channels)
        )

        def step(program: Program, values: list[Tensor]) -> Tensor:
            x = values[source]
            batch, _, height, breadth = x.shape
            y = x.flatten(2).transpose(1, 2)
            if own:
                z = program.layers[first](y, y, y, need_weights=False)[0]
            else:
                packed = program.layers[first](y).reshape(batch, height * breadth, 3, 2, channels // 2)
                q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
                z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return z.transpose(1, 2).reshape(batch, channels, height, breadth)  # type: ignore[no-any-return]

        self.push(step, channels, size)

    def mean_square_norm(self) -> None:
        """A normalisation written by hand, over the channels."""
        source = self.pick()
        channels, size = self.shapes[source]
        self.program.scales.append(nn.Parameter(torch.randn(channels)))
        index = len(self.program.scales) - 1

        def step(program: Program, values: list[Tensor]) -> Tensor:
            x = values[source].movedim(1, -1) if channels % 4 else values[source].permute(0, 2, 3, 1)
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1) * program.scales[index]
            return x.permute(0, 3, 1, 2)  # type: ignore[no-any-return]

        self.push(step, channels, size)

    def recurrent(self) -> None:
        """A recurrent layer over the columns of the average row."""
        source = self.pick()
        channels, size = self.shapes[source]
        kind = self.draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
        both = self.draw(st.booleans())
        index = self.program.add(kind(channels, 3, batch_first=True, bidirectional=both))
        made = 6 if both else 3

        def step(program: Program, values: list[Tensor]) -> Tensor:
            x = values[source].mean(2).transpose(1, 2)
            y = program.layers[index](x)[0].transpose(1, 2)
            return y.unsqueeze(2).expand(-1, -1, size, -1).contiguous()  # type: ignore[no-any-return]

        self.push(step, made, size)

    def head(self) -> None:
        channels, _ = self.shapes[-1]
        source = len(self.shapes) - 1
        kind = self.draw(st.sampled_from(["flatten", "pool", "view", "none"]))
        if kind == "none":
            return
        first = self.program.add(nn.Linear(channels * (1 if kind == "pool" else 4), 10))
        second = self.program.add(nn.Linear(10, 5))

        def step(program: Program, values: list[Tensor]) -> Tensor:
            x = F.adaptive_avg_pool2d(values[source], 1 if kind == "pool" else 2)
            x = x.contiguous().view(x.size(0), -1) if kind == "view" else torch.flatten(x, 1)
            return program.layers[second](F.leaky_relu(program.layers[first](x)))  # type: ignore[no-any-return]

        self.push(step, 5, 1)


_ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    F.relu, torch.sigmoid, F.silu, F.gelu, F.hardswish, F.hardsigmoid, torch.tanh, F.softplus, F.elu, torch.exp,
    lambda x: torch.clamp(x, -1.0, 2.0), lambda x: 0.5 * x + 0.25, lambda x: x.square(),
    lambda x: F.relu(x, inplace=True),
]  # fmt: skip

_STEPS = (
    "convolution", "convolution", "convolution", "grouped", "transposed", "normalisation", "normalisation",
    "activation", "activation", "inactive", "residual", "residual", "concatenation", "piece",
    "squeeze_and_excitation", "layer_scale", "channels_last_norm", "shuffle", "resize", "reused", "tied",
    "attention", "attention", "packed_attention", "mean_square_norm", "recurrent",
)  # fmt: skip


@st.composite
def programs(draw: Callable[..., Any], max_steps: int = 10) -> Program:
    """Random models in float64 and evaluation mode, with every parameter and statistic drawn at random."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    builder = _Builder(draw)
    builder.convolution()
    for name in draw(st.lists(st.sampled_from(_STEPS), min_size=1, max_size=max_steps)):
        getattr(builder, name)()
    builder.head()
    program = builder.program.double().eval()
    randomise_statistics(program)
    return program


def randomise_statistics(model: nn.Module) -> None:
    """Draw the statistics and affine values of all normalisations at random."""
    for module in model.modules():
        for name in ("weight", "bias", "running_mean"):
            tensor = getattr(module, name, None)
            if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)) and tensor is not None:
                tensor.data.normal_(1.0 if name == "weight" else 0.0, 0.3)
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_var is not None:
            module.running_var.data.uniform_(0.5, 2.0)


def example(batch: int = 2) -> Tensor:
    """An input for `programs`."""
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))
