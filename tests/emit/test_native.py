"""Our own kernels: the same numbers as the graph that they stand for, over shapes, layouts, threads and copies."""

from __future__ import annotations

import copy
import ctypes
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils._pytree import tree_leaves

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.emit.compact_module import CompactModule
from fxcompress.emit.cpu_int8 import (
    Dequantize,
    Int8Add,
    Int8Affine,
    Int8AvgPool,
    Int8Conv,
    Int8Linear,
    Int8MaxPool,
    Int8Mul,
    Quantize,
)
from fxcompress.emit.native import executor, library, memory, packing, steps
from fxcompress.emit.native.memory import Buffer, arrange
from fxcompress.errors import InputError, OptionError
from fxcompress.quant.spec import Grid
from tests.kernels import NEEDED, POSITIVE, SIGNED, assert_same, by_graph, chain, filled, numbers, planned
from tests.strategies import Program, example, programs

pytestmark = [
    NEEDED,
    pytest.mark.xdist_group("native"),
]

ACTIVATIONS: list[tuple[Any, ...] | None] = [
    None, ("clamp", 0.0, None), ("clamp", 0.0, 6.0), ("clamp", -1.0, 2.0), ("hardswish",), ("silu",), ("gelu", "none"),
    ("gelu", "tanh"), ("leaky_relu", 0.1), ("tanh",),
]  # fmt: skip
OUTPUTS = [None, Grid(0.0625, 0), Grid(0.046875, 120), Grid(0.05, 130, 10, 240)]


def assert_alike(compact: CompactModule, *inputs: torch.Tensor) -> None:
    """Kernels and graph agree but for numbers between two integers, which either may round to the other side."""
    expected = by_graph(compact, *inputs)
    for _ in range(2):
        noise = (compact(*inputs) - expected).square().mean()
        assert noise == 0 or 10 * torch.log10(expected.square().mean() / noise) >= 35


def python_calls(compact: CompactModule) -> list[str]:
    """Nodes that Python runs."""
    made = compact._native.made
    assert made is not None
    return [part.name for plan in made.plans.values() if plan for part in plan.runs if hasattr(part, "function")]


@st.composite
def convolutions(draw: Any) -> tuple[Int8Conv, list[torch.Tensor]]:
    spatial = draw(st.sampled_from([1, 2, 2, 2]))
    groups = draw(st.sampled_from([1, 1, 2, 4, 5, 13]))
    depthwise = draw(st.booleans())
    per_group = 1 if depthwise else draw(st.integers(1, 21))
    groups = draw(st.integers(2, 150)) if depthwise else groups
    out = groups if depthwise else groups * draw(st.sampled_from([1, 3, 8, 16, 17, 33, 48, 64, 70, 96]))
    kernel = [draw(st.integers(1, 5)) for _ in range(spatial)]
    stride, dilation = ([draw(st.integers(1, 2)) for _ in range(spatial)] for _ in range(2))
    padding = [draw(st.integers(0, 3)) for _ in range(spatial)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sizes = [max(draw(st.integers(1, 12)), r - 2 * p) for r, p in zip(reach, padding, strict=True)]
    output = draw(st.sampled_from(OUTPUTS))
    residual: Any = draw(st.sampled_from([None, None, "float", POSITIVE.config()]))
    if (residual == "float") != (output is None):
        residual = None
    layer = Int8Conv(
        per_group * groups, out, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()),
        input=draw(st.sampled_from([SIGNED, POSITIVE])).config(), output=output and output.config(),
        activation=draw(st.sampled_from(ACTIVATIONS)), residual=residual, overwrite=draw(st.booleans()),
    )  # fmt: skip
    filled(layer, draw(st.integers(0, 99)))
    inputs = [numbers(draw(st.integers(1, 4)), per_group * groups, *sizes, seed=draw(st.integers(0, 99)))]
    if residual is not None:
        shape = layer._result_shape(inputs[0].shape)
        inputs.append(torch.randn(shape) if residual == "float" else numbers(*shape, seed=7))
    return layer, inputs


