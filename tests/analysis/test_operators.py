"""Channels through operators beyond those of plain convolutional networks: removed equals masked, and enough goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.graph.compare import difference

Forward = Callable[["Pair", torch.Tensor], torch.Tensor]


class Pair(nn.Module):
    """Two convolutions a, b of `width` channels, a forward between them and d, which reads what it makes."""

    def __init__(self, run: Forward, width: int = 8, reads: int = 8, more: dict[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 1), nn.Conv2d(3, width, 1)
        self.d = nn.Conv2d(reads, 3, 1)
        self.width = width
        self.more = nn.ModuleDict(more or {})
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.run(self, x))  # type: ignore[no-any-return]


def pruned(model: nn.Module, shape: tuple[int, ...] = (2, 3, 8, 8)) -> fxc.CompactModule:
    """Mask and remove half of all channels in float64; compare them at three batch sizes."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.double().eval()
    example = torch.randn(shape, dtype=torch.float64)
    masked = fxc.compile(model, [P.MaskChannels(0.5, scope="layer")], example)
    removed = fxc.compile(model, [P.MaskChannels(0.5, scope="layer"), P.RemoveChannels()], example)
    for batch in (1, 2, 5):
        x = torch.randn((batch, *shape[1:]), dtype=torch.float64)
        with torch.no_grad():
            expected = masked(x)
            assert expected.abs().max() > 1e-3
            assert difference(expected, removed(x)).relative <= 1e-10
    return removed


def widths(model: nn.Module, *names: str) -> list[int]:
    return [int(model.get_parameter(f"{name}.weight").shape[0]) for name in names]


def reasons(model: fxc.CompactModule, layer: str) -> str:
    return " ".join(note.text for row in model.report.rows for note in row.notes if note.layer == layer)


# -- sizes computed at run time -------------------------------------------------------------------------------------


def with_the_width_of_another(net: Pair, x: torch.Tensor) -> torch.Tensor:
    """The batch and the width of `a` state the shape of `b`, whose channels are others."""
    first, second = net.a(x), net.b(x)
    batch, width, height, breadth = first.shape
    return second.view(batch, 2, width // 2, height * breadth).reshape(batch, width, height, breadth) + first.mean(1, keepdim=True)


def frozen_with_the_width_of_another(net: Pair, x: torch.Tensor) -> torch.Tensor:
    """The softmax freezes `b`; the width of `a` states its size nevertheless."""
    first, second = net.a(x), net.b(x)
    batch, width, height, breadth = first.shape
    return F.softmax(second.flatten(2), 1).view(batch, width, height, breadth) + first.mean(1, keepdim=True)


def positions_and_channels_in_one_number(net: Pair, x: torch.Tensor) -> torch.Tensor:
    """A number that both the input and the width of `a` change states the size of a dimension of `b`."""
    first, second = net.a(x), net.b(x)
    rows = (first.shape[1] + first.shape[2]) // 2  # 8, as b has channels
    return second.flatten(2).reshape(x.shape[0], rows, -1).view(second.shape) + first.mean(1, keepdim=True)


def rows_of_all_channels(net: Pair, x: torch.Tensor) -> torch.Tensor:
    """The width of `a` states the size of a dimension that holds channels of `b`, and positions."""
    first, second = net.a(x), net.b(x)
    rows = second.reshape(x.shape[0], first.shape[1] * x.shape[2], x.shape[3])
    return rows.reshape(second.shape) + first.mean(1, keepdim=True)


def slice_by_another_width(net: Pair, x: torch.Tensor) -> torch.Tensor:
    first = net.a(x)
    return F.softmax(net.b(x), 1)[:, : first.shape[1]] + first.mean(1, keepdim=True)


def split_by_a_width(net: Pair, x: torch.Tensor) -> torch.Tensor:
    first = net.a(x)
    left, right = F.softmax(net.b(x), 1).split(first.shape[1] // 2, dim=1)
    return torch.cat([right, left], 1) + first.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("run", "kept"),
    [
        (with_the_width_of_another, [4, 4]),
        (frozen_with_the_width_of_another, [4, 8]),
        (positions_and_channels_in_one_number, [4, 4]),
        (rows_of_all_channels, [8, 8]),
        (slice_by_another_width, [4, 8]),
        (split_by_a_width, [4, 8]),
    ],
)
def test_sizes_taken_from_another_tensor(run: Forward, kept: list[int]) -> None:
    """Whatever a size is computed from, it is right after the removal, or the channels stay."""
    assert widths(pruned(Pair(run)), "a", "b") == kept


class Divided(nn.Module):
    """Channels divided by a table of numbers that only the buffer knows."""

    periods: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Linear(3, 8), nn.Linear(8, 3)
        self.register_buffer("periods", torch.arange(1.0, 9.0).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a: torch.Tensor = self.a(x)
        return self.d(a * torch.cos(x.sum(-1, keepdim=True) / self.periods[None]))  # type: ignore[no-any-return]


def test_what_is_divided_by_is_not_masked_but_follows() -> None:
    removed = pruned(Divided(), (2, 3))
    assert widths(removed, "a") == [4]
    assert removed.get_buffer("periods").shape == (4,)
