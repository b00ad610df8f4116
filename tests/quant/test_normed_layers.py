"""Layers trained with their batch norms: against the layer and the batch norm, and the published formula."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.errors import OptionError
from fxcompress.quant.arithmetic import fake_quantize
from fxcompress.quant.fake_quantize import FakeQuantize, LearnedQuantize
from fxcompress.quant.normed_layers import NormedLayer
from fxcompress.quant.observers import PerChannelMinMax
from fxcompress.quant.spec import WEIGHT, weight_spec

PAIRS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4), (6, 3, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(6, momentum=0.3), (5, 4, 7, 7)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6, momentum=None), (5, 4, 7, 7)),
    "conv3d": (nn.Conv3d(2, 4, 1), nn.BatchNorm3d(4, affine=False), (4, 2, 3, 3, 3)),
    "linear": (nn.Linear(5, 4), nn.BatchNorm1d(4, eps=0.1), (8, 5)),
}


def pair(case: str) -> tuple[Any, Any, torch.Tensor]:
    """A layer and a batch norm with statistics and numbers of their own, and an input."""
    torch.manual_seed(0)
    layer, norm, shape = copy.deepcopy(PAIRS[case])
    for parameter in norm.parameters():
        nn.init.normal_(parameter)  # signs of both kinds
    norm.running_mean.normal_()  # type: ignore[operator]
    norm.running_var.uniform_(0.5, 2.0)  # type: ignore[operator]
    return layer, norm, torch.randn(shape)


@pytest.mark.parametrize("case", PAIRS)
def test_without_rounding_it_is_the_layer_and_its_batch_norm(case: str) -> None:
    layer, norm, x = pair(case)
    joined = NormedLayer.of(copy.deepcopy(layer), copy.deepcopy(norm))
    for _ in range(3):
        expected, found = norm(layer(x)), joined(x)
        assert torch.equal(found, expected)
        expected.square().sum().backward()
        found.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in joined.named_parameters()}
    for name, parameter in layer.named_parameters():
        found_gradient = gradients[name]
        assert found_gradient is not None and parameter.grad is not None  # noqa: PT018
        assert torch.equal(found_gradient, parameter.grad)
    assert all(torch.equal(one, other) for one, other in zip(joined.norm.buffers(), norm.buffers(), strict=True))
    for module in (layer, norm, joined):
        module.eval()
    assert torch.allclose(joined(x), norm(layer(x)), atol=1e-5)
    plain = joined.folded()
    assert type(plain) is type(layer)
    assert torch.equal(plain(x), joined(x))


def krishnamoorthi(layer: Any, norm: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer with folded and rounded weights, corrected from running statistics to those of the batch."""
    rows = (-1, *[1] * (layer.weight.ndim - 1))
    deviation = torch.sqrt(norm.running_var + norm.eps)
    folded = layer.weight * (norm.weight / deviation).view(rows)
    observer = PerChannelMinMax(WEIGHT)
    observer.recording = True
    observer(folded)
    rounded = fake_quantize(folded, *observer.calculate_qparams(), WEIGHT)
    columns = (1, -1, *[1] * (x.ndim - 2))
    without = F.conv2d(x, rounded / (norm.weight / deviation).view(rows), None, layer.stride, layer.padding,
                       layer.dilation, layer.groups) + layer.bias.view(columns)  # fmt: skip
    mean, batch = without.mean((0, 2, 3)), torch.sqrt(without.var((0, 2, 3), correction=0) + norm.eps)
    products = F.conv2d(x, rounded, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    shift = norm.bias - norm.weight * (mean - layer.bias) / batch
    corrected: torch.Tensor = products * (deviation / batch).view(columns) + shift.view(columns)
    return corrected


@pytest.mark.parametrize("kind", [FakeQuantize, LearnedQuantize])
def test_in_training_weights_are_rounded_folded_and_results_corrected_to_the_batch(kind: type[FakeQuantize]) -> None:
    layer, norm, x = pair("conv2d")
    joined = NormedLayer.of(copy.deepcopy(layer), copy.deepcopy(norm))
    joined.quantizer = kind(PerChannelMinMax(WEIGHT), is_weight=True, channels=6)
    found = joined(x)
    assert torch.allclose(found, krishnamoorthi(layer, norm, x), atol=1e-4)
    assert not torch.allclose(found, norm(layer(x)), atol=1e-4)
    found.square().sum().backward()
    assert all(parameter.grad is not None for parameter in joined.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_frozen_late_it_is_what_evaluation_and_the_folded_layer_compute(bits: int) -> None:
    layer, norm, x = pair("conv2d")
    spec = weight_spec(bits)
    joined = NormedLayer.of(layer, norm)
    quantizer = LearnedQuantize(PerChannelMinMax(spec), is_weight=True, channels=6, freeze_at=0.7)
    joined.quantizer = quantizer
    joined.freeze_norm(0.5)
    for _ in range(3):
        before = joined(x)
    statistics = norm.running_mean.clone()
    for module in joined.modules():
        if isinstance(module, (NormedLayer, FakeQuantize)):
            module.follow_training(0.7)
    frozen = joined(x)
    assert not torch.equal(frozen, before)
    assert torch.equal(norm.running_mean, statistics)
    frozen.square().sum().backward()
    assert all(parameter.grad is not None for parameter in joined.parameters())
    joined.eval()
    assert torch.equal(joined(x), frozen)
    plain: Any = joined.folded()
    plain.weight.data = fake_quantize(plain.weight.data, *quantizer.calculate_qparams(), spec)
    assert torch.equal(plain(x), frozen)
    joined.train()
    joined.follow_training(0.2)
    assert not torch.equal(joined(x), frozen)


def test_channels_that_a_batch_norm_masks_give_its_shift() -> None:
    layer, norm, x = pair("conv2d")
    with torch.no_grad():
        norm.weight[2] = 0.0
    joined = NormedLayer.of(layer, norm)
    joined.quantizer = LearnedQuantize(PerChannelMinMax(WEIGHT), is_weight=True, channels=6)
    joined.freeze_norm(0.5)
    for done in (0.0, 0.9):
        joined.follow_training(done)
        result = joined(x)
        result.square().sum().backward()
        assert torch.allclose(result[:, 2], norm.bias[2].expand_as(result[:, 2]), atol=1e-6)
        assert all(bool(p.grad.isfinite().all()) for p in joined.parameters() if p.grad is not None)


def test_steps_follow_the_statistics() -> None:
    layer, norm, x = pair("conv2d")
    norm.eps, norm.momentum = 1e-30, 0.0
    joined = NormedLayer.of(layer, norm)
    quantizer = LearnedQuantize(PerChannelMinMax(WEIGHT), is_weight=True, channels=6)
    joined.quantizer = quantizer
    joined(x)
    before = quantizer.scale.clone()
    norm.running_var.mul_(256)
    joined(x)
    assert torch.equal(quantizer.scale, before / 16)


def test_a_share_that_is_none_is_refused() -> None:
    layer, norm, _ = pair("linear")
    with pytest.raises(OptionError, match="freeze_norms"):
        NormedLayer.of(layer, norm).freeze_norm(2.0)