@given(convolutions(), st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_convolutions_of_every_shape(drawn: tuple[Int8Conv, list[torch.Tensor]], threads: int) -> None:
    layer, inputs = drawn
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(chain(layer, inputs=len(inputs)), *inputs)
    finally:
        torch.set_num_threads(before)


@given(
    st.integers(1, 70), st.integers(1, 150), st.lists(st.integers(1, 5), min_size=0, max_size=3),
    st.sampled_from(ACTIVATIONS), st.sampled_from(OUTPUTS), st.booleans(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_linear_layers(
    features: int, out: int, sizes: list[int], activation: Any, output: Grid | None, with_residual: bool
) -> None:
    grid = None if output is None else output.config()
    residual: Any = None if not with_residual else "float" if output is None else SIGNED.config()
    layer = Int8Linear(features, out, True, SIGNED.config(), grid, activation, residual)
    inputs = [numbers(*sizes, features)]
    if with_residual:
        inputs.append(torch.randn(*sizes, out) if output is None else numbers(*sizes, out, seed=3))
    assert_same(chain(filled(layer, 1), inputs=len(inputs)), *inputs)


POOLING: list[tuple[nn.Module, tuple[int, ...]]] = [
    (Int8MaxPool([3, 3], [2, 2], [1, 1], [1, 1], False), (2, 70, 9, 8)),
    (Int8MaxPool([2, 2], [2, 2], [0, 0], [1, 1], True), (1, 3, 5, 7)),
    (Int8MaxPool([3, 2], [1, 1], [1, 0], [2, 1], False), (1, 64, 6, 6)),
    (Int8AvgPool(SIGNED.config(), SIGNED.config(), "adaptive_avg_pool", 2, {"output_size": 1}), (3, 40, 7, 5)),
    (Int8AvgPool(SIGNED.config(), POSITIVE.config(), "adaptive_avg_pool", 2, {"output_size": [3, 2]}), (1, 17, 7, 5)),
    (Int8AvgPool(SIGNED.config(), SIGNED.config(), "mean", 0, {"dim": [2, 3], "keepdim": False}), (2, 20, 4, 4)),
    (Int8AvgPool(SIGNED.config(), SIGNED.config(), "avg_pool", 2, {"kernel_size": 3, "stride": 2, "padding": 1}),
     (2, 33, 8, 7)),
    (Int8AvgPool(SIGNED.config(), SIGNED.config(), "avg_pool", 2,
                 {"kernel_size": 3, "stride": 1, "padding": 1, "count_include_pad": False}), (1, 8, 6, 6)),
]  # fmt: skip


@pytest.mark.parametrize(("module", "shape"), POOLING, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling(module: nn.Module, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    compact = chain(module)
    assert_same(compact, numbers(*shape).contiguous(memory_format=layout))
    assert python_calls(compact) == []


@given(st.integers(1, 3), st.integers(1, 600), st.integers(1, 5), st.sampled_from(["same", "gate", "row"]))
@settings(max_examples=40, deadline=None)
def test_sums_and_products(batch: int, channels: int, size: int, shape: str) -> None:
    full = (batch, channels, size, size)
    other = {"same": full, "gate": (batch, channels, 1, 1), "row": (1, channels, 1, 1)}[shape]
    for module in (
        Int8Add(SIGNED.config(), POSITIVE.config(), SIGNED.config(), relu=True),
        Int8Mul(SIGNED.config(), POSITIVE.config(), SIGNED.config()),
        Int8Mul(SIGNED.config(), None, POSITIVE.config()),
    ):
        right = torch.rand(other) if module.right is None else numbers(*other, seed=1)
        left = numbers(*full).contiguous(memory_format=torch.channels_last)
        assert_same(chain(module, inputs=2), left, right)


@given(st.integers(1, 3), st.integers(1, 200), st.integers(0, 5), st.booleans(), st.booleans(), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_affine_layers(batch: int, channels: int, size: int, relu: bool, turned: bool, threads: int) -> None:
    layer = Int8Affine(channels, SIGNED.config(), POSITIVE.config(), relu)
    layer.scale.copy_(torch.randn(channels))
    layer.shift.copy_(torch.randn(channels))
    x = numbers(batch, channels, size, size + 1) if size else numbers(batch, channels)
    x = x.contiguous(memory_format=torch.channels_last) if turned and size else x
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compact = chain(layer)
        assert_same(compact, x)
    finally:
        torch.set_num_threads(before)
    assert python_calls(compact) == []


@pytest.mark.parametrize("shape", [(2, 3, 17, 33), (1, 70, 4, 4), (5, 11), (2, 3, 40), (1, 1, 8, 8)])
@pytest.mark.parametrize("layout", ["plain", "channels_last", "transposed"])
def test_numbers_in_and_out(shape: tuple[int, ...], layout: str) -> None:
    x = torch.randn(shape) * 3
    if layout == "channels_last" and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert_same(chain(Quantize(SIGNED.config()), Dequantize(SIGNED.config())), x)


class _Forms(fx.Interpreter):
    """Notes shape and dtype of what each node makes."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.found[n.name] = form(value)
        return value


def form(value: Any) -> Any:
    return [(leaf.shape, leaf.dtype) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def forms(compact: CompactModule, *inputs: Any) -> dict[str, Any]:
    noting = _Forms(compact)
    with torch.no_grad():
        noting.run(*inputs)
    return noting.found


def recorded_forms(compact: CompactModule, *inputs: Any) -> dict[str, Any]:
    return {node.name: form(value) for node, value in executor.record(compact, inputs).items()}


@given(programs(max_steps=8), st.sampled_from([1, 3, 5]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_random_models_compute_what_their_graphs_compute(model: Program, batch: int) -> None:
    model, data = model.float(), example(4).float()
    assume(1e-3 < float(model(data).detach().abs().max()) < 1e4)
    compact = fxc.compile(model, "fuse, quantize", data, verify=False, calibration=[data])
    x = example(batch).float()
    assert recorded_forms(compact, x) == forms(compact, x)
    expected = by_graph(compact, x)
    for _ in range(2):
        found = compact(x)
        assert found.shape == expected.shape
        noise = (found - expected).double().square().mean()
        assert noise == 0 or 10 * torch.log10(expected.double().square().mean() / noise) >= 35


class Mixed(nn.Module):
    """Convolutions around something that no kernel knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 8, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = F.relu(self.first(x))
        y = torch.cumsum(y, 1).sin() + y
        return self.second(y), y


@pytest.fixture(scope="module")
def mixed() -> CompactModule:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    return fxc.compile(Mixed().eval(), "fuse, quantize", x, calibration=[x])


def test_what_has_no_kernel_runs_in_python_in_between(mixed: CompactModule) -> None:
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 10 + batch, 12)
        for _ in range(2):
            for found, expected in zip(mixed(x), by_graph(mixed, x), strict=True):
                torch.testing.assert_close(found, expected)
    assert "cumsum" in python_calls(mixed)


def test_results_belong_to_the_caller(mixed: CompactModule) -> None:
    x, other = torch.randn(2, 3, 12, 12), torch.randn(2, 3, 12, 12)
    mixed(x)
    first = mixed(x)
    kept = [tensor.clone() for tensor in first]
    mixed(other)
    assert all(torch.equal(left, right) for left, right in zip(first, kept, strict=True))


def test_a_result_that_is_the_input_is_the_input() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((x, graph.call_module("layer", (x,))))
    root = nn.Module()
    root.layer = Quantize(SIGNED.config())
    compact = CompactModule(root, graph)
    given_ = torch.randn(2, 3, 4, 4)
    for _ in range(2):
        assert compact(given_)[0] is given_


def test_several_threads_get_the_right_answers(mixed: CompactModule) -> None:
    inputs = [torch.randn(1 + index % 3, 3, 12, 12) for index in range(6)]
    expected = [mixed(x) for x in inputs]
    wrong: list[str] = []

    def call(index: int) -> None:
        for _ in range(20):
            for found, right in zip(mixed(inputs[index]), expected[index], strict=True):
                if not torch.equal(found, right):
                    wrong.append(f"input {index}")

    threads = [threading.Thread(target=call, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_ten_thousand_calls_neither_grow_nor_drift() -> None:
    layer = Int8Conv(8, 8, [3, 3], [1, 1], [1, 1], [1, 1], 1, True, SIGNED.config(), SIGNED.config())
    compact = chain(Quantize(SIGNED.config()), filled(layer, 0), Dequantize(SIGNED.config()))
    x = torch.randn(1, 8, 8, 8)
    first = compact(x)
    for _ in range(500):
        compact(x)
    before = _resident()
    for _ in range(10_000):
        found = compact(x)
    assert torch.equal(found, first)
    assert _resident() - before < 4 << 20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_plans_are_kept_for_the_latest_shapes_only(mixed: CompactModule) -> None:
    for size in range(9, 90):
        mixed(torch.randn(1, 3, size, 9))
    made = mixed._native.made
    assert made is not None
    assert len(made.plans) == made.limit


def test_copies_and_files_run_by_kernels_too(mixed: CompactModule, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12, 12)
    expected = mixed(x)
    mixed.save(tmp_path / "mixed.fxc")
    for twin in (copy.deepcopy(mixed), pickle.loads(pickle.dumps(mixed)), fxc.load(tmp_path / "mixed.fxc")):
        for found, right in zip(twin(x), expected, strict=True):
            assert torch.equal(found, right)
        assert planned(twin)


def test_new_numbers_are_seen() -> None:
    layer = filled(Int8Linear(8, 8, True, SIGNED.config()), 0)
    compact, x = chain(layer), numbers(4, 8)
    before = compact(x)
    state = {name: tensor.clone() for name, tensor in compact.state_dict().items()}
    state["layer0.bias"] += 1.0
    compact.load_state_dict(state)
    torch.testing.assert_close(compact(x), before + 1.0)
    compact.layer0.bias.add_(1.0)  # type: ignore[operator,union-attr]
    compact.repack()
    torch.testing.assert_close(compact(x), before + 2.0)
    nn.Sequential(compact).load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
    torch.testing.assert_close(compact(x), before + 1.0)


def test_who_looks_on_sees_the_graph_run(mixed: CompactModule) -> None:
    x = torch.randn(2, 3, 12, 12)
    seen: list[str] = []
    handle = mixed.get_submodule("first").register_forward_hook(lambda *_: seen.append("first"))
    try:
        mixed(x)
    finally:
        handle.remove()
    assert seen == ["first"]
    assert len(fx.symbolic_trace(mixed).graph.nodes) > len(mixed.graph.nodes)  # through the layers' own code


def test_the_graph_can_be_asked_for() -> None:
    x = torch.randn(1, 3, 8, 8)
    compact = fxc.compile(nn.Conv2d(3, 4, 3), "fuse, quantize", x, calibration=[x], executor="graph")
    compact(x)
    assert not planned(compact)
    compact.executor = "auto"
    compact(x)
    assert planned(compact)
    with pytest.raises(OptionError, match="executor must be one of 'auto', 'graph', not 'fast'"):
        compact.executor = "fast"


def test_a_float_graph_has_no_kernels() -> None:
    x = torch.randn(1, 3, 8, 8)
    compact = fxc.compile(nn.Conv2d(3, 4, 3), "fuse", x)
    compact(x).sum().backward()  # trains like any module
    assert not planned(compact)


PROGRAM = """
import torch, fxcompress as fxc
from torch import nn
from fxcompress.emit.native import library
torch.manual_seed(0)
x = torch.randn(1, 3, 8, 8)
compact = fxc.compile(nn.Conv2d(3, 4, 3), "fuse, quantize", x, calibration=[x])
print(float(compact(x).sum()), library.unavailable())
"""


@pytest.mark.parametrize(
    ("settings_", "reason"),
    [
        ({"FXCOMPRESS_NATIVE": "off"}, "FXCOMPRESS_NATIVE=off"),
        ({"FXCOMPRESS_CPU": "avx2"}, "FXCOMPRESS_CPU=avx2"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found"),
        ({"CXX": "false"}, "could not build them"),
        ({"XDG_CACHE_HOME": "/dev/null/nowhere"}, "None"),  # built for this process alone
        ({}, "None"),
    ],
)
def test_without_kernels_the_graph_runs(settings_: dict[str, str], reason: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **settings_}, capture_output=True, text=True, check=True
    )
    value, said = done.stdout.strip().split(" ", 1)
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    compact = fxc.compile(nn.Conv2d(3, 4, 3), "fuse, quantize", x, calibration=[x])
    assert float(value) == pytest.approx(float(compact(x).sum()), rel=0.05 if "CPU" in str(settings_) else 1e-4)
    assert reason in said


def test_a_library_of_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = library.library()
    assert found is not None
    larger = type("Fill", (steps.Step,), {"number": steps.Fill.number, "_fields_": [("op", ctypes.c_int64)]})
    monkeypatch.setattr(steps, "KINDS", (larger,))
    with pytest.raises(OSError, match="another layout of Fill"):
        library.Library(found.path)


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 20)), max_size=25))
def test_buffers_in_use_at_the_same_time_do_not_overlap(drawn: Sequence[tuple[int, int, int]]) -> None:
    buffers = [Buffer(i, "arena", size, min(a, b), max(a, b)) for i, (size, a, b) in enumerate(drawn)]
    offsets, total = arrange(buffers)
    for left in buffers:
        assert offsets[left.index] % memory.ALIGNMENT == 0
        assert offsets[left.index] + left.bytes + memory.SLACK <= total
        for right in buffers[left.index + 1 :]:
            if left.first <= right.last and right.first <= left.last:
                a, b = sorted((left, right), key=lambda one: offsets[one.index])
                assert offsets[a.index] + a.bytes + memory.SLACK <= offsets[b.index]


def test_buffers_of_different_times_share_memory() -> None:
    buffers = [Buffer(i, "arena", 1000, i, i + 1) for i in range(50)]  # a chain: two at a time
    assert arrange(buffers)[1] <= 2 * (1000 + memory.SLACK + memory.ALIGNMENT)


SMALL = """
import sys
import torch
import fxcompress as fxc
compact = fxc.load(sys.argv[1])
print(tuple(compact(torch.randn(2, 3, 14, 13)).shape), compact._native.made is not None)
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


def test_the_first_call_loads_no_compiler_of_pytorch(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 14, 13)
    path = tmp_path / "dense.fxc"
    fxc.compile(Dense("list"), "fuse, quantize", x, calibration=[x]).save(path)
    done = subprocess.run([sys.executable, "-c", SMALL, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["(2, 5, 6, 5) True", "[]"]


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 40))
def test_packed_weights_hold_every_number_once(channels: int, places: int, run: int) -> None:
    weights = torch.randint(1, 127, (1, channels, places, run), dtype=torch.int8)
    packed = packing.convolution(weights)
    assert packed.numel() == packing.rounded_up(channels, 16) * places * packing.rounded_up(run, 4)
    assert torch.equal(packed[packed != 0].sort().values, weights.flatten().sort().values)
    assert packed.data_ptr() % 64 == 0
    assert all(wide <= 4 for wide in packing.blocks(channels))


class Shuffled(nn.Module):
    """A channel shuffle between pieces of a concatenation, as ShuffleNet has it."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.first, self.second = nn.Conv2d(3, 24, 3), nn.Conv2d(12, 12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.first(x).chunk(2, 1)
        y = torch.cat((left, self.second(right)), 1)
        n, c, h, w = y.shape
        return y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_a_channel_shuffle_is_one_copy(groups: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 11, 9)
    compact = fxc.compile(nn.Sequential(Shuffled(groups), nn.Conv2d(24, 8, 1)), "fuse, quantize", x, calibration=[x])
    assert_alike(compact, x)
    assert python_calls(compact) == []
    assert any(isinstance(module, Int8Conv) for name, module in compact.named_modules() if name.endswith("0.second"))


class Tokens(nn.Module):
    """Normalised tokens, a linear layer with GELU, and a residual sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, 40), nn.Linear(40, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(F.gelu(self.first(self.norm(x))))
        return x + y


@pytest.mark.parametrize("width", [1, 15, 16, 70, 200])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 2, 3)])
def test_tokens(width: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Tokens(width)
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    x = torch.randn(*shape, width)
    compact = fxc.compile(model, "fuse, quantize", x, calibration=[x])
    assert_alike(compact, x)
    assert python_calls(compact) == []
    assert image_by_image(compact) == [shape[0] if shape[0] > 1 else 0]


class Weighted(nn.Module):
    """Shares of each row, which a quantised layer reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, width), nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x).softmax(-1))
        return y


