"""Lowered modules on inputs that they were not compiled for: errors that say which input is wrong, and how."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress as fxc
from fxcompress.emit import onednn
from fxcompress.emit.compact_module import CompactModule
from fxcompress.emit.cpu_int8 import Int8Conv, Int8Linear
from fxcompress.errors import FxCompressError, InputError
from fxcompress.quant.spec import Grid

X, Y = torch.randn(2, 3, 8, 8), torch.randn(2, 6)
IDS = torch.zeros(2, 5, dtype=torch.long)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.left, self.right = nn.Linear(8, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.deep(F.relu(self.conv(x)))).mean((2, 3))
        return self.left(x) + self.right(y)  # type: ignore[no-any-return]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.linear(self.embedding(batch["ids"])) * batch["mask"].unsqueeze(-1)  # type: ignore[no-any-return]


@pytest.fixture(params=["graph", "auto"], scope="module")
def compact(request: pytest.FixtureRequest) -> CompactModule:
    return fxc.compile(TwoInputs().eval(), "int8", (X, Y), calibration=[(X, Y)], executor=request.param)


CASES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda f: f(X[:, :2], Y), r"'x' is float32 \(2, 2, 8, 8\), where the example was float32 \(2, 3, 8, 8\)"),
    (lambda f: f(torch.randn(2, 5, 8, 8), Y), r"'x' is float32 \(2, 5, 8, 8\)"),
    (lambda f: f(X[0], Y), r"'x' is float32 \(3, 8, 8\)"),
    (lambda f: f(X, Y[:, :5]), r"'y' is float32 \(2, 5\), where the example was float32 \(2, 6\)"),
    (lambda f: f(X, torch.randn(2, 12)), r"'y' is float32 \(2, 12\)"),
    (lambda f: f(X[..., :1, :1], Y), r"'x' is float32 \(2, 3, 1, 1\)"),
    (lambda f: f(X, torch.randn(3, 6)), r"first dimensions do not fit each other \('x' of 2 .*'y' of 3"),
    (lambda f: f(X.to(torch.uint8), Y), r"'x' is uint8 \(2, 3, 8, 8\)"),
    (lambda f: f(X.long(), Y), r"'x' is int64 \(2, 3, 8, 8\)"),
    (lambda f: f(X.numpy(), Y), r"'x' must be a tensor \(float32 \(2, 3, 8, 8\)\), not ndarray"),
    (lambda f: f([X], Y), r"'x' must be a tensor .*, not list"),
    (lambda f: f(X, None), r"'y' must be a tensor .*, not NoneType"),
    (lambda f: f(X), r"'y' is missing"),
    (lambda f: f(X, Y, Y), r"3 were given, and it takes 2 \(x, y\)"),
    (lambda f: f(X, z=Y), r"there is no input 'z', but 'x', 'y'; 'y' is missing"),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_the_wrong_input_is_named(compact: CompactModule, call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(compact)
    assert caught.value.__cause__ is not None
    assert len(str(caught.value).splitlines()) == 1


def test_copies_of_a_module_explain_as_well(compact: CompactModule) -> None:
    with pytest.raises(InputError, match=r"'y' is float32 \(2, 5\)"):
        pickle.loads(pickle.dumps(compact))(X, Y[:, :5])


def test_inputs_that_fit_are_left_alone(compact: CompactModule) -> None:
    for x, y in ((X, Y), (X[:1], Y[:1]), (X.double(), Y), (torch.randn(2, 3, 11, 9), Y), (X[:0], Y[:0])):
        assert compact(x, y).shape == (len(x), 4)
    assert torch.equal(compact(X, y=Y), compact(X, Y))


def test_nested_inputs_are_compared_leaf_by_leaf() -> None:
    batch = {"ids": IDS, "mask": torch.ones(2, 5)}
    compact = fxc.compile(Tokens().eval(), "int8", (batch,), calibration=[(batch,)], executor="graph")
    assert compact(batch).shape == (2, 5, 4)
    with pytest.raises(InputError, match=r"tensor 0 of 'batch' is float32 \(2, 5\), where the example was int64"):
        compact({"ids": IDS.float(), "mask": torch.ones(2, 5)})
    with pytest.raises(InputError, match=r"'batch' is put together in another way"):
        compact([IDS, torch.ones(2, 5)])


def test_failures_that_inputs_do_not_explain_stay_what_they_are(compact: CompactModule) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("not today")

    handle = compact.register_forward_pre_hook(refuse)
    try:
        with pytest.raises(RuntimeError, match="not today") as caught:
            compact(X, Y)
    finally:
        handle.remove()
    assert not isinstance(caught.value, FxCompressError)
    floats = fxc.compile(TwoInputs().eval(), "fuse", (X, Y))
    with pytest.raises(RuntimeError) as caught:  # as the caller's own model
        floats(X, Y[:, :5])
    assert not isinstance(caught.value, FxCompressError)


@pytest.mark.skipif(onednn.library() is None, reason="no oneDNN library on this machine")
def test_a_layer_makes_no_kernel_for_a_shape_that_it_does_not_take() -> None:
    grid = Grid(0.25, 0).config()
    linear = Int8Linear(6, 4, True, grid)
    conv = Int8Conv(4, 4, [3, 3], [1, 1], [0, 0], [1, 1], 4, True, grid, grid, residual=grid)
    for shape in ((2, 12), (2, 5), (2, 3), ()):
        with pytest.raises(InputError, match="Int8Linear takes 6 input channels or features"):
            linear(torch.zeros(shape, dtype=torch.uint8))
    for image in ((1, 8, 5, 5), (1, 2, 5, 5), (5, 5)):
        with pytest.raises(InputError, match="Int8Conv takes 4 input channels or features"):
            conv(torch.zeros(image, dtype=torch.uint8), torch.zeros(1, 4, 3, 3, dtype=torch.uint8))
