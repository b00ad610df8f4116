"""FoldBatchNorm and FoldBatchNormForward: exact for every layer they take, with a reason for every one they leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fxcompress.graph.capture import trace
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import graph_info
from fxcompress.graph.printer import print_graph
from fxcompress.passes.fuse_conv_bn import FoldBatchNorm, FoldBatchNormForward
from fxcompress.pipeline.base import Pass, PassContext, PassResult
from fxcompress.pipeline.manager import PassManager
from fxcompress.quant.folding import folded_backward

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS: dict[int, Any] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def randomise(model: nn.Module) -> nn.Module:
    """Draw the numbers of batch norms at random: with the defaults every wrong formula would look right."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 1)
                module.running_var.uniform_(0.3, 3)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


def canonical(model: nn.Module, x: torch.Tensor, training: bool = False) -> fx.GraphModule:
    return PassManager("canonicalize", verify=False).run(trace(model, x, training=training), x).graph_module


def run(item: Pass, graph_module: fx.GraphModule, x: torch.Tensor) -> PassResult:
    return item.run(graph_module, PassContext(ExampleInputs.of(x)))


def texts(result: PassResult) -> list[str]:
    return [str(note) for note in result.notes]


def gap(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).detach().abs().max() / left.detach().abs().max().clamp_min(1e-300))


# -- 1. what folds ----------------------------------------------------------------------------------------------------