@pytest.mark.parametrize("width", [3, 40, 130])
def test_softmax_is_stored_as_bytes(width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, 16)
    compact = fxc.compile(Weighted(width), "fuse, quantize", x, calibration=[x])
    assert_alike(compact, x)
    assert python_calls(compact) == []


def image_by_image(compact: CompactModule) -> list[int]:
    """For each plan, how many images it computes one by one."""
    made = compact._native.made
    assert made is not None
    return [0 if plan is None or plan.single is None else plan.single.images for plan in made.plans.values()]


@pytest.mark.parametrize("batch", [2, 3, 4, 9])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_images_of_a_batch_are_computed_one_by_one(batch: int, threads: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 9, 9)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    compact = fxc.compile(model, "fuse, quantize", x, calibration=[x])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_alike(compact, x)
        assert_alike(compact, x.contiguous(memory_format=torch.channels_last))
    finally:
        torch.set_num_threads(before)
    assert image_by_image(compact) == [batch, batch]


class Mixing(nn.Module):
    """Convolutions between which images meet."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.second = how, nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if self.how == "transpose":
            y = y.transpose(0, 1)
        elif self.how == "reshape":
            y = y.reshape(y.shape[0] // 2, y.shape[1], y.shape[2] * 2, y.shape[3])
        elif self.how == "cat":
            y = torch.cat((y[2:], y[:2]))
        z: torch.Tensor = self.second(y)
        return z


@pytest.mark.parametrize("how", ["transpose", "reshape", "cat"])
def test_images_that_meet_are_not(how: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    compact = fxc.compile(Mixing(how), "fuse, quantize", x, calibration=[x])
    assert_alike(compact, x)
    assert image_by_image(compact) == [0]


class Windows(nn.Module):
    """Attention in shifted windows, with a mask that is computed from sizes, as Swin has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, height, width, c = x.shape
        y = F.pad(self.norm(x), (0, 0, 0, -width % 4, 0, -height % 4))
        y = torch.roll(y, (-2, -1), dims=(1, 2))
        rows, columns = y.shape[1] // 4, y.shape[2] // 4
        y = y.view(n, rows, 4, columns, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mask = y.new_zeros((4, 4))
        mask[2:] = 1
        mask[:, 3:] += 2
        flat = mask.reshape(16)
        gap = (flat[None, :] - flat[:, None]).ne(0)
        scores = (q * 8**-0.5) @ k.transpose(-2, -1) + self.table
        scores = scores.masked_fill(gap, -100.0)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, c)
        y = self.out(y).view(n, rows, columns, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, 4 * rows, 4 * columns, c)
        y = torch.roll(y, (2, 1), dims=(1, 2))[:, :height, :width]
        return x + y


