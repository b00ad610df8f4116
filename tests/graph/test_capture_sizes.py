"""Capture follows Python that looks at sizes: the example inputs answer, and the report says where they did."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxcompress as fxc
from fxcompress.graph.capture import trace
from fxcompress.graph.metadata import graph_info, info


class Model(nn.Module):
    """A model whose forward is a function of a layer and the input."""

    def __init__(self, function: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer, x)


def pad_to_multiple(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h, w = x.shape[-2:]
    if h % 7 or w % 7:
        x = F.pad(x, (0, 7 - w % 7, 0, 7 - h % 7))
    y: torch.Tensor = layer(x)
    return y


def loops(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    rows = [x[:, :, i] * (i + 1) for i in range(x.shape[2])]
    y: torch.Tensor = layer(torch.stack(rows, 2))
    return y + sum(len(piece.shape) for piece in y.split(2, dim=1)) + len(y[0])


def factories(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    grid = torch.arange(w, device=x.device) + torch.linspace(0, 1, h)[:, None] + torch.full((h, w), 2.0)
    y: torch.Tensor = layer(x + grid + torch.zeros(n, c, 1, 1) + torch.ones((n, 1, h, w)) + torch.tensor([h]))
    return y + x.new_zeros(n, 1, h, w)


def mathematics(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    c = x.size(1)
    side = math.ceil(x.size(2) / 2) + int(x.shape[3] / 2) + round(x.size(2) ** 0.5)
    y: torch.Tensor = layer(x) * math.sqrt(c) / float(math.prod(x.shape[1:]))
    return F.interpolate(y, size=(side, max(x.shape[2], 3)))


def questions(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    assert x.shape[1] == 3, f"3 channels are expected, not {x.shape[1]}"
    torch._assert(x.dim() == 4, f"wrong rank {x.ndim:d}")
    if not isinstance(x, torch.Tensor) or isinstance(x, (tuple, list)) or torch.compiler.is_compiling():
        raise TypeError(type(x))
    if x.is_cuda or x.dtype in (torch.float16, torch.bfloat16) or not x.is_floating_point():
        x = x.float()
    y: torch.Tensor = layer(x)
    if y.shape[2:] == x.shape[2:] and x.shape != y.shape and not hasattr(x, "tensors"):
        y = y * 2
    return y + 1


def items(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mask = x.new_zeros((x.shape[2], x.shape[3]))
    for count, part in enumerate((slice(0, -2), slice(-2, None))):
        mask[part, :] = count + 1
    y: torch.Tensor = layer(x) * mask
    y[:, 0] += 1
    return y


def decorated_assertion(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = layer(x)
    return wrapped_scale(y)


@fx.wrap
def wrapped_scale(y: torch.Tensor) -> torch.Tensor:
    if y.shape[1] > 2:
        return y * y.shape[1]
    return y


FUNCTIONS = [pad_to_multiple, loops, factories, mathematics, questions, items, decorated_assertion]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_sizes_are_followed(function: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
    model, x = Model(function), torch.randn(2, 3, 9, 10)
    traced = trace(model, x)
    assert torch.equal(traced(x), model(x))
    other = torch.randn(5, 3, 9, 10)
    assert torch.equal(traced(other), model(other))
    layers = [node for node in traced.graph.nodes if node.op == "call_module"]
    assert [node.target for node in layers] == ["layer"]
    assert not [node for node in traced.graph.nodes if info(node).opaque]


def test_the_place_and_the_sizes_that_decided_are_noted() -> None:
    notes = graph_info(trace(Model(pad_to_multiple), torch.randn(1, 3, 9, 10))).notes
    assert len(notes) == 1
    assert notes[0].startswith("one branch for all inputs, that of x.shape[2] = 9 at ")
    assert "test_capture_sizes.py:" in notes[0]
    assert "(`if h % 7 or w % 7:`)" in notes[0]
    notes = graph_info(trace(Model(loops), torch.randn(1, 3, 9, 10))).notes
    assert any("x.shape[2] = 9" in note and "`rows = " in note for note in notes)


def test_what_is_the_same_for_every_input_of_a_graph_is_not_noted() -> None:
    for function in (factories, items):
        assert graph_info(trace(Model(function), torch.randn(1, 3, 9, 10))).notes == []


def limits(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Checks of sizes, in several spellings, of which none decides what is computed."""
    if x.shape[2] > 100: raise ValueError("too high")  # fmt: skip  # noqa: E701
    if (
        x.shape[2] > 100
        or x.shape[3] > 100
    ):  # fmt: skip
        # beyond the table
        raise ValueError("too large")
    if x.shape[3] <= 100:
        x = x + 1
    else:
        raise ValueError("too wide")
    if x.shape[2] > 90:
        warnings.warn("nearly too high", stacklevel=2)
    return layer(x)  # type: ignore[no-any-return]


def test_checks_of_sizes_decide_nothing_and_are_not_noted() -> None:
    model, x = Model(limits), torch.randn(1, 3, 9, 10)
    traced = trace(model, x)
    assert graph_info(traced).notes == []
    other = torch.randn(1, 3, 20, 7)
    assert torch.equal(traced(other), model(other))


def test_functions_registered_with_fx_wrap_are_traced_into() -> None:
    traced = trace(Model(decorated_assertion), torch.randn(1, 3, 9, 10))
    assert wrapped_scale not in {node.target for node in traced.graph.nodes}


def test_a_value_that_depends_on_parameters_only_is_known() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.tensor([0.5, 2.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.gate[1] if self.gate.sum() > 1 else x

    traced = trace(Scaled().eval(), torch.ones(3))
    assert torch.equal(traced(torch.ones(3)), torch.full((3,), 2.0))
    assert "that of the value of gate" in graph_info(traced).notes[0]


def test_torch_is_as_it_was_afterwards() -> None:
    before = torch.zeros, torch.backends.mha.get_fastpath_enabled(), nn.Module.__call__, nn.Module.__getattr__
    trace(Model(factories), torch.randn(1, 3, 9, 10))
    assert before == (
        torch.zeros, torch.backends.mha.get_fastpath_enabled(), nn.Module.__call__, nn.Module.__getattr__,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t", "vit_b_16"])
def test_vision_transformers_become_plain_operations(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    size = 224 if name == "vit_b_16" else 64
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None).eval()
    traced = fxc.trace(model, torch.zeros(1, 3, size, size, device="meta"))
    modules = {str(getattr(node.target, "__module__", "")) for node in traced.graph.nodes if node.op == "call_function"}
    assert not [module for module in modules if module.startswith("torchvision")]
    read = {str(node.target) for node in traced.graph.nodes if node.op in ("get_attr", "call_module")}
    for path, _ in model.named_parameters():
        assert path in read or any(path.startswith(f"{layer}.") for layer in read)
