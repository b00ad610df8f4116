"""Layers whose inputs lie on no fixed grid: kernels and PyTorch's operators against exact arithmetic."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxcompress as fxc
from fxcompress.emit.compact_module import CompactModule
from fxcompress.emit.cpu_int8 import (
    Int8DynamicLinear,
    Int8Embedding,
    Int8WeightOnlyLinear,
    QuantizedLayer,
    QuantizeRows,
)
from fxcompress.emit.native import library
from fxcompress.errors import OptionError
from fxcompress.quant import oracle
from fxcompress.quant.cpu import VARIABLE
from fxcompress.quant.rows import quantize_rows
from fxcompress.quant.spec import Grid
from tests.kernels import NEEDED

SIGNED = Grid(0.03125, 128)
ACTIVATIONS: dict[tuple[Any, ...] | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda x: x,
    ("clamp", 0.0, None): F.relu,
    ("clamp", -1.0, 2.0): lambda x: x.clamp(-1, 2),
    ("gelu", "none"): F.gelu,
    ("gelu", "tanh"): lambda x: F.gelu(x, approximate="tanh"),
    ("silu",): F.silu,
    ("leaky_relu", 0.1): lambda x: F.leaky_relu(x, 0.1),
}
OUTPUTS = [None, None, Grid(0.0625, 0), Grid(0.05, 130, 10, 240)]
LINEAR = [Int8DynamicLinear, Int8WeightOnlyLinear]
EXECUTORS = ["graph", *(["auto"] if library.library() is not None else [])]


def filled(layer: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    layer.weight.copy_(torch.randint(-127, 128, layer.weight.shape, generator=generator))
    layer.weight_scale.copy_(torch.rand(len(layer.weight_scale), generator=generator) * 1e-2 + 1e-3)
    if getattr(layer, "bias", None) is not None:
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
    return layer.eval()


def graph_of(layer: QuantizedLayer, inputs: int = 1) -> CompactModule:
    """A graph that quantises rows, if the layer wants that, and calls the layer."""
    root, graph = nn.Module(), fx.Graph()
    root.add_module("layer", layer)
    values = [graph.placeholder(f"x{index}") for index in range(inputs)]
    if isinstance(layer, Int8DynamicLinear):
        root.add_module("rows", QuantizeRows(0, 255))
        values[0] = graph.call_module("rows", (values[0],))
    graph.output(graph.call_module("layer", tuple(values)))
    return CompactModule(root, graph).eval()


def products(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer alone, in exact arithmetic."""
    weight = layer.weight.double() * layer.weight_scale.double()[:, None]
    if isinstance(layer, Int8DynamicLinear):
        q, scale, zero_point = quantize_rows(x, 0, 255)
        x = (q - zero_point).double() * scale.double()
    return F.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())


def agree(found: torch.Tensor, expected: torch.Tensor, size: float, output: Grid | None) -> None:
    """Equal up to the rounding of float32, relative to the size of summands; bytes up to ties."""
    assert found.shape == expected.shape
    if output is None:
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 2e-6 * max(size, 1e-3)
        return
    assert found.dtype == torch.uint8
    exact = expected / output.scale + output.zero_point
    assert (found - exact.clamp(output.quant_min, output.quant_max)).abs().max() <= 0.5 + 2e-6 * size / output.scale


