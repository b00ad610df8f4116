"""The 8-bit modules: kernels against exact integer arithmetic, over layouts, copies, machines and fake tensors."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fxcompress.emit import onednn
from fxcompress.emit.cpu_int8 import (
    MODULES,
    Dequantize,
    Int8Add,
    Int8Affine,
    Int8Attention,
    Int8AvgPool,
    Int8Conv,
    Int8DynamicLinear,
    Int8Embedding,
    Int8Layer,
    Int8Linear,
    Int8MaxPool,
    Int8Mul,
    Int8WeightOnlyLinear,
    Kernel,
    Quantize,
    QuantizeRows,
    activation_of,
)
from fxcompress.errors import OptionError
from fxcompress.quant import oracle
from fxcompress.quant.cpu import VARIABLE
from fxcompress.quant.spec import Grid

SIGNED, POSITIVE = Grid(0.03125, 128), Grid(0.0234375, 0)
ACTIVATIONS: dict[str, tuple[tuple[Any, ...] | None, Callable[[torch.Tensor], torch.Tensor] | None]] = {
    "none": (None, None),
    "relu": (("clamp", 0.0, None), F.relu),
    "relu6": (("clamp", 0.0, 6.0), F.relu6),
    "hardtanh": (("clamp", -1.0, 2.0), lambda x: x.clamp(-1, 2)),
    "hardswish": (("hardswish",), F.hardswish),
    "silu": (("silu",), F.silu),
    "gelu": (("gelu", "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "leaky_relu": (("leaky_relu", 0.1), lambda x: F.leaky_relu(x, 0.1)),
    "tanh": (("tanh",), torch.tanh),
}
OUTPUTS = [None, Grid(0.0625, 0), Grid(0.046875, 120), Grid(6 / 255, 0)]
OUTPUTS += [Grid(0.05, 30, 0, 127), Grid(0.05, 130, 10, 240)]


@pytest.fixture(params=["primitives", "operators"], autouse=True, scope="module")
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every promise holds for prepared primitives and for PyTorch's operators."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "operators":
            patch.setenv(onednn.VARIABLE, "off")
        elif onednn.library() is None:
            pytest.skip("no oneDNN library on this machine")
        yield


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def fill(layer: Int8Layer, largest: int = 127) -> Any:
    """Random weights; scales and biases on coarse grids, as the passes leave them."""
    layer.weight.copy_(torch.randint(-largest, largest + 1, layer.weight.shape))
    layer.weight_scale.copy_(torch.tensor([0.0078125, 0.005859375, 0.0048828125])[torch.arange(len(layer.weight)) % 3])
    if layer.bias is not None:
        step = layer.weight_scale * layer.input.scale
        layer.bias.copy_((torch.randn(len(layer.weight)) / step).round() * step)
    return layer


def config(grid: Grid | None) -> list[Any] | None:
    return None if grid is None else grid.config()


def agree(found: torch.Tensor, expected: torch.Tensor, output: Grid | None) -> None:
    """Equal but for sums on the edge between two integers, which float32 may round to either."""
    assert found.shape == expected.shape
    if output is None:
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    else:
        assert found.dtype == torch.uint8
        gap = (found.int() - expected.int()).abs()
        assert gap.max() <= 1
        assert (gap > 0).sum() <= max(1, 0.02 * gap.numel())  # between two integers


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes and numbers of a convolution whose kernel fits its input."""
    groups = draw(st.sampled_from([1, 1, 2, 8]))
    case = {
        "dimensions": draw(st.sampled_from([1, 2, 2, 3])),
        "inputs": groups * draw(st.integers(1, 5)),
        "outputs": groups * draw(st.integers(1, 5)),
        "groups": groups,
        "size": draw(st.integers(5, 9)),
        "batch": draw(st.integers(1, 3)),
        "kernel": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 3)),
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "input": Grid(0.03125, draw(st.sampled_from([0, 7, 128, 255]))),
        "output": draw(st.sampled_from(OUTPUTS)),
        "activation": draw(st.sampled_from(list(ACTIVATIONS)[:6])),
        "residual": draw(st.sampled_from([None, None, SIGNED, POSITIVE, "float"])),
        "overwrite": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }
    return case


