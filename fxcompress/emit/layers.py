"""What convolution and linear layers on CPUs and on GPUs share: their options, their tensors, and their arithmetic.

A layer is one of `Convolution` and `Linear`, which have the geometry, and of a `Layer` of its target, which has all
other options: `class Int8Conv(Convolution, Int8Layer)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from fxcompress.emit.cpu_numbers import Kernel
from fxcompress.errors import OptionError
from fxcompress.quant.spec import Grid

_CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

#: Activations by name, as float functions of (tensor, *arguments). A clamp's limits may be None.
ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "clamp": torch.clamp,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": lambda x, approximate: F.gelu(x, approximate=approximate),
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
}


def activation_of(kind: str, arguments: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return an activation as (name, *arguments), or None if it is none of `ACTIVATIONS`.

    Args:
        kind: of the node, see `graph.ops`.
        arguments: of the node, by name.
    """
    if kind == "relu":
        return ("clamp", 0.0, None)
    if kind == "relu6":
        return ("clamp", 0.0, 6.0)
    if kind in ("hardtanh", "clamp"):
        limits = [arguments.get(name) for name in (("min_val", "max_val") if kind == "hardtanh" else ("min", "max"))]
        if not all(limit is None or isinstance(limit, (int, float)) for limit in limits):
            return None
        return ("clamp", *(None if limit is None else float(limit) for limit in limits))
    if kind == "gelu":
        return ("gelu", str(arguments["approximate"]))
    if kind == "leaky_relu":
        return ("leaky_relu", float(arguments["negative_slope"]))
    return (kind,) if kind in ("hardswish", "silu", "tanh") else None


class Layer(Kernel):
    """Base of layers with weights: scales of output channels, float bias, residual, activation.

    Args:
        weight_shape: shape of the weight; output channels first.
        bias: whether there is a bias.
        output: grid of the result; None: the result is real.
        activation: (name, *arguments) as in `activations`; None: there is none.
        residual: grid of a second input, which is added before the activation; "float": it is real; None: there is no
            second input. It has the result's shape, or one that broadcasts with it.
        dtype: of the weight.
        scaled: whether the weight has scales.
    """

    #: What activations the layer has, by name.
    activations: ClassVar[Mapping[str, Callable[..., torch.Tensor]]] = ACTIVATIONS

    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        weight_shape: Sequence[int],
        bias: bool,
        output: Sequence[Any] | None = None,
        activation: Sequence[Any] | None = None,
        residual: Sequence[Any] | str | None = None,
        dtype: torch.dtype = torch.int8,
        scaled: bool = True,
    ) -> None:
        super().__init__()
        self.output = None if output is None else Grid.from_config(output)
        self.activation = None if activation is None else (str(activation[0]), *activation[1:])
        if self.activation is not None and self.activation[0] not in self.activations:
            raise OptionError(f"{type(self).__name__} has no activation {self.activation[0]!r}")
        self.residual = residual if residual is None or isinstance(residual, str) else Grid.from_config(residual)
        self.register_buffer("weight", torch.zeros(tuple(weight_shape), dtype=dtype))
        self.register_buffer("weight_scale", torch.ones(weight_shape[0]) if scaled else None)
        self.register_buffer("bias", torch.zeros(weight_shape[0]) if bias else None)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that all layers share."""
        residual = self.residual
        return {
            "bias": self.bias is not None,
            "output": None if self.output is None else self.output.config(),
            "activation": None if self.activation is None else list(self.activation),
            "residual": residual.config() if isinstance(residual, Grid) else residual,
        }

    def repack(self) -> None:
        """Forget what was derived from tensors and grids. To be called after changing them in place."""
        raise NotImplementedError

    def _real_weight(self) -> torch.Tensor:
        """The weight in float32."""
        weight = self.weight.float()
        return weight if self.weight_scale is None else weight * self.weight_scale.view(-1, *[1] * (weight.ndim - 1))

    def _products(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The layer on real numbers, bias included."""
        raise NotImplementedError

    def _activated(self, result: torch.Tensor) -> torch.Tensor:
        """The activation of real numbers."""
        return result if self.activation is None else self.activations[self.activation[0]](result, *self.activation[1:])

    def _result_shape(self, input: torch.Size) -> tuple[int, ...]:
        """The shape of the layer's own result, without a residual."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:  # .half() and .double() are for others
                self._buffers[name] = old.to(new.device)
        self.repack()
        return self


class Convolution(Layer):
    """Geometry of a convolution with one, two or three spatial dimensions.

    Args:
        in_channels, out_channels, groups: as in `torch.nn.Conv2d`.
        kernel_size, stride, padding, dilation: one number for each spatial dimension.
        options, named: what the layer of the target takes behind the shape of the weight: bias and so on.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        *options: Any,
        **named: Any,
    ) -> None:
        super().__init__((out_channels, in_channels // groups, *kernel_size), *options, **named)
        self.in_channels, self.out_channels, self.groups = int(in_channels), int(out_channels), int(groups)
        self.kernel_size, self.stride = list(kernel_size), list(stride)
        self.padding, self.dilation = list(padding), list(dilation)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            **super().config(),
        }

    def _products(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        convolve = _CONVOLUTIONS[len(self.kernel_size)]
        return convolve(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def _result_shape(self, input: torch.Size) -> tuple[int, ...]:
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        sizes = [
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(input[-len(self.stride) :], *geometry, strict=True)
        ]
        return (*input[: -len(self.stride) - 1], self.out_channels, *sizes)


class Linear(Layer):
    """Sizes of a linear layer on inputs of shape (..., in_features).

    Args:
        in_features, out_features: as in `torch.nn.Linear`.
        options, named: what the layer of the target takes behind the shape of the weight: bias and so on.
    """

    def __init__(self, in_features: int, out_features: int, *options: Any, **named: Any) -> None:
        super().__init__((out_features, in_features), *options, **named)
        self.in_features, self.out_features = int(in_features), int(out_features)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {"in_features": self.in_features, "out_features": self.out_features, **super().config()}

    def _products(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(input, weight, self.bias)

    def _result_shape(self, input: torch.Size) -> tuple[int, ...]:
        return (*input[:-1], self.out_features)