@given(
    st.sampled_from(LINEAR), st.integers(1, 70), st.integers(1, 150),
    st.one_of(st.lists(st.integers(1, 5), max_size=3), st.lists(st.integers(6, 40), min_size=1, max_size=1)),
    st.sampled_from(list(ACTIVATIONS)), st.sampled_from(OUTPUTS), st.sampled_from([None, None, "float", SIGNED]),
    st.booleans(), st.sampled_from([1, 3]), st.integers(0, 100),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_linear_layers_equal_exact_arithmetic(
    kind: Any, features: int, out: int, sizes: list[int], activation: Any, output: Grid | None, residual: Any,
    bias: bool, threads: int, seed: int,
) -> None:  # fmt: skip
    wanted = residual.config() if isinstance(residual, Grid) else residual
    layer = filled(kind(features, out, bias, output and output.config(), activation, wanted), seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*sizes, features, generator=generator) * 10 ** float(torch.rand((), generator=generator) * 3 - 2)
    inputs, expected = [x], products(layer, x)
    if residual is not None:
        addend = torch.randint(0, 256, (*sizes, out), dtype=torch.uint8, generator=generator)
        inputs.append(addend.float() if residual == "float" else addend)
        expected = expected + (addend.double() if residual == "float" else oracle.from_grid(addend, SIGNED))
    size = float(expected.abs().max()) + float(products(layer, x).abs().max()) + 1
    summands = layer.weight_scale.max() * x.abs().max() * 127 * features**0.5
    expected = ACTIVATIONS[activation](expected)
    compact = graph_of(layer, len(inputs))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for compact.executor in EXECUTORS:
            agree(compact(*inputs), expected, size + float(summands), output)
    finally:
        torch.set_num_threads(before)


@NEEDED
@pytest.mark.parametrize("largest", [255, 15])
def test_kernels_measure_rows_bit_for_bit_as_pytorch_does(largest: int) -> None:
    root, graph = nn.Module(), fx.Graph()
    root.add_module("rows", QuantizeRows(0, largest))
    graph.output(graph.call_module("rows", (graph.placeholder("x"),)))
    compact = CompactModule(root, graph).eval()
    generator = torch.Generator().manual_seed(0)
    measure = compact.get_submodule("rows")
    for features in (1, 15, 16, 65, 300):
        x = torch.randn(400, features, generator=generator) * torch.logspace(-45, 38, 400)[:, None]
        x[::3] = x[::3].abs()
        x[::7, 0] = float("inf")
        x[1::7, -1] = -float("inf")
        x[5], x[6] = 0.0, -3.5
        expected, found = measure(x), compact(x)
        assert compact._native.made is not None
        for left, right in zip(expected, found, strict=True):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("kind", LINEAR)
def test_rows_that_are_not_finite_spoil_no_others(kind: Any, executor: str) -> None:
    compact = graph_of(filled(kind(5, 3, True)))
    compact.executor = executor
    x = torch.randn(4, 5)
    expected = compact(x)
    x[1, 2], x[2, 0] = float("nan"), float("inf")
    found = compact(x)
    assert torch.equal(found[[0, 3]], expected[[0, 3]])
    assert found[1].isnan().all()
    assert (found[2].abs() > 1e30).all()


@pytest.mark.parametrize("kind", LINEAR)
def test_no_rows_make_no_rows(kind: Any) -> None:
    compact = graph_of(filled(kind(5, 3, True)))
    for compact.executor in EXECUTORS:
        assert compact(torch.zeros(0, 5)).shape == (0, 3)
        assert compact(torch.zeros(2, 0, 5)).shape == (2, 0, 3)


@pytest.mark.parametrize("kind", LINEAR)
def test_inputs_need_not_lie_row_by_row(kind: Any) -> None:
    layer = filled(kind(6, 20, True))
    compact = graph_of(layer)
    for x in (torch.randn(6, 9).t(), torch.randn(4, 12)[:, ::2], torch.randn(3, 1, 6).expand(3, 4, 6)):
        for compact.executor in EXECUTORS:
            agree(compact(x), products(layer, x), 5, None)


@NEEDED
@pytest.mark.parametrize("kind", LINEAR)
def test_kernels_leave_nothing_to_python_and_take_samples_one_by_one(kind: Any) -> None:
    layer = filled(kind(24, 40, True))
    compact = graph_of(layer)
    x = torch.randn(4, 7, 24)
    agree(compact(x), products(layer, x), 10, None)
    (plan,) = compact._native.made.plans.values()  # type: ignore[union-attr]
    assert plan is not None
    assert not any(hasattr(part, "function") for part in plan.runs)
    assert plan.single is not None


@pytest.mark.parametrize("cpu", ["avx2", "plain"])
@pytest.mark.parametrize("kind", LINEAR)
def test_other_machines_compute_the_same(kind: Any, cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, cpu)
    layer, x = filled(kind(30, 11, True)), torch.randn(6, 30)
    agree(graph_of(layer)(x), products(layer, x), 10, None)


@pytest.mark.parametrize("kind", LINEAR)
def test_derived_numbers_are_never_copied_stored_or_kept(kind: Any) -> None:
    compact, x = graph_of(filled(kind(8, 8, True))), torch.randn(3, 8)
    for compact.executor in EXECUTORS:
        expected = compact(x)
        for twin in (copy.deepcopy(compact), pickle.loads(pickle.dumps(compact))):
            assert torch.equal(twin(x), expected)
    compact.get_buffer("layer.weight").neg_()
    compact.repack()
    for compact.executor in EXECUTORS:
        agree(compact(x), products(compact.get_submodule("layer"), x), 5, None)


def test_gradients_of_the_input_pass_a_weight_only_layer() -> None:
    layer, x = filled(Int8WeightOnlyLinear(4, 3, True)), torch.randn(2, 4, requires_grad=True)
    graph_of(layer)(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (layer.weight * layer.weight_scale[:, None]).sum(0).expand(2, 4))


@given(st.integers(1, 9), st.integers(1, 20), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_embeddings_are_bit_for_bit_those_of_the_rounded_table(
    rows: int, width: int, sizes: list[int], seed: int
) -> None:
    layer = filled(Int8Embedding(rows, width), seed)
    indices = torch.randint(0, rows, sizes, generator=torch.Generator().manual_seed(seed))
    table = layer.weight.float() * layer.weight_scale[:, None]
    rounded = torch.fake_quantize_per_channel_affine(
        table, layer.weight_scale, torch.zeros(rows, dtype=torch.int32), 0, -127, 127
    )
    assert torch.equal(layer(indices), F.embedding(indices, rounded))


class Tied(nn.Module):
    """An output layer with the weights of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(F.relu(self.body(self.embed(ids))))
        return y


def test_a_weight_of_two_layers_is_one_table_also_in_a_file(tmp_path: Path) -> None:
    ids = torch.arange(12).view(2, 6)
    compact = fxc.compile(Tied(), "int8-weight-only", ids)
    assert compact.get_buffer("embed.weight") is compact.get_buffer("head.weight")
    compact.save(tmp_path / "m.fxc")
    stored = safetensors.torch.load_file(tmp_path / "m.fxc")
    assert sum(tensor.shape == (50, 16) for tensor in stored.values()) == 1
    loaded = fxc.load(tmp_path / "m.fxc")
    assert loaded.get_buffer("embed.weight") is loaded.get_buffer("head.weight")
    assert torch.equal(loaded(ids), compact(ids))


def test_rows_of_signed_numbers_are_refused() -> None:
    with pytest.raises(OptionError, match="must hold"):
        QuantizeRows(-128, 127)


@NEEDED
@pytest.mark.parametrize(
    ("shape", "one_by_one"), [((4, 300), False), ((4, 1, 300), False), ((4, 6, 300), True), ((4, 30), True)]
)
def test_weights_are_read_for_several_rows_at_once(shape: tuple[int, ...], one_by_one: bool) -> None:
    for kind in LINEAR:
        layer = filled(kind(shape[-1], 300, True))
        compact, x = graph_of(layer), torch.randn(shape)
        agree(compact(x), products(layer, x), 50, None)
        (plan,) = compact._native.made.plans.values()  # type: ignore[union-attr]
        assert plan is not None
        assert (plan.single is not None) == one_by_one