@given(case=convolutions())
@settings(max_examples=150, deadline=None)
def test_convolutions_equal_integer_arithmetic(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    dims, residual, output = case["dimensions"], case["residual"], case["output"]
    layer = fill(
        Int8Conv(
            case["inputs"], case["outputs"], [case["kernel"]] * dims, [case["stride"]] * dims,
            [case["padding"]] * dims, [case["dilation"]] * dims, case["groups"], case["bias"],
            input=case["input"].config(), output=config(output), activation=ACTIVATIONS[case["activation"]][0],
            residual=residual if residual in (None, "float") else residual.config(), overwrite=case["overwrite"],
        )
    )  # fmt: skip
    x = integers(case["batch"], case["inputs"], *[case["size"]] * dims)
    geometry = (case["stride"], case["padding"], case["dilation"], case["groups"])
    plain = oracle.convolution(
        x, case["input"], layer.weight, layer.weight_scale, oracle.Epilogue(layer.bias), *geometry
    )
    addend = None if residual is None else second_input(plain.shape, residual)
    expected = with_epilogue(plain, addend, residual, ACTIVATIONS[case["activation"]][1], output)
    inputs = [x] if addend is None else [x, addend.clone()]
    agree(layer(*inputs), expected, output)
    if addend is not None and not case["overwrite"]:
        assert torch.equal(inputs[1], addend)
    agree(layer._in_floats(x, None if addend is None else addend.clone()), expected, output)


def second_input(shape: Sequence[int], residual: Grid | str) -> torch.Tensor:
    return torch.randn(tuple(shape)) if residual == "float" else integers(*shape)


def with_epilogue(
    plain: torch.Tensor,
    addend: torch.Tensor | None,
    residual: Grid | str | None,
    activation: Callable[[torch.Tensor], torch.Tensor] | None,
    output: Grid | None,
) -> torch.Tensor:
    result = plain
    if addend is not None:
        result = result + (oracle.from_grid(addend, residual) if isinstance(residual, Grid) else addend)
    if activation is not None:
        result = activation(result)
    return result if output is None else oracle.to_grid(result, output)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
@pytest.mark.parametrize("residual", [None, SIGNED, "float"], ids=["alone", "sum", "float sum"])
def test_linear_layers_equal_integer_arithmetic(
    activation: str, output: Grid | None, residual: Grid | str | None
) -> None:
    torch.manual_seed(0)
    name, function = ACTIVATIONS[activation]
    given = residual.config() if isinstance(residual, Grid) else residual
    layer = fill(Int8Linear(33, 17, True, SIGNED.config(), config(output), name, given))
    for shape in ((4,), (2, 5), (0,)):
        x = integers(*shape, 33)
        plain = oracle.linear(x, SIGNED, layer.weight, layer.weight_scale, oracle.Epilogue(layer.bias))
        addend = None if residual is None else second_input(plain.shape, residual)
        if 0 not in shape:
            inputs = (x,) if addend is None else (x, addend)
            agree(layer(*inputs), with_epilogue(plain, addend, residual, function, output), output)


@pytest.mark.parametrize("residual", [POSITIVE, "float"], ids=["8 bits", "float"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_residuals_of_other_shapes_are_broadcast(residual: Grid | str, overwrite: bool, activation: str) -> None:
    torch.manual_seed(0)
    name, function = ACTIVATIONS[activation]
    output = Grid(0.0625, 120, 20, 240) if isinstance(residual, Grid) else None
    second = residual.config() if isinstance(residual, Grid) else residual
    rest = (SIGNED.config(), config(output), name, second, overwrite)
    images = fill(Int8Conv(4, 6, [3, 3], [2, 1], [1, 0], [1, 2], 2, True, *rest))
    series = fill(Int8Conv(4, 6, [3], [2], [1], [1], 1, True, *rest))
    linear = fill(Int8Linear(4, 6, True, *rest))
    cases: list[tuple[Int8Layer, tuple[int, ...], list[tuple[int, ...]]]] = [
        (images, (3, 4, 7, 9), [(3, 6, 4, 5), (1, 6, 4, 5), (3, 6, 1, 1), (6, 1, 5), (1, 6, 4, 5), (3, 6, 4, 5)]),
        (images, (1, 4, 7, 9), [(1, 6, 4, 5), (5, 6, 4, 5), (1, 1, 4, 5)]),
        (series, (3, 4, 9), [(3, 6, 5), (1, 6, 5), (6, 1)]),
        (linear, (3, 2, 4), [(3, 2, 6), (1, 2, 6), (2, 6), (6,), (3, 2, 1)]),
        (linear, (1, 4), [(1, 6), (7, 6)]),
    ]
    for layer, shape, others in cases:
        x = integers(*shape)
        plain = type(layer).from_config({**layer.config(), "output": None, "activation": None, "residual": None})
        plain.load_state_dict(dict(layer.named_buffers()), strict=False)
        for other in others:  # one after the other: a layer does not stick to the shapes of its first call
            addend = second_input(other, residual)
            expected = with_epilogue(plain(x).double(), addend, residual, function, output)
            agree(layer(x, addend.clone()), expected, output)


def test_an_activation_that_storing_does_anyway_costs_nothing() -> None:
    relu, relu6 = ("clamp", 0.0, None), ("clamp", 0.0, 6.0)

    def word(activation: tuple[Any, ...], output: Grid | None) -> str:
        return Int8Linear(1, 1, False, SIGNED.config(), config(output), activation)._kernel_activation()[0]

    assert word(relu, Grid(0.1, 0)) == "none"
    assert word(relu, Grid(0.1, 2)) == "relu"
    assert word(relu, None) == "relu"
    assert word(relu6, Grid(6 / 255, 0)) == "none"
    assert word(relu6, Grid(6.2 / 255, 0)) == "hardtanh"


def arrangements(x: torch.Tensor) -> list[torch.Tensor]:
    """The same numbers in every order of memory."""
    found = []
    for order in itertools.permutations(range(x.ndim)):
        back = [order.index(axis) for axis in range(x.ndim)]
        found.append(x.permute(order).contiguous().permute(back))
    return found


@pytest.mark.parametrize("input", [SIGNED, POSITIVE], ids=["signed", "positive"])
def test_any_layout_in_memory_gives_the_same_numbers(input: Grid) -> None:
    torch.manual_seed(0)
    conv = fill(Int8Conv(6, 8, [3, 3], [1, 1], [1, 1], [1, 1], 2, True, input.config(), SIGNED.config()))
    sums = fill(Int8Conv(6, 6, [1, 1], [1, 1], [0, 0], [1, 1], 1, True, input.config(), SIGNED.config(), None,
                         POSITIVE.config(), True))  # fmt: skip
    linear = fill(Int8Linear(5, 7, True, input.config(), SIGNED.config()))
    pool = Int8MaxPool([3, 2], [2, 1], [1, 0], [1, 2], True)
    x, other = integers(2, 6, 7, 5), integers(2, 6, 7, 5)
    calls: list[Callable[[torch.Tensor], torch.Tensor]] = [
        conv, linear, pool, lambda t: sums(t, other.clone()), lambda t: sums(x, t.clone()),
        lambda t: Int8Add(input.config(), SIGNED.config(), SIGNED.config())(t, other),
        lambda t: Int8Add(input.config(), SIGNED.config(), SIGNED.config())(other, t),
    ]  # fmt: skip
    for call in calls:
        expected = call(x)
        assert all(torch.equal(call(twin), expected) for twin in arrangements(x))
    numbers = torch.randn(2, 6, 7, 5)
    quantize = Quantize(input.config())
    assert all(torch.equal(quantize(twin), quantize(numbers)) for twin in arrangements(numbers))
    slices = integers(2, 12, 9, 5).contiguous(memory_format=torch.channels_last)[:, 3:9, 1:8]
    assert torch.equal(conv(slices), conv(slices.contiguous()))


@given(
    dims=st.integers(1, 3), kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=st.integers(0, 2),
    dilation=st.integers(1, 2), ceil_mode=st.booleans(), size=st.integers(7, 11),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_max_pooling_equals_pytorchs(
    dims: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool, size: int
) -> None:
    padding = min(padding, kernel // 2)
    x = integers(2, 3, *[size + index for index in range(dims)])
    pool = Int8MaxPool([kernel] * dims, [stride] * dims, [padding] * dims, [dilation] * dims, ceil_mode)
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
    expected = function(x.float(), kernel, stride, padding, dilation, ceil_mode)
    assert torch.equal(pool(x).float(), expected)


@pytest.mark.parametrize(
    ("operation", "dimensions", "arguments", "function"),
    [
        ("adaptive_avg_pool", 2, {"output_size": 1}, lambda x: F.adaptive_avg_pool2d(x, 1)),
        ("adaptive_avg_pool", 2, {"output_size": (3, 2)}, lambda x: F.adaptive_avg_pool2d(x, (3, 2))),
        ("avg_pool", 2, {"kernel_size": 3, "stride": 2, "padding": 1}, lambda x: F.avg_pool2d(x, 3, 2, 1)),
        ("mean", 0, {"dim": [2, 3], "keepdim": True}, lambda x: x.mean([2, 3], keepdim=True)),
        ("mean", 0, {"dim": -1}, lambda x: x.mean(-1)),
    ],
)
def test_averages_equal_those_of_the_real_numbers(
    operation: str, dimensions: int, arguments: dict[str, Any], function: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x, output = integers(2, 5, 9, 7), Grid(0.015625, 120)
    pool = Int8AvgPool(SIGNED.config(), output.config(), operation, dimensions, arguments)
    expected = function(oracle.from_grid(x, SIGNED).float())
    pair = torch.fake_quantize_per_tensor_affine(expected, *output.config())
    assert torch.equal(Dequantize(output.config())(pool(x)), pair)
    again = Int8AvgPool.from_config(pool.config())
    assert torch.equal(again(x), pool(x))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(4, 24), (2, 5, 24), (2, 6, 5, 7), (2, 3, 4, 5, 6)])
def test_sums_and_products_equal_those_of_the_real_numbers(relu: bool, shape: tuple[int, ...]) -> None:
    left, right, output = Grid(0.03125, 128), Grid(0.01171875, 90), Grid(0.046875, 60)
    a, b = integers(*shape), integers(*shape)
    real_a, real_b = oracle.from_grid(a, left).float(), oracle.from_grid(b, right).float()
    cases: list[tuple[Kernel, torch.Tensor, torch.Tensor]] = [
        (Int8Add(left.config(), right.config(), output.config(), relu), b, real_a + real_b),
        (Int8Mul(left.config(), right.config(), output.config(), relu), b, real_a * real_b),
        (Int8Mul(left.config(), None, output.config(), relu), real_b[:, :1], real_a * real_b[:, :1]),
        (Int8Add(left.config(), right.config(), output.config(), relu), b[:, :1], real_a + real_b[:, :1]),
    ]
    for module, other, exact in cases:
        expected = torch.fake_quantize_per_tensor_affine(exact.relu() if relu else exact, *output.config())
        assert torch.equal(Dequantize(output.config())(module(a, other)), expected)
        assert torch.equal(type(module).from_config(module.config())(a, other), module(a, other))
        assert not list(module.buffers())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(4, 24), (2, 24, 5), (2, 6, 5, 7), (2, 3, 4, 5, 6)])
def test_an_affine_layer_equals_that_of_the_real_numbers(relu: bool, shape: tuple[int, ...]) -> None:
    input, output = Grid(0.03125, 128), Grid(0.046875, 60)
    layer, x = Int8Affine(shape[1], input.config(), output.config(), relu), integers(*shape)
    layer.scale.copy_(torch.randn(shape[1]))
    layer.shift.copy_(torch.randn(shape[1]))
    column = (-1, *[1] * (len(shape) - 2))
    exact = oracle.from_grid(x, input) * layer.scale.double().view(column) + layer.shift.double().view(column)
    found = layer(x)
    expected = ((exact.relu() if relu else exact) / output.scale).round().add(output.zero_point).clamp(0, 255)
    assert found.dtype == torch.uint8
    assert (found - expected).abs().max() <= 1
    assert (found != expected).double().mean() < 0.01  # between two integers
    again = Int8Affine.from_config(layer.config())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), found)


