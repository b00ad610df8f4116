"""What stands between the layers of graphs for GPUs: by Triton's interpreter, or on the GPU if there is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxcompress.emit.cuda import device, pointwise_launch
from fxcompress.emit.cuda.layers import bytes_of, real_of
from fxcompress.emit.cuda.pointwise import (
    MODULES,
    CudaAdd,
    CudaAvgPool,
    CudaEnter,
    CudaLayerNorm,
    CudaLeave,
    CudaMaxPool,
    CudaMul,
)
from fxcompress.errors import OptionError
from fxcompress.quant.spec import Grid

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("gpu_kernels")

LEFT, RIGHT, OUTPUT = Grid(0.03125, 128), Grid(0.01171875, 90), Grid(0.046875, 60)
HOME = "cuda" if torch.cuda.is_available() else "cpu"


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=HOME)


def last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@pytest.mark.parametrize("grid", [None, LEFT, Grid(0.05, 30, 0, 127)], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 7, 5), (1, 1, 4, 4), (2, 3, 4, 5, 2), (4, 1024)])
def test_numbers_come_in_and_out(grid: Grid | None, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, device=HOME) * 3
    found = CudaEnter(None if grid is None else grid.config())(x)
    assert torch.equal(found, x.half() if grid is None else bytes_of(x, grid))
    assert found.is_contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)
    views = [x.transpose(-1, -2).contiguous().transpose(-1, -2), x[..., ::2]] if len(shape) > 1 else []
    for view in views:
        result = CudaEnter(None if grid is None else grid.config())(view)
        assert torch.equal(result, view.half() if grid is None else bytes_of(view, grid))
    if grid is not None:
        assert torch.equal(CudaLeave(grid.config())(found), real_of(found, grid).half())
        pair = torch.fake_quantize_per_tensor_affine(x.cpu(), *grid.config())
        assert torch.equal(real_of(found, grid).cpu(), pair)


@pytest.mark.parametrize("grid", [None, LEFT], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_images_get_further_channels_of_zeros(grid: Grid | None, turned: bool) -> None:
    x = torch.randn(2, 3, 5, 7, device=HOME)
    x = last(x) if turned else x
    found = CudaEnter(None if grid is None else grid.config(), "fp16", 4)(x)
    wide = F.pad(x, (0, 0, 0, 0, 0, 1))
    assert torch.equal(found, wide.half() if grid is None else bytes_of(wide, grid))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_large_and_infinite_numbers_saturate() -> None:
    x = torch.tensor([math.inf, -math.inf, 1e30, -1e30, 1e9, 0.0], device=HOME)
    assert CudaEnter(LEFT.config())(x).tolist() == [127, -128, 127, -128, 127, 0]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("output", [OUTPUT, None], ids=str)
@pytest.mark.parametrize("shape", [(4, 24), (2, 5, 24), (2, 6, 5, 7), (2, 3, 4, 5, 6)])
def test_sums_and_products_equal_those_of_the_real_numbers(
    relu: bool, output: Grid | None, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    a, b = last(integers(*shape)), last(integers(*shape))
    real_a, real_b = real_of(a, LEFT), real_of(b, RIGHT)
    first, second, wanted_grid = LEFT.config(), RIGHT.config(), None if output is None else output.config()
    gate = torch.rand(shape[0], shape[1], *[1] * (len(shape) - 2), device=HOME).half()
    cases = [
        (CudaAdd(first, second, wanted_grid, relu), a, b, real_a + real_b),
        (CudaMul(first, second, wanted_grid, relu), a, b, real_a * real_b),
        (CudaMul(first, None, wanted_grid, relu), a, gate, real_a * gate.float()),
        (CudaMul(None, first, wanted_grid, relu), gate, a, real_a * gate.float()),
        (CudaAdd(first, second, wanted_grid, relu), a, b[:, :1], real_a + real_b[:, :1]),
        (CudaAdd(first, second, wanted_grid, relu), a[:1], b, real_a[:1] + real_b),
        (
            CudaAdd(first, second, wanted_grid, relu),
            a.transpose(0, -1).contiguous().transpose(0, -1),
            b,
            real_a + real_b,
        ),
    ]
    for module, left, right, exact in cases:
        exact = exact.relu() if relu else exact
        found = module(left, right)
        wanted = exact.half() if output is None else bytes_of(exact, output)
        assert torch.equal(found, wanted)


@given(
    kernel=st.integers(1, 3), stride=st.integers(1, 3), padding=st.integers(0, 1), dilation=st.integers(1, 2),
    ceil_mode=st.booleans(), size=st.integers(6, 8), real=st.booleans(),
)  # fmt: skip
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_max_pooling_equals_pytorchs(
    kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool, size: int, real: bool
) -> None:
    padding = min(padding, kernel // 2)
    x = integers(2, 5, size, size + 1)
    pool = CudaMaxPool([kernel] * 2, [stride] * 2, [padding] * 2, [dilation] * 2, ceil_mode)
    expected = F.max_pool2d(x.float(), kernel, stride, padding, dilation, ceil_mode)
    found = pool(last(x.half() if real else x))
    assert found.dtype == (torch.float16 if real else torch.int8)
    assert torch.equal(found.float(), expected)


@pytest.mark.parametrize("shape", [(2, 20, 3, 5), (1, 70, 30, 20), (3, 7, 1, 1)])
@pytest.mark.parametrize("grids", [(LEFT, OUTPUT), (LEFT, None), (None, None)], ids=["8 to 8", "8 to 16", "16 to 16"])
def test_averages_over_whole_images(shape: tuple[int, ...], grids: tuple[Grid | None, Grid | None]) -> None:
    source, output = grids
    x = last(integers(*shape))
    x = x if source is not None else (x.half() / 64)
    exact = (x.double() if source is None else real_of(x, source).double()).mean((2, 3), keepdim=True).float()
    given, made = (None if grid is None else grid.config() for grid in grids)
    cases: list[tuple[str, int, dict[str, Any], bool]] = [
        ("adaptive_avg_pool", 2, {"output_size": 1}, True),
        ("adaptive_avg_pool", 2, {"output_size": (1, 1)}, True),
        ("mean", 0, {"dim": [2, 3], "keepdim": True}, True),
        ("mean", 0, {"dim": (-1, -2)}, False),
    ]
    for operation, dimensions, arguments, keeps in cases:
        pool = CudaAvgPool(given, made, operation, dimensions, arguments)
        for _ in range(2):  # counters are left as they were found
            found = pool(x)
            wanted = exact if keeps else exact.flatten(1)
            assert found.shape == wanted.shape
            step = 1 if output is not None else 2e-3 * float(exact.abs().max())
            gap = (found.float() - (bytes_of(wanted, output).float() if output is not None else wanted)).abs().max()
            assert gap <= step


def test_other_averages_are_those_of_the_real_numbers() -> None:
    x = integers(2, 5, 9, 7)
    cases: list[tuple[str, int, dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = [
        ("avg_pool", 2, {"kernel_size": 3, "stride": 2, "padding": 1}, lambda v: F.avg_pool2d(v, 3, 2, 1)),
        ("adaptive_avg_pool", 2, {"output_size": (3, 2)}, lambda v: F.adaptive_avg_pool2d(v, (3, 2))),
        ("mean", 0, {"dim": -1}, lambda v: v.mean(-1)),
    ]
    for operation, dimensions, arguments, function in cases:
        pool = CudaAvgPool(LEFT.config(), OUTPUT.config(), operation, dimensions, arguments)
        assert torch.equal(pool(x), bytes_of(function(real_of(x, LEFT)), OUTPUT))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("output", [None, OUTPUT], ids=str)
@pytest.mark.parametrize("shape", [(3, 24), (2, 3, 100), (1, 2, 3, 7)])
def test_layer_norm_equals_that_of_float64(affine: bool, output: Grid | None, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = CudaLayerNorm([shape[-1]], 1e-6, affine, affine, None if output is None else output.config())
    if norm.weight is not None and norm.bias is not None:
        norm.weight.copy_(torch.rand(shape[-1]) + 0.5)
        norm.bias.copy_(torch.randn(shape[-1]))
    norm.to(HOME)
    x = torch.randn(shape, device=HOME).half() * 3 + 1
    weight, bias = ((None, None) if norm.weight is None or norm.bias is None else
                    (norm.weight.double(), norm.bias.double()))  # fmt: skip
    exact = F.layer_norm(x.double(), [shape[-1]], weight, bias, 1e-6)
    found = norm(x)
    if output is None:
        assert found.dtype == torch.float16
        assert (found.double() - exact).abs().max() < 4e-3
    else:
        assert (found.int() - bytes_of(exact.float(), output).int()).abs().max() <= 1


def test_rows_in_8_bit_floating_point() -> None:
    torch.manual_seed(0)
    x = last(torch.randn(2, 40, 3, 3, device=HOME).half())
    if HOME == "cuda" and not device.has_fp8(x):
        pytest.skip("this GPU has no 8-bit floating point")
    rounded, scales = pointwise_launch.scaled_rows(x, 448.0)
    rows = rounded.float().permute(0, 2, 3, 1).reshape(-1, 40) * scales[:, None]
    exact = x.float().permute(0, 2, 3, 1).reshape(-1, 40)
    assert (rows - exact).abs().max() <= exact.abs().max() / 7  # the interpreter rounds towards zero
    largest = rounded.float().permute(0, 2, 3, 1).reshape(-1, 40).abs().amax(1)
    assert torch.equal(largest, torch.full_like(largest, 448.0))


@pytest.mark.parametrize("name", ["CudaEnter", "CudaLeave"])
def test_configs_round_trip(name: str) -> None:
    module = MODULES[name](LEFT.config(), "bf16")
    again = MODULES[name].from_config(module.config())
    assert again.config() == module.config()
    x = integers(3, 4)
    assert torch.equal(again(x), module(x))
    with pytest.raises(OptionError, match="real must be one of 'fp16', 'bf16', not 'fp64'"):
        MODULES[name](LEFT.config(), "fp64")