@pytest.mark.parametrize("shape", [(2, 8, 8, 16), (1, 7, 10, 16)])
def test_windows(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    compact = fxc.compile(Windows(), "fuse, quantize", x, calibration=[x])
    assert_alike(compact, x)
    assert set(python_calls(compact)) <= {"masked_fill"}


class Structured(nn.Module):
    """Two images in a dictionary, another by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: dict[str, torch.Tensor], scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        left, right = self.conv(images["left"]), self.conv(images["right"])
        return {"sum": left + right, "scaled": left * scale if scale is not None else left}


def test_structured_and_keyword_inputs() -> None:
    torch.manual_seed(0)
    images = {"left": torch.randn(2, 3, 8, 8), "right": torch.randn(2, 3, 8, 8)}
    inputs = {"images": images, "scale": torch.randn(2, 1, 1, 1)}
    compact = fxc.compile(Structured(), "fuse, quantize", inputs, calibration=[inputs])
    twin = copy.deepcopy(compact)
    twin.executor = "graph"
    for call in ({"scale": inputs["scale"], "images": images}, inputs):
        for _ in range(2):
            found, expected = compact(**call), twin(**call)
            assert found.keys() == expected.keys()
            for name in found:
                torch.testing.assert_close(found[name], expected[name])
    assert planned(compact)


class Attention(nn.Module):
    """Attention with query, key and value in one layer, by products or by PyTorch's function."""

    def __init__(self, heads: int, width: int, by_hand: bool, scale: float | None = None) -> None:
        super().__init__()
        self.heads, self.by_hand, self.scale = heads, by_hand, scale
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, count, width = x.shape
        qkv = self.qkv(x).reshape(n, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.by_hand:
            y = (q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        z: torch.Tensor = self.out(y.transpose(1, 2).reshape(n, count, width))
        return z


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize(("heads", "width", "count"), [(1, 8, 3), (3, 48, 17), (2, 130, 70), (4, 64, 1)])
def test_attention(by_hand: bool, heads: int, width: int, count: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, count, width)
    compact = fxc.compile(Attention(heads, width, by_hand), "fuse, quantize", x, calibration=[x])
    assert_alike(compact, x)
    assert python_calls(compact) == []
    assert image_by_image(compact) == [4] or count == 1


@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_attention_with_a_scale_of_its_own(scale: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    assert_alike(fxc.compile(Attention(2, 8, False, scale), "fuse, quantize", x, calibration=[x]), x)


@given(
    st.lists(st.integers(1, 3), max_size=3), st.integers(1, 14), st.integers(1, 70), st.integers(1, 9), st.booleans(),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_products(outer: list[int], rows: int, columns: int, depth: int, turned: bool, broadcast: bool) -> None:
    right = torch.randn(*([] if broadcast else outer), *((columns, depth) if turned else (depth, columns)))

    root, graph = nn.Module(), fx.Graph()
    values = [graph.placeholder("left"), graph.placeholder("right")]
    second = graph.call_function(torch.transpose, (values[1], -2, -1)) if turned else values[1]
    root.quantize = Quantize(SIGNED.config())
    graph.output((graph.call_function(torch.matmul, (values[0], second)), graph.call_module("quantize", (values[0],))))
    compact = CompactModule(root, graph)
    left = torch.randn(*outer, rows, depth)
    for _ in range(2):
        torch.testing.assert_close(compact(left, right)[0], by_graph(compact, left, right)[0], rtol=1e-4, atol=1e-5)
    assert python_calls(compact) == []


def test_inputs_out_of_the_ordinary() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 9, 9)
    compact = fxc.compile(nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU()), "fuse, quantize", x, calibration=[x])
    compact(x)
    negative = torch.complex(torch.randn_like(x), x).conj().imag
    assert negative.is_neg()
    assert_alike(compact, negative)
    for layout in (torch.contiguous_format, torch.channels_last):
        for value in (1e8, -1e8, float("inf"), -float("inf")):
            assert_alike(compact, torch.full((1, 2, 9, 9), value).contiguous(memory_format=layout))
    assert by_graph(compact, x).shape == compact(x.to("meta")).shape


class Limited(nn.Module):
    """A clamp whose limit is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.low = nn.Parameter(torch.full((1, 4, 1, 1), -0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.clamp(torch.sin(self.first(x)), min=self.low))
        return y


def test_a_limit_that_is_a_tensor() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    assert_alike(fxc.compile(Limited(), "fuse, quantize", x, calibration=[x]), x)


class Asking(nn.Module):
    """Something that depends on the numbers of a tensor, behind a convolution."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        if self.how == "item":
            return y * x.max().item()
        if self.how == "mask":
            return y[y > 0]
        return y[torch.nonzero(y.flatten(1).mean(1) > 0).flatten()]


@pytest.mark.parametrize("how", ["item", "mask", "nonzero"])
def test_what_depends_on_numbers_runs_as_a_graph(how: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 8)
    compact = fxc.compile(Asking(how), "fuse, quantize", x, calibration=[x])
    for factor in (1.0, 3.0, 0.2, -1.0):
        expected = by_graph(compact, factor * x)
        for _ in range(2):
            torch.testing.assert_close(compact(factor * x), expected)
    assert compact._native.made is not None
    assert list(compact._native.made.plans.values()) == [None]


def test_inputs_that_do_not_fit_are_the_graphs_to_refuse(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    compact = fxc.compile(model, [P.Fuse(), P.Quantize(ignore=("2",))], x, calibration=[x])
    with pytest.raises((RuntimeError, InputError)):
        compact(torch.randn(2, 3, 9, 9))
    with pytest.raises((TypeError, InputError)):
        compact(x, y=1)
    with pytest.raises((TypeError, InputError)):
        compact(x, input=x)
    with pytest.raises((TypeError, InputError)):
        compact()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert compact(x).shape == (2, 5)


LENGTH = 2


def first_rows(x: torch.Tensor) -> torch.Tensor:
    return x[:LENGTH].clone()


def test_a_function_that_changes_its_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fx.Graph()
    value = graph.call_module("layer", (graph.placeholder("x"),))
    graph.output(graph.call_module("back", (graph.call_function(first_rows, (value,)),)))
    root = nn.Module()
    root.layer, root.back = Quantize(SIGNED.config()), Dequantize(SIGNED.config())
    compact, x = CompactModule(root, graph), torch.randn(5, 4)
    assert compact(x).shape == (2, 4)
    assert planned(compact)
    monkeypatch.setitem(globals(), "LENGTH", 4)
    for _ in range(2):
        assert torch.equal(compact(x), by_graph(compact, x))


def test_numbers_among_the_inputs() -> None:
    graph = fx.Graph()
    x, number = graph.placeholder("x"), graph.placeholder("number")
    graph.output((graph.call_module("layer", (x,)), number))
    root = nn.Module()
    root.layer = Quantize(SIGNED.config())
    compact, x_ = CompactModule(root, graph), torch.randn(2, 4)
    for given_ in (1, True, 1.0, "one", x_.numpy()):
        for _ in range(2):
            assert type(compact(x_, given_)[1]) is type(given_)
    assert planned(compact)


class Headed(nn.Module):
    """A convolution, and a float layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(self.conv(x).mean((2, 3)))
        return y


def test_gradients_are_had_by_asking() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    compact = fxc.compile(Headed(), [P.Fuse(), P.Quantize(ignore=("fc",))], x, calibration=[x])
    expected = compact(x)
    assert planned(compact)
    assert not expected.requires_grad
    compact.requires_grad_()
    found = compact(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    gradient = compact.get_parameter("fc.bias").grad
    assert gradient is not None
    torch.testing.assert_close(gradient, torch.full((5,), 2.0))


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 70))
def test_joined_groups_read_no_further_than_there_is_room(groups: int, group_out: int, group_in: int) -> None:
    joined = packing.joined_groups(groups * group_out, group_in, groups)
    end = packing.rounded_up(groups, joined) * group_in + packing.DEPTH
    assert end <= groups * group_in + max(memory.SLACK, packing.DEPTH)


GUARDED = """
import ctypes, mmap, sys
import torch
from fxcompress.emit.cpu_int8 import Int8Conv, Int8Linear
from tests.kernels import SIGNED, chain, filled, by_graph
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 17 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + 16 * page), page, 0):
    sys.exit("mprotect")
def last(*shape):
    count = torch.Size(shape).numel()
    tensor = torch.frombuffer(memory, dtype=torch.uint8, offset=16 * page - count, count=count)
    return tensor.random_(0, 255, generator=torch.Generator().manual_seed(0)).view(shape)
def conv(channels, out, kernel, groups):
    args = [kernel] * 2, [1, 1], [0, 0], [1, 1], groups, True, SIGNED.config(), SIGNED.config()
    return filled(Int8Conv(channels, out, *args), 0)
for layer, shape in (
    (conv(15, 35, 3, 5), (1, 15, 7, 7)), (conv(65, 13, 1, 13), (1, 65, 3, 3)), (conv(3, 20, 3, 1), (2, 3, 9, 9)),
    (conv(70, 70, 3, 70), (1, 70, 5, 5)), (conv(7, 9, 1, 1), (1, 7, 5, 5)),
    (filled(Int8Linear(7, 20, True, SIGNED.config()), 0), (3, 7)),
):
    x = last(*shape)
    if len(shape) == 4:
        n, c, h, w = shape
        x = x.view(n, h, w, c).permute(0, 3, 1, 2)
    compact = chain(layer)
    compact(x)
    assert (compact(x).float() - by_graph(compact, x).float()).abs().max() <= 1
    print("right")
"""


def test_nothing_behind_the_inputs_is_read() -> None:
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["right"] * 6, done.stderr


class Dense(nn.Module):
    """Layers that read everything before them, concatenated from a list or one after the other (DenseNet)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.stem = how, nn.Conv2d(3, 10, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(10 + 6 * index) for index in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(10 + 6 * index, 6, 3, padding=1) for index in range(4))
        self.head = nn.Conv2d(34, 5, 1)
        for name, parameter in self.norms.named_parameters():
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        made = [F.max_pool2d(F.relu(self.stem(x)), 2)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            joined = torch.cat(made, 1)
            made.append(conv(F.relu(norm(joined))))
            if self.how == "chain":
                made = [torch.cat([joined, made.pop()], 1)]
        y = torch.cat(made, 1)
        z: torch.Tensor = self.head(y)
        return (z, y, made[-1]) if self.how == "results" else z


def copies(compact: CompactModule) -> list[str]:
    made = compact._native.made
    assert made is not None
    (bound,) = made.plans.values()
    assert bound is not None
    plan = bound.plan
    return [name for name, item in zip(plan.names, plan.items, strict=True) if isinstance(item, steps.Copy)]


@pytest.mark.parametrize("how", ["list", "chain", "results"])
def test_what_is_concatenated_is_made_in_place(how: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 14, 13)
    compact = fxc.compile(Dense(how), "fuse, quantize", x, calibration=[x])
    assert sum(isinstance(module, Int8Affine) for module in compact.modules()) == 4
    expected, found = by_graph(compact, x), (compact(x), compact(x))[1]
    for left, right in zip(*([y] if torch.is_tensor(y) else y for y in (expected, found)), strict=True):
        noise = (left - right).square().mean()
        assert noise == 0 or 10 * torch.log10(left.square().mean() / noise) >= 35
        assert left.stride() == right.stride()
    assert python_calls(compact) == []
    assert [name for name in copies(compact) if name.startswith("cat")] == []
    assert image_by_image(compact) == [3]


class Twice(nn.Module):
    """Concatenations of a value with itself, of an input, of pieces of a split, and of what several of them share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(11, 5, 3)
        self.third = nn.Conv2d(22, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        z = self.second(torch.cat((y, x), 1))
        left, right = y[:, :, 1:-1, 1:-1].chunk(2, 1)
        w: torch.Tensor = self.third(torch.cat((right, z, left, z, right), 1))
        v: torch.Tensor = self.third(torch.cat((z, z, left, right, left), 1))
        return w + v


def test_concatenations_that_share_their_pieces() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 11, 10)
    compact = fxc.compile(Twice(), "fuse, quantize", x, calibration=[x])
    assert_alike(compact, x)
    assert python_calls(compact) == []


class Narrowing(nn.Module):
    """Large images with few weights, then small ones with many; results of both, and a value that both read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 128, 3, stride=4)
        self.third, self.fourth = nn.Conv2d(128, 512, 3, padding=1), nn.Conv2d(512, 128, 3, padding=1)
        self.head = nn.Linear(128, 7)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = F.relu(self.first(x))
        z = self.second(y)
        w = F.relu(self.fourth(F.relu(self.third(z))) + z)
        return self.head(w.mean((2, 3))), y


@pytest.mark.parametrize("batch", [2, 3, 9])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_late_layers_run_on_all_images_at_once(batch: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 29, 27)
    compact = fxc.compile(Narrowing(), "fuse, quantize", x, calibration=[x])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [compact(x) for _ in range(3)][-1]
        (bound,) = compact._native.made.plans.values()  # type: ignore[union-attr]
        assert bound is not None
        assert bound.single is not None
        assert bound.single.rest is not None
        assert 0 < len(bound.single.steps) < len(bound.plan.items)
        monkeypatch.setattr(executor, "whole_from", lambda whole, single, images: len(whole.items))
        compact.repack()
        expected = compact(x)
    finally:
        torch.set_num_threads(before)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)
    assert_alike_all(compact, x)


def assert_alike_all(compact: CompactModule, x: torch.Tensor) -> None:
    for left, right in zip(compact(x), by_graph(compact, x), strict=True):
        noise = (left - right).square().mean()
        assert noise == 0 or 10 * torch.log10(right.square().mean() / noise) >= 35


class Halved(nn.Module):
    """A shape that is computed from sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        n, c, h, w = y.shape
        z: torch.Tensor = self.second(F.hardsigmoid(y.reshape(n, c * 2, h // 2, w + 0)) * 2)
        return z


def test_sizes_are_recorded_without_pretending(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("on fake tensors")

    monkeypatch.setattr(executor._FakeRecorder, "record", refuse)
    x = torch.randn(2, 3, 10, 9)
    compact = fxc.compile(Halved(), "fuse, quantize", x, calibration=[x])
    assert_alike(compact, x)
    assert planned(compact)


class Placed(nn.Module):
    """Numbers that are made where the input is, in the middle of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(1, x.shape[1] + 1, dtype=torch.float32, device=x.device)
        y = self.first(x) + (places / (places[-1:] + 1e-6)).unsqueeze(1)
        z: torch.Tensor = self.last(y)
        return z


def test_numbers_made_on_the_device_of_the_input() -> None:
    """Plans are recorded on the device meta, which has no numbers to read."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    compact = fxc.compile(Placed(), "fuse, quantize", x, calibration=[x])
    assert_alike(compact, x)
    assert planned(compact)