def test_conv_and_batch_norm_become_one_layer() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 3, 8, 8)
    result = PassManager([FoldBatchNorm()]).run(trace(model, x, training=False), x)
    assert print_graph(result.graph_module) == (
        "stage FLOAT\n"
        "%0: f32[2,3,8,8] = placeholder input\n"
        "%1: f32[2,4,6,6] = module 0: Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))(%0)\n"
        "%2: f32[2,4,6,6] = relu(%1)\n"
        "%3 = output(%2)"
    ).replace("input\n", f"{next(iter(result.graph_module.graph.nodes)).target}\n")
    assert list(result.graph_module.state_dict()) == ["0.weight", "0.bias"]
    assert [str(note) for note in result.rows[-1].notes] == [
        "1: batch norm folded into 0", "0: batch norm 1 folded in",
    ]  # fmt: skip
    assert result.rows[-1].edits == 1


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, Any, torch.Tensor]:
    """A layer, a batch norm that fits its output, and an input."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    n = draw(st.integers(0, 3))
    groups = draw(st.integers(1, 3))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    norm = NORMS[n](outputs, affine=draw(st.booleans()), eps=draw(st.sampled_from([1e-5, 1e-3, 0.1])))
    bias = draw(st.booleans())
    if n == 0:
        return nn.Linear(inputs, outputs, bias), norm, torch.randn(3, inputs)
    kernel = draw(st.tuples(*[st.integers(1, 3)] * n))
    stride, dilation = draw(st.tuples(*[st.integers(1, 2)] * n)), draw(st.tuples(*[st.integers(1, 2)] * n))
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias}
    if draw(st.booleans()):
        extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        options |= {"padding": draw(st.integers(0, 1)), "output_padding": tuple(extra)}
        layer: nn.Module = TRANSPOSED[n](inputs, outputs, kernel, **options)
    else:
        options |= {"padding": draw(st.tuples(*[st.integers(0, 2)] * n)),
                    "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))}  # fmt: skip
        layer = CONVOLUTIONS[n](inputs, outputs, kernel, **options)
    return layer, norm, torch.randn(2, inputs, *[6] * n)


@settings(max_examples=60, deadline=None)
@given(layers(), st.sampled_from([torch.float32, torch.float64]))
def test_folding_keeps_the_output(drawn: tuple[nn.Module, nn.Module, torch.Tensor], dtype: torch.dtype) -> None:
    layer, norm, x = drawn
    model, x = randomise(nn.Sequential(layer, norm)).to(dtype).eval(), x.to(dtype)
    graph_module = canonical(model, x)
    result = run(FoldBatchNorm(), graph_module, x)
    assert (result.modified, result.edits) == (True, 1)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in graph_module.modules())
    assert gap(model(x), graph_module(x)) <= (1e-10 if dtype == torch.float64 else 1e-4)
    again = run(FoldBatchNorm(), graph_module, x)
    assert (again.modified, again.edits, again.notes) == (False, 0, ())


def test_the_wrong_algebra_would_fail_the_equality() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double().eval()
    conv, norm = model[0], model[1]  # type: ignore[index]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folded = folded_backward(conv, norm)
    assert gap(model(x), nn.functional.conv2d(x, folded.weight, folded.bias)) < 1e-12
    assert gap(model(x), nn.functional.conv2d(x, folded.weight, folded.bias + conv.bias)) > 1e-3
    assert gap(model(x), nn.functional.conv2d(x, conv.weight, folded.bias)) > 1e-3


def test_half_precision_is_folded_in_double_and_rounded_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    randomise(model).bfloat16()
    exact = folded_backward(model.double()[0], model[1])  # type: ignore[arg-type]
    graph_module = canonical(model.bfloat16(), x.bfloat16())
    run(FoldBatchNorm(), graph_module, x.bfloat16())
    assert torch.equal(graph_module.get_parameter("0.weight"), exact.weight.bfloat16())
    assert torch.equal(graph_module.get_parameter("0.bias"), exact.bias.bfloat16())


def test_two_batch_norms_in_a_row_fold_both() -> None:
    model = randomise(nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.BatchNorm1d(3))).double().eval()
    x = torch.randn(2, 2, 5, dtype=torch.float64)
    graph_module = canonical(model, x)
    assert run(FoldBatchNorm(), graph_module, x).edits == 2
    assert gap(model(x), graph_module(x)) < 1e-12


def test_what_was_frozen_stays_frozen_and_masks_stay() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))).eval()
    model.get_parameter("0.weight").requires_grad_(False)
    model.get_submodule("1").requires_grad_(False)
    x = torch.randn(1, 2, 4, 4)
    graph_module = canonical(model, x)
    with torch.no_grad():
        graph_module.get_parameter("0.weight")[0, 1] = 0.0
    mask = torch.tensor([[[[True]], [[False]]], [[[True]], [[True]]]])
    graph_info(graph_module).masks["0.weight"] = mask
    run(FoldBatchNorm(), graph_module, x)
    assert [parameter.requires_grad for parameter in graph_module.parameters()] == [False, False, True, True]
    assert torch.equal(graph_info(graph_module).masks["0.weight"], mask)
    assert torch.equal(graph_module.get_parameter("0.weight") != 0, mask)


def test_the_mask_of_a_batch_norm_becomes_that_of_the_rows() -> None:
    model = randomise(nn.Sequential(nn.ConvTranspose2d(2, 4, 2, groups=2), nn.BatchNorm2d(4))).eval()
    x = torch.randn(1, 2, 4, 4)
    graph_module = canonical(model, x)
    masks = graph_info(graph_module).masks
    masks["1.weight"] = torch.tensor([True, False, True, False])
    masks["1.bias"] = torch.tensor([True, False, False, True])
    with torch.no_grad():
        for name, mask in masks.items():
            graph_module.get_parameter(name).mul_(mask)
    expected = graph_module(x)
    run(FoldBatchNorm(), graph_module, x)
    assert gap(expected, graph_module(x)) < 1e-5
    assert set(masks) == {"0.weight", "0.bias"}
    assert torch.equal(masks["0.bias"], torch.tensor([True, False, True, True]))
    assert torch.equal(masks["0.weight"][:, :, 0, 0], torch.tensor([[True, False], [True, False]]))
    for name, mask in masks.items():
        assert torch.equal(graph_module.get_parameter(name) != 0, mask)


class Towers(nn.Module):
    """Two towers of one set of weights."""

    def __init__(self, other: bool = False) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.last = nn.BatchNorm2d(3) if other else self.bn

    def forward(self, x: torch.Tensor) -> Any:
        return self.bn(self.conv(x)) - self.last(self.conv(x.flip(2)))


def test_a_pair_that_is_called_twice_folds_once() -> None:
    model, x = randomise(Towers()).double().eval(), torch.randn(2, 2, 5, 5, dtype=torch.float64)
    graph_module = canonical(model, x)
    result = run(FoldBatchNorm(), graph_module, x)
    assert result.edits == 1
    assert "BatchNorm2d" not in print_graph(graph_module)
    assert gap(model(x), graph_module(x)) < 1e-12


# -- 2. to 5. what is refused -----------------------------------------------------------------------------------------


class Net(nn.Module):
    """conv, bn and a further reading of one of them."""

    def __init__(self, read: Callable[[Any, torch.Tensor], torch.Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.bn = norm or nn.BatchNorm2d(2)
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self, x)


def tied(model: Net) -> Net:
    model.other.weight = model.conv.weight
    return model


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two readers": (
        lambda: Net(lambda m, x: m.bn(y := m.conv(x)) + y),
        "bn: not fused: `conv` is read by 2 nodes: bn, add",
    ),
    "output": (
        lambda: Net(lambda m, x: (m.bn(y := m.conv(x)), y)),  # type: ignore[arg-type, return-value]
        "bn: not fused: `conv` is read by 2 nodes: bn, output",
    ),
    "no layer": (
        lambda: Net(lambda m, x: m.bn(m.conv(x).relu())),
        "bn: not fused: the input of `bn` is `relu` (relu), not conv or conv_transpose or linear",
    ),
    "batch statistics": (
        lambda: Net(lambda m, x: m.bn(m.conv(x)), nn.BatchNorm2d(2, track_running_stats=False)),
        "bn: not fused: `bn` has no running statistics: it uses those of each batch",
    ),
    "norm called twice": (
        lambda: Net(lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x))),
        "bn: not fused: module `bn` is called 2 times, not always with `conv`",
    ),
    "layer called twice": (
        lambda: Net(lambda m, x: m.bn(m.conv(m.conv(x)))),
        "bn: not fused: module `conv` is called 2 times, not always with `bn`",
    ),
    "two norms for one layer": (lambda: Towers(other=True), "not fused: module `conv` is called 2 times"),
    "tied weight": (
        lambda: tied(Net(lambda m, x: m.other(m.bn(m.conv(x))))),
        "bn: not fused: a parameter of `conv` is also used by other.weight",
    ),
    "weight read elsewhere": (
        lambda: Net(lambda m, x: m.bn(m.conv(x)) * m.conv.bias[0]),
        "bn: not fused: a parameter of `conv` is also used by conv_bias",
    ),
    "overflow": (
        lambda: Net(lambda m, x: m.bn(m.conv(x))),
        "bn: not fused: the folded weight of `conv` would not be finite in torch.float32",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_leave_the_graph_as_it_is_and_say_why(case: str) -> None:
    build, expected = REFUSALS[case]
    model, x = randomise(build()).eval(), torch.randn(2, 2, 4, 4)
    if case == "overflow":
        nn.init.constant_(model.get_parameter("conv.weight"), 1e30)
        nn.init.constant_(model.get_parameter("bn.weight"), 1e30)
    graph_module = canonical(model, x)
    before, numbers = print_graph(graph_module), graph_module.state_dict()
    result = run(FoldBatchNorm(), graph_module, x)
    assert (result.modified, result.edits) == (False, 0)
    assert any(expected in text for text in texts(result)), texts(result)
    assert print_graph(graph_module) == before
    assert all(torch.equal(numbers[name], value) for name, value in graph_module.state_dict().items())


def test_training_mode_is_refused() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), torch.randn(2, 2, 4, 4)
    result = run(FoldBatchNorm(), canonical(model, x, training=True), x)
    assert texts(result) == ["1: not fused: batch norm is in training mode; call model.eval() before compiling"]


def test_a_linear_layer_on_sequences_has_its_channels_elsewhere() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4)).eval(), torch.randn(2, 4, 3)
    result = run(FoldBatchNorm(), canonical(model, x), x)
    assert "normalises axis 1 of f32[2,4,5], which is not the channel axis of `0`" in texts(result)[0]
    unbatched = nn.Sequential(nn.Conv1d(3, 5, 1), nn.BatchNorm1d(7)).eval()  # reads (channels, length) as (batch, 7)
    result = run(FoldBatchNorm(), canonical(unbatched, torch.randn(3, 7)), torch.randn(3, 7))
    assert "normalises axis 1 of f32[5,7]" in texts(result)[0]


# -- forward ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(layers(), st.booleans())
def test_folding_forward_keeps_the_output_or_refuses(
    drawn: tuple[nn.Module, nn.Module, torch.Tensor], shifted: bool
) -> None:
    layer, _, x = drawn
    norm = randomise(NORMS[x.ndim - 2](x.shape[1]))
    if not shifted:
        norm.get_buffer("running_mean").zero_()
        nn.init.zeros_(norm.get_parameter("bias"))
    model, x = nn.Sequential(norm, layer).double().eval(), x.double()
    graph_module = canonical(model, x)
    result = run(FoldBatchNormForward(), graph_module, x)
    assert gap(model(x), graph_module(x)) <= 1e-10
    border = isinstance(layer, nn.modules.conv._ConvTransposeNd) and (
        set(layer.kernel_size) | set(layer.stride) != {1} or any(layer.output_padding)
    )
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        border = any(layer.padding) and layer.padding_mode == "zeros"
    assert result.edits == int(not (shifted and border))
    assert run(FoldBatchNormForward(), graph_module, x).modified is False


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(2, 3, 3, padding=1), "1: not fused: `1` pads with zeros, and the batch norm has a shift"),
        (nn.Conv2d(2, 3, 3, padding="same"), "1: not fused: `1` pads with zeros, and the batch norm has a shift"),
        (nn.ConvTranspose2d(2, 3, 2), "1: not fused: `1` has fewer taps at the border, and the batch norm has a shift"),
        (
            nn.ConvTranspose2d(2, 3, 1, dilation=2, output_padding=1),
            "1: not fused: `1` has fewer taps at the border, and the batch norm has a shift",
        ),
        (nn.Conv2d(2, 3, 1, padding="same"), None),
        (nn.Conv2d(2, 3, 3, padding="valid"), None),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), None),
        (nn.ConvTranspose2d(2, 3, 1), None),
    ],
)
def test_folding_forward_depends_on_the_border(layer: nn.Module, reason: str | None) -> None:
    model, x = randomise(nn.Sequential(nn.BatchNorm2d(2), layer)).double().eval(), torch.randn(2, 2, 5, 5).double()
    graph_module = canonical(model, x)
    result = run(FoldBatchNormForward(), graph_module, x)
    assert gap(model(x), graph_module(x)) < 1e-12
    if reason is None:
        assert texts(result) == ["0: batch norm folded into 1", "1: batch norm 0 folded in"]
    else:
        assert (texts(result), result.modified) == ([reason], False)


def test_folding_forward_updates_masks() -> None:
    model, x = randomise(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))).eval(), torch.randn(4, 3)
    graph_module = canonical(model, x)
    masks, keep = graph_info(graph_module).masks, torch.tensor([True, False, True])
    with torch.no_grad():
        for name in ("weight", "bias"):
            masks[f"0.{name}"] = keep
            graph_module.get_parameter(f"0.{name}").mul_(keep)
        graph_module.get_parameter("1.bias").zero_()
    masks["1.bias"] = torch.tensor([False, False])
    run(FoldBatchNormForward(), graph_module, x)
    assert set(masks) == {"1.weight"}
    assert torch.equal(masks["1.weight"], keep.expand(2, 3))
    assert torch.equal(graph_module.get_parameter("1.weight") != 0, masks["1.weight"])


@pytest.mark.parametrize("read", ["two readers", "training"])
def test_folding_forward_refuses_shared_values_and_training(read: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.bn(x)
            return self.conv(y) + y if read == "two readers" else self.conv(y)

    x = torch.randn(2, 2, 4, 4)
    result = run(FoldBatchNormForward(), canonical(Model(), x, training=read == "training"), x)
    expected = {
        "two readers": "conv: not fused: `bn` is read by 2 nodes: conv, add",
        "training": "conv: not fused: batch norm is in training mode; call model.eval() before compiling",
    }
    assert texts(result) == [expected[read]]