@given(scale=st.floats(1e-6, 1e3), zero_point=st.integers(0, 255), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_quantisation_equals_the_pair_bit_for_bit(scale: float, zero_point: int, seed: int) -> None:
    torch.manual_seed(seed)
    scale = float(torch.tensor(scale))
    grid = Grid(scale, zero_point).config()
    x = torch.cat([torch.randn(300) * scale * 200, (torch.arange(-300, 300) + 0.5) * scale])
    found = Dequantize(grid)(Quantize(grid)(x))
    assert torch.equal(found, torch.fake_quantize_per_tensor_affine(x, *grid))


def small_layer() -> Int8Conv:
    torch.manual_seed(0)
    layer: Int8Conv = fill(Int8Conv(4, 6, [3, 3], [1, 1], [1, 1], [1, 1], 1, True, SIGNED.config(), POSITIVE.config()))
    return layer


def test_copies_pickles_and_state_dicts_carry_plain_numbers_only() -> None:
    layer, x = small_layer(), integers(2, 4, 5, 5)
    expected = layer(x)  # packs the weight
    state = layer.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "weight": torch.int8, "weight_scale": torch.float32, "bias": torch.float32,
        "input_grid": torch.float64, "output_grid": torch.float64,
    }  # fmt: skip
    rebuilt = Int8Conv.from_config(layer.config())
    rebuilt.load_state_dict(state)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), rebuilt):
        assert torch.equal(twin(x), expected)
    assert not list(layer.parameters())


