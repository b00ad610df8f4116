"""Batches: images are computed one by one where nothing ties them together, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxcompress as fxc
from fxcompress.emit.compact_module import CompactModule
from fxcompress.emit.native.batches import keeps_apart
from fxcompress.emit.native.plan import PythonCall
from fxcompress.quant.arithmetic import signal_to_noise
from tests.kernels import NEEDED

pytestmark = NEEDED


def compiled(model: nn.Module, x: torch.Tensor) -> CompactModule:
    return fxc.compile(model.eval(), "fuse, quantize", x, calibration=[x])


def assert_alike(compact: CompactModule, x: torch.Tensor) -> None:
    other = copy.deepcopy(compact)
    other.executor = "graph"
    assert signal_to_noise(other(x), compact(x)) >= 60


def one_by_one(compact: CompactModule) -> bool:
    made = compact._native.made
    assert made is not None
    (plan,) = made.plans.values()
    assert plan is not None
    assert not any(isinstance(item, PythonCall) for item in plan.plan.items)
    return plan.single is not None


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.relu(self.first(x)))
        return y


class TimesTheBatch(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x) * x.size(0)


class OverTheBatch(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x) / (1 + len(x))


class Numbered(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.features(x)
        return y + torch.arange(y.size(0)).view(-1, 1, 1, 1).float()


class Alone(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x) * x.size(2)


@pytest.mark.parametrize("model", [TimesTheBatch, OverTheBatch, Numbered])
def test_numbers_that_depend_on_the_batch(model: type[Layers]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    compact = compiled(model(), x)
    assert_alike(compact, x)
    assert_alike(compact, x[:3])


def test_numbers_that_depend_on_other_sizes_do_not_matter() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    compact = compiled(Alone(), x)
    assert_alike(compact, x)
    assert one_by_one(compact)


class Tokens(nn.Module):
    """A token of the model's own in front of all others, and a table of places: the same for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 6, 16))
        self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 300), nn.Linear(300, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.places
        y = y + self.second(F.gelu(self.first(self.norm(y))))
        z: torch.Tensor = y[:, 0]
        return z


def test_numbers_of_the_model_that_are_spread_over_the_batch() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 5, 16)
    compact = compiled(Tokens(), x)
    assert_alike(compact, x)
    assert one_by_one(compact)


class LengthFirst(nn.Module):
    """Tokens of all images, those of one place behind those of another: images are not one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.transpose(0, 1).reshape(-1, 16)
        y = self.second(torch.relu(self.first(self.norm(y))))
        z: torch.Tensor = y.reshape(x.shape[1], x.shape[0], 16).transpose(0, 1)
        return z


@pytest.mark.parametrize("shape", [(4, 8, 16), (4, 4, 16), (8, 4, 16)])
def test_length_first_is_not_cut(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    compact = compiled(LengthFirst(), x)
    assert_alike(compact, x)
    assert not one_by_one(compact)


def made_by(graph_module: fx.GraphModule, x: torch.Tensor) -> dict[fx.Node, Any]:
    """What each node makes."""
    found: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    Recorder(graph_module).run(x)
    return found


@pytest.mark.parametrize(
    ("function", "apart"),
    [
        (lambda x, table: torch.relu(x) + 1, True),
        (lambda x, table: x.reshape(x.shape[0], -1), True),
        (lambda x, table: x.transpose(0, 1).transpose(0, 1) + 1, True),  # images are in front again
        (lambda x, table: torch.relu(x.transpose(0, 1)).transpose(0, 1), False),
        (lambda x, table: x.transpose(0, 1).reshape(-1, 6), False),  # images lie between each other
        (lambda x, table: x.permute(1, 0, 2)[0], True),
        (lambda x, table: x + x.mean(0), False),
        (lambda x, table: x.sum(0, keepdim=True), False),
        (lambda x, table: x * x.shape[0], False),
        (lambda x, table: x * x.shape[1], True),
        (lambda x, table: x[:, :, x.shape[0] - 1], False),  # an index
        (lambda x, table: x.narrow(2, x.shape[0], 1), False),
        (lambda x, table: x + torch.zeros((x.shape[0], 1, 6)), True),
        (lambda x, table: x + torch.full((1, 1, 1), x.shape[0]), False),
        (lambda x, table: x + table.view(4, 3, 1)[: x.shape[0]], False),  # rows that differ from image to image
        (lambda x, table: x + table[:1].view(1, 3, 1).expand(x.shape[0], 3, 6), True),
    ],
)
def test_what_ties_images_together(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], apart: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x, self.get_buffer("table"))

    x = torch.randn(4, 3, 6)
    graph_module = fxc.compile(Model(), "canonicalize", x, verify=False)
    whole, single = made_by(graph_module, x), made_by(graph_module, x[:1])
    assert keeps_apart(graph_module.graph, whole, single, 4) == apart


class Windows(nn.Module):
    """Windows of images are rows of a larger batch, with images outermost."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(2, 16, 16))
        self.register_buffer("gaps", torch.randn(4, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        y = self.norm(x).view(n, 2, 4, 2, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(4 * n, 16, 16)
        qkv = self.qkv(y).reshape(4 * n, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * 8**-0.5) @ k.transpose(-2, -1) + self.table
        gaps = self.get_buffer("gaps")
        scores = scores.view(n, 4, 2, 16, 16) + gaps.unsqueeze(1).unsqueeze(0)
        y = scores.view(-1, 2, 16, 16).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(4 * n, 16, 16))
        y = y.view(n, 2, 2, 4, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(n, 8, 8, 16)
        z: torch.Tensor = (x + y).mean((1, 2))
        return z


@pytest.mark.parametrize("batch", [2, 4, 7])
def test_windows_lie_inside_of_images(batch: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 8, 8, 16)
    compact = compiled(Windows(), x)
    assert "softmax" not in compact.code
    assert_alike(compact, x)
    assert one_by_one(compact)


class Averaged(nn.Module):
    """A mean of real numbers in the middle."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Conv2d(3, 20, 1), nn.Linear(20, 4)
        self.norm = nn.LayerNorm(20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(torch.relu(self.first(x)).permute(0, 2, 3, 1))
        if self.how == "tokens":
            y = y.flatten(1, 2).mean(1)
        elif self.how == "rows and columns":
            y = y.mean((1, 2))
        elif self.how == "kept":
            y = y.permute(0, 3, 1, 2).mean((2, 3), keepdim=True).flatten(1)
        elif self.how == "adaptive":
            y = F.adaptive_avg_pool2d(y.permute(0, 3, 1, 2), (2, 3)).amax((2, 3))
        else:
            y = F.avg_pool2d(y.permute(0, 3, 1, 2), 3, 2, padding=1, count_include_pad=False).amax((2, 3))
        z: torch.Tensor = self.last(y)
        return z


@pytest.mark.parametrize("how", ["tokens", "rows and columns", "kept", "adaptive", "windows"])
def test_means_of_real_numbers(how: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 7, 9)
    compact = compiled(Averaged(how), x)
    assert_alike(compact, x)
    names = [item.name for plan in compact._native.made.plans.values() if plan is not None  # type: ignore[union-attr]
             for item in plan.plan.items if isinstance(item, PythonCall)]  # fmt: skip
    assert all(name.startswith("amax") for name in names)
