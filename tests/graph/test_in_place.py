"""What a model writes in place into views, and what it makes on the way: followed without aliasing, or kept whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.errors import CaptureError
from fxcompress.graph import opaque
from fxcompress.graph.views import writes_in_place

Body = Callable[[torch.Tensor], "torch.Tensor | None"]


class Around(nn.Module):
    """A convolution, code that works in place on its output, and a classifier."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        made = self.body(x)
        return self.head((x if made is None else torch.cat([x, made], 2)).mean((2, 3)))  # type: ignore[no-any-return]


def overlapping_slices(x: torch.Tensor) -> None:
    x[:, :4].relu_()
    part = x[:, 2:5]
    part += 1.0


def pieces(x: torch.Tensor) -> None:
    first, second = x.chunk(2, 1)
    first.sigmoid_()
    second.add_(first)


def view_of_a_view(x: torch.Tensor) -> torch.Tensor:
    outer = x[:, 2:6]
    inner = outer[:, 1:3]
    inner.mul_(3.0)
    again = inner.add_(1)
    turned = outer.permute(0, 2, 3, 1)
    turned.sub_(1.0)
    again.mul_(2)
    return torch.cat([outer, inner, again], 1)


def other_shapes(x: torch.Tensor) -> None:
    x.view(x.shape[0], -1).mul_(2)
    x.unsqueeze(1).squeeze(1).clamp_(min=-1.0)
    x.transpose(1, 2)[:, 3:].neg_()
    x.mT[:, :, -2:] = 1
    x.flatten(2)[:, -1].exp_()
    nn.Flatten(2)(x).abs_()


def single_indices(x: torch.Tensor) -> None:
    x.select(1, 0).fill_(2.0)
    x.narrow(1, 2, 3).zero_()
    x[:, 6, 1:3, -2:] = 5
    x[..., -1] = x[..., 0]
    x.unbind(0)[1].copy_(x[0])
    x[:, ::2] *= 2
    x[:, [1, 3]] += 1
    x[x < 0] = 0.25


def module_in_place(x: torch.Tensor) -> None:
    nn.ReLU(inplace=True)(x[:, 3:])
    F.elu(x[:, :3], inplace=True)


def a_copy_is_no_view(x: torch.Tensor) -> torch.Tensor:
    x.permute(0, 2, 3, 1).reshape(x.shape[0], -1).zero_()  # such a reshape copies
    copied = x.clone()
    copied[:, :3] = 0
    copied.detach().add_(1)
    return copied


BODIES = [overlapping_slices, pieces, view_of_a_view, other_shapes, single_indices, module_in_place, a_copy_is_no_view]


@pytest.mark.parametrize("body", BODIES)
@torch.no_grad()
def test_writes_into_views_are_followed_without_aliasing(body: Body) -> None:
    torch.manual_seed(0)
    model = Around(body).eval()
    x, more = torch.randn(2, 3, 6, 6), torch.randn(3, 3, 6, 6)
    compact = fxc.compile(model, [], x)
    assert torch.equal(compact(x), model(x))
    if body is not view_of_a_view:
        assert torch.equal(compact(more), model(more))
    assert not any(writes_in_place(node, compact) for node in compact.graph.nodes)


@pytest.mark.parametrize("body", [overlapping_slices, pieces, module_in_place])
@torch.no_grad()
def test_channels_behind_written_slices_are_removed(body: Body) -> None:
    torch.manual_seed(0)
    model, x = Around(body).eval(), torch.randn(2, 3, 6, 6)
    masked = fxc.PassManager([P.MaskChannels(0.5, scope="layer")]).run(fxc.trace(model, x), x).graph_module
    expected = masked(x)
    compact = fxc.PassManager([P.RemoveChannels()]).run(masked, x).graph_module
    assert compact.get_parameter("conv.weight").shape[0] == 4
    torch.testing.assert_close(compact(x), expected)