def test_new_numbers_take_effect_after_the_first_call() -> None:
    layer, x = small_layer(), integers(2, 4, 5, 5)
    before = layer(x)
    other = small_layer()
    other.weight.neg_()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), before)
    with torch.no_grad():
        layer.weight.neg_()
    layer.repack()
    assert torch.equal(layer(x), before)
    assert layer.half().weight_scale.dtype == torch.float32  # an 8-bit layer has nothing to halve
    assert torch.equal(layer(x), before)


def test_batch_sizes_and_image_sizes_change_freely() -> None:
    layer = small_layer()
    for batch, size in ((1, 5), (3, 9), (8, 4), (1, 5), (17, 6)):
        x = integers(batch, 4, size, size)
        epilogue = oracle.Epilogue(layer.bias, output=POSITIVE)
        agree(layer(x), oracle.convolution(x, SIGNED, layer.weight, layer.weight_scale, epilogue, padding=1), POSITIVE)


def test_fake_tensors_pass_before_and_after_packing() -> None:
    layer = small_layer()
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            found = layer(torch.empty(3, 4, 7, 8, dtype=torch.uint8))
            assert (found.shape, found.dtype) == ((3, 6, 7, 8), torch.uint8)
        layer(integers(1, 4, 5, 5))
        assert type(layer(integers(1, 4, 5, 5))) is torch.Tensor


