"""A layer and the batch norm behind it, trained as the one 8-bit layer that they will be."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxcompress.errors import OptionError
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.folding import folded_backward, scale_and_shift, scaled_rows

_TABLES = ("_parameters", "_buffers", "_modules")


class NormedLayer(nn.Module):
    """A convolution or linear layer with the batch norm behind it. What is quantised is the folded weight.

    With gamma and beta of the batch norm, W the weight, s = gamma / sqrt(running variance + eps), and Q the rounding:

    1. In evaluation mode, and late in training (`freeze_at`), the result is that of the deployed layer, with the
       running statistics: conv(x, Q(s W)) + beta + s (bias - running mean).
    2. Before, conv(x, Q(s W) / s) + bias goes through the batch norm, which takes the statistics of the batch. So the
       weight is quantised as it will be, whatever the batch, and the statistics are those of the quantised layer. This
       is the correction of Krishnamoorthi written another way: conv(x, Q(s W)) times the running deviation over that
       of the batch, and a shift with mean and deviation of the batch.
    3. Without a quantiser it is the layer and its batch norm in training and their fold in evaluation mode.

    Weight and bias are those of the layer, at their places; the batch norm is the child `norm`.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference, 2018, section 3.2; Krishnamoorthi, Quantizing deep convolutional networks for efficient inference,
    2018, section 3.2.2.
    """

    weight: torch.Tensor
    bias: Any
    norm: _BatchNorm
    quantizer: FakeQuantize | None
    frozen: torch.Tensor
    freeze_at: float

    @classmethod
    def of(cls, layer: nn.Module, norm: nn.Module) -> NormedLayer:
        """Return a layer that shares the parameters and options of a layer and a batch norm."""
        made: Any = _twin(layer, _NORMED[type(layer)])
        made.norm, made.freeze_at = norm, 1.0
        made.register_module("quantizer", None)
        made.register_buffer("frozen", torch.tensor(False, device=made.weight.device))
        return made  # type: ignore[no-any-return]

    def folded(self) -> nn.Module:
        """Return the plain layer that this one is in evaluation mode, without quantisation."""
        with torch.no_grad():
            numbers = folded_backward(self, self.norm)  # type: ignore[arg-type]
        trained = any(parameter.requires_grad for parameter in self.parameters(recurse=False))
        plain: Any = _twin(self, PLAIN[type(self)])
        for name in ("norm", "quantizer"):
            del plain._modules[name]
        del plain._buffers["frozen"], plain.freeze_at
        plain.weight = nn.Parameter(numbers.weight, requires_grad=trained)
        plain.bias = nn.Parameter(numbers.bias, requires_grad=trained)
        return plain  # type: ignore[no-any-return]

    def freeze_norm(self, at: float) -> None:
        """Let the statistics stay from a share of training on: 0 for always, 1 for never."""
        if not 0 <= at <= 1:
            raise OptionError(f"freeze_norms is a share of training in [0, 1], not {at!r}")
        self.freeze_at = float(at)
        self.frozen.fill_(at == 0)

    def follow_training(self, done: float) -> None:
        """Take notice of how far training has come: the share of its steps that is over, in [0, 1)."""
        self.frozen.fill_(done >= self.freeze_at)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the normalised result."""
        if self.training and not self.frozen:
            result: torch.Tensor = self.norm(self._compute(input, self._rounded_weight(), self.bias))
            return result
        numbers = folded_backward(self, self.norm)  # type: ignore[arg-type]
        return self._compute(input, self._quantized(numbers.weight, scale_and_shift(self.norm)[0]), numbers.bias)

    def _rounded_weight(self) -> torch.Tensor:
        """The weight before the batch norm that becomes, folded, a quantised one."""
        if self.quantizer is None:
            return self.weight
        scale = scale_and_shift(self.norm)[0].detach()
        rounded = self._quantized(scaled_rows(self, scale), scale)  # type: ignore[arg-type]
        rows = scale.view(-1, *[1] * (rounded.ndim - 1)).to(rounded.dtype)
        return torch.where(rows == 0, self.weight, rounded / torch.where(rows == 0, 1.0, rows))

    def _quantized(self, folded: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if self.quantizer is None:
            return folded
        gain = scale.abs().to(folded.dtype) if self.quantizer.scale.ndim else None
        rounded: torch.Tensor = self.quantizer(folded, gain)
        return rounded

    def _compute(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError


def _twin(layer: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return a module of another class with the parameters, buffers, children and options of a layer."""
    made = kind.__new__(kind)
    made.__dict__.update(vars(layer))
    made.__dict__.update({table: dict(vars(layer)[table]) for table in _TABLES})
    return made


def _convolve(layer: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = layer._conv_forward(input, weight, bias)  # pads as the layer does
    return result


class NormedLinear(NormedLayer, nn.Linear):
    """A linear layer and the batch norm behind it."""

    def _compute(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(input, weight, bias)


class NormedConv1d(NormedLayer, nn.Conv1d):
    """A convolution over one dimension and the batch norm behind it."""

    def _compute(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _convolve(self, input, weight, bias)


class NormedConv2d(NormedLayer, nn.Conv2d):
    """A convolution of images and the batch norm behind it."""

    def _compute(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _convolve(self, input, weight, bias)


class NormedConv3d(NormedLayer, nn.Conv3d):
    """A convolution of volumes and the batch norm behind it."""

    def _compute(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _convolve(self, input, weight, bias)


_NORMED: dict[type[nn.Module], type[NormedLayer]] = {
    nn.Linear: NormedLinear,
    nn.Conv1d: NormedConv1d,
    nn.Conv2d: NormedConv2d,
    nn.Conv3d: NormedConv3d,
}

#: The class that a normed layer comes from.
PLAIN: dict[type[nn.Module], type[nn.Module]] = {normed: plain for plain, normed in _NORMED.items()}