VIEWS: dict[str, Body] = {
    "slice": lambda x: x[:, 1:3], "tail": lambda x: x[..., 2:], "item": lambda x: x[:, -1:], "same": lambda x: x,
    "turn": lambda x: x.transpose(1, 2), "permute": lambda x: x.permute(0, 2, 1),
    "view": lambda x: x.unsqueeze(2).squeeze(2), "piece": lambda x: x.split([1, x.shape[1] - 1], 1)[1],
    "half": lambda x: x.chunk(2, -1)[0],
}  # fmt: skip
WRITES: dict[str, Body] = {
    "relu": lambda x: x.relu_(), "add": lambda x: x.add_(1.5), "zero": lambda x: x.zero_(),
    "mul": lambda x: x.mul_(x), "set": lambda x: x.__setitem__((slice(None), slice(0, 1)), -3.0),
}  # fmt: skip


class Program(nn.Module):
    """Takes views of anything it has, and writes into anything it has; returns all of it."""

    def __init__(self, steps: list[tuple[int, str, str]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        tensors = [x * 2]
        for place, view, write in self.steps:
            made = VIEWS[view](tensors[place % len(tensors)])
            assert made is not None
            tensors.append(made)
            if write:
                WRITES[write](tensors[(place * 7 + 1) % len(tensors)])
        return tensors


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.sampled_from(sorted(VIEWS)), st.sampled_from([*sorted(WRITES), ""])),
        min_size=1, max_size=5,
    )
)  # fmt: skip
@torch.no_grad()
def test_random_programs_of_views_and_writes(steps: list[tuple[int, str, str]]) -> None:
    x, model = torch.linspace(-2, 2, 60, dtype=torch.float64).view(3, 5, 4), Program(steps).eval()
    try:
        expected = model(x)
    except (RuntimeError, IndexError):
        return  # no tensor is left to cut
    if any(not tensor.numel() for tensor in expected):
        return
    found = fxc.compile(model, [], x)(x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class Diagonal(nn.Module):
    """Writes into a view that no other operator undoes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        x.diagonal(dim1=2, dim2=3).zero_()
        return x + 1


@torch.no_grad()
def test_a_write_that_cannot_be_followed_keeps_its_module_whole() -> None:
    x = torch.randn(2, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Diagonal(), nn.Conv2d(8, 4, 1)).eval()
    compact = fxc.compile(model, [], x)
    assert torch.equal(compact(x), model(x))
    assert "'diagonal' cannot be undone" in opaque.reasons(compact)["1"]
    with pytest.raises(CaptureError, match=r"into a view of a tensor that is read afterwards.*'diagonal'"):
        fxc.trace(Diagonal(), x)


class MadeInForward(nn.Module):
    """Makes modules where it uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.Unfold(2, stride=2)(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2))(self.conv(x)))
        return self.head(x.mean(2))  # type: ignore[no-any-return]


def test_modules_without_parameters_may_be_made_in_the_forward() -> None:
    torch.manual_seed(0)
    model, x = MadeInForward().eval(), torch.randn(2, 3, 8, 8)
    compact = fxc.compile(model, "prune-channels{ratio=0.5, scope=layer}", x)
    assert compact.get_parameter("conv.weight").shape[0] == 4
    assert torch.equal(fxc.compile(model, [], x)(x), model(x))


class Homeless(nn.Module):
    """Calls a layer that is no submodule of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 4)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)  # type: ignore[no-any-return]


def test_modules_with_parameters_that_are_no_submodules_are_named() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(CaptureError, match=r"calls Linear with 20 parameters, which is no submodule.*as a submodule"):
        fxc.trace(Homeless(), x)
    model = nn.Sequential(nn.Linear(4, 4), Homeless())
    graph: fx.GraphModule = fxc.trace(model, x)
    assert "calls Linear with 20 parameters" in opaque.reasons(graph)["1"]