def test_without_kernels_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = integers(2, 4, 5, 5)
    expected = small_layer()(x)
    for machine in ("plain", "avx2"):  # the weights are beyond 64, so that kernels without VNNI cannot be used
        monkeypatch.setenv(VARIABLE, machine)
        layer = small_layer()
        assert torch.equal(layer(x), expected)
        assert layer._run is None
    layer = fill(small_layer(), largest=64)
    layer(x)
    assert layer._run is not None
    monkeypatch.setenv(VARIABLE, "abacus")
    with pytest.raises(OptionError, match="FXCOMPRESS_CPU must be one of"):
        small_layer()(x)


SATURATION = """
import torch
from fxcompress.emit.cpu_int8 import Int8Conv
from fxcompress.quant.cpu import cpu_features
assert not cpu_features().vnni
for largest in (127, 64):
    layer = Int8Conv(32, 8, [3, 3], [1, 1], [1, 1], [1, 1], 1, False, [0.5, 0, 0, 255])
    layer.weight.fill_(largest)
    x = torch.full((1, 32, 6, 6), 255, dtype=torch.uint8)
    assert torch.equal(layer(x), layer._in_floats(x)), largest
    kernel = layer._with_kernel(x)(x)
    print(largest, bool(torch.equal(kernel, layer._in_floats(x))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="oneDNN's limit of instruction sets is read when a process starts")
def test_kernels_without_vnni_saturate_and_are_avoided() -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", SATURATION]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["127", "False", "64", "True"]


def test_every_module_is_listed_and_described_by_plain_values() -> None:
    modules = [
        small_layer(), Int8Linear(2, 3, False, SIGNED.config(), None, ("gelu", "none"), "float", True),
        Quantize(SIGNED.config()), Dequantize(SIGNED.config()), Int8MaxPool([2, 2], [2, 2], [0, 0], [1, 1], False),
        Int8Add(SIGNED.config(), POSITIVE.config(), SIGNED.config(), True),
        Int8Mul(SIGNED.config(), None, SIGNED.config()), Int8Affine(3, SIGNED.config(), POSITIVE.config(), True),
        Int8AvgPool(SIGNED.config(), POSITIVE.config(), "mean", 0, {"dim": [2, 3]}), QuantizeRows(0, 255),
        Int8DynamicLinear(2, 3, True), Int8WeightOnlyLinear(3, 2, False, SIGNED.config(), ("silu",)),
        Int8Embedding(5, 2), Int8Attention(SIGNED.config(), SIGNED.config(), SIGNED.config(), None, 0.5, True, True),
    ]  # fmt: skip
    assert {type(module).__name__ for module in modules} == set(MODULES)
    for module in modules:
        again = type(module).from_config(module.config())
        assert again.config() == module.config()
        assert str(again) == str(module)
    with pytest.raises(OptionError, match="no activation 'sin'"):
        Int8Linear(2, 2, False, SIGNED.config(), None, ("sin",))


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        ("relu", {}, ("clamp", 0.0, None)),
        ("relu6", {}, ("clamp", 0.0, 6.0)),
        ("hardtanh", {"min_val": -2, "max_val": 2.0}, ("clamp", -2.0, 2.0)),
        ("clamp", {"min": None, "max": 1}, ("clamp", None, 1.0)),
        ("clamp", {"min": torch.tensor(0.0), "max": 1}, None),
        ("gelu", {"approximate": "tanh"}, ("gelu", "tanh")),
        ("leaky_relu", {"negative_slope": 0.2}, ("leaky_relu", 0.2)),
        ("silu", {}, ("silu",)),
        ("softmax", {}, None),
    ],
)
def test_activations_are_recognised(kind: str, arguments: dict[str, Any], expected: tuple[Any, ...] | None) -> None:
    assert activation_of(kind, arguments) == expected
