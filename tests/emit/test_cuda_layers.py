"""The layers of graphs for GPUs against exact arithmetic: by Triton's interpreter, or on the GPU if there is one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxcompress.emit.cuda import device, launch
from fxcompress.emit.cuda.layers import CudaConv, CudaLayer, CudaLinear, Tiled, is_two_of_four
from fxcompress.errors import OptionError
from fxcompress.quant import oracle
from fxcompress.quant.spec import Grid

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("gpu_kernels"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),  # infinity is meant
]

SIGNED, POSITIVE = Grid(0.03125, 128), Grid(0.0234375, 0)
OUTPUTS = [None, Grid(0.0625, 0), Grid(0.046875, 120), Grid(0.05, 130, 10, 240)]
CHOSEN: dict[str, tuple[tuple[Any, ...] | None, Callable[[torch.Tensor], torch.Tensor] | None]] = {
    "none": (None, None),
    "relu": (("clamp", 0.0, None), F.relu),
    "relu6": (("clamp", 0.0, 6.0), F.relu6),
    "hardswish": (("hardswish",), F.hardswish),
    "silu": (("silu",), F.silu),
    "gelu": (("gelu", "none"), F.gelu),
    "gelu_tanh": (("gelu", "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "leaky_relu": (("leaky_relu", 0.1), lambda x: F.leaky_relu(x, 0.1)),
    "tanh": (("tanh",), torch.tanh),
    "sigmoid": (("sigmoid",), torch.sigmoid),
    "hardsigmoid": (("hardsigmoid",), F.hardsigmoid),
}
HOME = "cuda" if torch.cuda.is_available() else "cpu"
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def integers(*shape: int) -> torch.Tensor:
    """Numbers on a grid, as grids have them: 0..255."""
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def signed(q: torch.Tensor) -> torch.Tensor:
    """The same as GPUs have them, on the device."""
    return (q.int() - 128).to(torch.int8).to(HOME)


def unsigned(q: torch.Tensor) -> torch.Tensor:
    return (q.cpu().int() + 128).to(torch.uint8)


def config(grid: Grid | str | None) -> Any:
    return grid.config() if isinstance(grid, Grid) else grid


def fill(layer: CudaLayer) -> Any:
    """Random int8 weights; scales and biases on coarse grids, as the passes leave them."""
    assert layer.input is not None
    count = len(layer.weight)
    weight = torch.randint(-127, 128, layer.weight.shape)
    scale = torch.tensor([0.0078125, 0.005859375, 0.0048828125])[torch.arange(count) % 3]
    step = scale * layer.input.scale
    layer.fill(weight, (torch.randn(count) / step).round() * step, scale)
    return layer.to(HOME)


def expected_of(
    plain: torch.Tensor, addend: torch.Tensor | None, residual: Grid | str | None, activation: str, output: Grid | None
) -> torch.Tensor:
    result = plain
    if addend is not None:
        result = result + (oracle.from_grid(addend, residual) if isinstance(residual, Grid) else addend)
    function = CHOSEN[activation][1]
    if function is not None:
        result = function(result)
    return result if output is None else oracle.to_grid(result, output)


def agree(found: torch.Tensor, expected: torch.Tensor, output: Grid | None) -> None:
    """Equal but for sums on the edge between two integers; real numbers are rounded to 16 bits."""
    assert found.shape == expected.shape
    if output is None:
        assert found.dtype == torch.float16
        assert (found.cpu().double() - expected).abs().max() <= 1e-3 * expected.abs().max().clamp(min=1)
        return
    gap = (unsigned(found).int() - expected.int()).abs()
    assert gap.max() <= 1
    assert (gap > 0).float().mean() <= 0.02


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes and numbers of a convolution whose kernel fits its input."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 8]))
    single = groups == 8
    return {
        "inputs": groups * (1 if single else draw(st.sampled_from([3, 5, 16, 24, 40]))),
        "outputs": groups * (1 if single else draw(st.integers(1, 9))),
        "groups": groups,
        "size": draw(st.integers(5, 6)),
        "batch": draw(st.integers(1, 2)),
        "kernel": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "input": Grid(0.03125, draw(st.sampled_from([0, 6, 128, 254]))),
        "output": draw(st.sampled_from(OUTPUTS)),
        "activation": draw(st.sampled_from(list(CHOSEN))),
        "residual": draw(st.sampled_from([None, None, SIGNED, POSITIVE, "float"])),
        "splits": draw(st.sampled_from([1, 1, 2, 3])),
        "border": draw(st.sampled_from([launch.LOADED, launch.TABLE])),
        "seed": draw(st.integers(0, 1000)),
    }


@given(case=convolutions())
@settings(SLOW, max_examples=40)
def test_convolutions_equal_integer_arithmetic(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    residual, output = case["residual"], case["output"]
    if output is None and isinstance(residual, Grid):
        residual = "float"
    kernel, stride, padding, dilation = ([case[name]] * 2 for name in ("kernel", "stride", "padding", "dilation"))
    layer = fill(
        CudaConv(
            case["inputs"], case["outputs"], kernel, stride, padding, dilation, case["groups"], case["bias"],
            input=case["input"].config(), output=config(output), activation=CHOSEN[case["activation"]][0],
            residual=config(residual),
        )
    )  # fmt: skip
    tile = launch.Blocks(32, 16, 32, 4, 2, case["splits"], case["border"])
    x = integers(case["batch"], case["inputs"], case["size"], case["size"])
    geometry = (case["stride"], case["padding"], case["dilation"], case["groups"])
    held = layer.bias.cpu() if layer.bias is not None else None
    plain = oracle.convolution(
        x, case["input"], layer.weight.cpu(), layer.weight_scale.cpu(), oracle.Epilogue(held), *geometry
    )
    addend = None if residual is None else torch.randn(plain.shape) if residual == "float" else integers(*plain.shape)
    expected = expected_of(plain, None if addend is None else addend.clone(), residual, case["activation"], output)
    second = None if addend is None else signed(addend) if isinstance(residual, Grid) else addend.half().to(HOME)
    agree(Tiled(layer, layer._pack(), tile)(signed(x), second), expected, output)
    agree(layer._in_floats(signed(x), second), expected, output)


@pytest.mark.parametrize("activation", CHOSEN)
@pytest.mark.parametrize("output", OUTPUTS[:3], ids=str)
@pytest.mark.parametrize("residual", [None, SIGNED, "float"], ids=["alone", "sum", "float sum"])
def test_linear_layers_equal_integer_arithmetic(
    activation: str, output: Grid | None, residual: Grid | str | None
) -> None:
    torch.manual_seed(0)
    if output is None and isinstance(residual, Grid):
        residual = "float"
    layer = fill(
        CudaLinear(33, 17, True, input=SIGNED.config(), output=config(output), activation=CHOSEN[activation][0],
                   residual=config(residual))
    )  # fmt: skip
    for shape in ((4,), (2, 3), (1, 2, 2)):
        x = integers(*shape, 33)
        plain = oracle.linear(
            x, SIGNED, layer.weight.cpu(), layer.weight_scale.cpu(), oracle.Epilogue(layer.bias.cpu())
        )
        addend = (
            None if residual is None else torch.randn(plain.shape) if residual == "float" else integers(*plain.shape)
        )
        second = None if addend is None else signed(addend) if isinstance(residual, Grid) else addend.half().to(HOME)
        agree(layer(signed(x), second), expected_of(plain, addend, residual, activation, output), output)


@pytest.mark.parametrize("real", ["fp16", "bf16"])
@pytest.mark.parametrize("residual", [None, "float"], ids=["alone", "sum"])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_real_convolutions_equal_those_of_float64(real: str, residual: str | None, groups: int) -> None:
    torch.manual_seed(0)
    layer = CudaConv(
        8, 8, [3, 3], [2, 1], [1, 1], [1, 1], groups, True, real, real, activation=("silu",), residual=residual
    )
    layer.fill(torch.randn(layer.weight.shape) / 4, torch.randn(8))
    layer.to(HOME)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[real]
    x, addend = torch.randn(2, 8, 5, 5).to(dtype), torch.randn(2, 8, 3, 5).to(dtype)
    exact = F.conv2d(x.double(), layer.weight.cpu().double(), layer.bias.cpu().double(), (2, 1), 1, 1, groups)  # type: ignore[union-attr]
    exact = F.silu(exact + addend.double() if residual else exact)
    second = addend.to(HOME) if residual else None
    step = {"fp16": 2e-3, "bf16": 2e-2}[real]
    runs: list[Callable[..., torch.Tensor]]
    runs = [layer._in_floats] if real == "bf16" and HOME == "cpu" else [layer, layer._in_floats]
    for run in runs:  # the interpreter takes the bits of bf16 for integers in a matrix product
        found = run(x.to(HOME), second)
        assert found.dtype == dtype
        assert (found.cpu().double() - exact).abs().max() < step * exact.abs().max()


def test_layers_in_8_bit_floating_point() -> None:
    torch.manual_seed(0)
    if HOME == "cuda" and not device.has_fp8(torch.empty(0, device=HOME)):
        pytest.skip("this GPU has no 8-bit floating point")
    linear = CudaLinear(48, 32, True, "fp8", "fp16", activation=("clamp", 0.0, None), residual="float")
    conv = CudaConv(48, 32, [1, 1], [1, 1], [0, 0], [1, 1], 1, True, "fp8", "fp16", activation=("clamp", 0.0, None),
                    residual="float")  # fmt: skip
    weight, bias = torch.randn(32, 48) / 7, torch.randn(32)
    linear.fill(weight, bias)
    conv.fill(weight[:, :, None, None], bias)
    x, addend = torch.randn(2, 3, 48).half(), torch.randn(2, 3, 32).half()
    exact = F.relu(F.linear(x.double(), weight.double(), bias.double()) + addend.double())
    linear.to(HOME)
    conv.to(HOME)
    images = conv(x.to(HOME).transpose(1, 2)[..., None], addend.to(HOME).transpose(1, 2)[..., None])
    results = [linear(x.to(HOME), addend.to(HOME)), images[..., 0].transpose(1, 2)]
    for found in results:
        noise = (found.cpu().double() - exact).square().sum() / exact.square().sum()
        assert noise < 3e-3
    assert torch.equal(results[0], results[1])


def test_choices_are_found_by_shape_and_layers_keep_their_dtypes() -> None:
    layer = fill(CudaLinear(32, 16, True, input=SIGNED.config(), output=POSITIVE.config()))
    x = signed(integers(3, 32))
    before = layer(x)
    assert layer.choice(x).name in layer._ways(x)
    for change in (layer.half, layer.double, layer.repack):
        change()
        assert (layer.weight.dtype, layer.weight_scale.dtype, layer.bias.dtype) == (
            torch.int8, torch.float32, torch.float32,
        )  # fmt: skip
        assert torch.equal(layer(x), before)
    layer.weight.neg_()
    layer.repack()
    assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("build", [
    lambda: CudaConv(6, 9, [3], [2], [1], [1], 3, True, input=SIGNED.config(), output=POSITIVE.config()),
    lambda: CudaConv(4, 8, [2, 3], [1, 2], [0, 1], [1, 1], 1, False, input=SIGNED.config()),
    lambda: CudaLinear(5, 7, True, input=SIGNED.config(), activation=("silu",)),
])  # fmt: skip
def test_copies_pickles_and_configs_give_the_same_layer(build: Callable[[], CudaLayer]) -> None:
    torch.manual_seed(0)
    layer = fill(build())
    shape = {1: (2, 6, 9), 2: (2, 4, 5, 7), 0: (3, 5)}[len(getattr(layer, "kernel_size", ()))]
    x = signed(integers(*shape))
    expected = layer(x)
    again = type(layer).from_config(layer.config()).to(HOME)
    again.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), again):
        assert torch.equal(twin(x), expected)


def test_nonsense_is_refused() -> None:
    with pytest.raises(OptionError, match="cannot compute in 'int4'"):
        CudaLinear(1, 1, False, "int4")
    with pytest.raises(OptionError, match="cannot compute in 'int8'"):
        CudaLinear(1, 1, False, "int8")
    with pytest.raises(OptionError, match="no activation 'mish'"):
        CudaLinear(1, 1, False, "fp16", activation=("mish",))


def test_two_of_four() -> None:
    assert is_two_of_four(torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 3]]))
    assert not is_two_of_four(torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 0]]))
    assert not is_two_of_four(torch.zeros(2, 6))


@given(
    window=st.builds(
        launch.Window, st.sampled_from([1, 3, 8, 24, 64, 512]), st.sampled_from([1, 8, 64, 1000]),
        st.sampled_from([1, 1, 4]), st.sampled_from([(1, 1), (3, 3), (7, 7)]),
    ),
    pixels=st.sampled_from([1, 49, 197, 100_000, 3_000_000]),
    integers=st.booleans(),
    zero=st.sampled_from([0, -128]),
)  # fmt: skip
def test_block_sizes_fit_the_layer(window: launch.Window, pixels: int, integers: bool, zero: int) -> None:
    found = launch.candidates(window, pixels, integers, zero)
    assert found
    assert len(found) == len({str(blocks) for blocks in found}) <= 16
    assert found[0].pixels * found[0].outputs <= 128 * 128
    for blocks in found:
        assert blocks.pixels & (blocks.pixels - 1) == blocks.outputs & (blocks.outputs - 1) == 0
        width = 1 if integers else 2
        assert blocks.stages * (blocks.pixels + blocks.outputs) * blocks.channels * width <= 220_000
        if not window.depthwise:
            assert min(blocks.pixels, blocks.outputs) >= 16
            assert blocks.channels * width >= 32
