"""Sums, products, pooling and batch norms of 8-bit values, as modules of a lowered CPU graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxcompress.emit import onednn
from fxcompress.emit.cpu_layers import Int8Conv
from fxcompress.emit.cpu_numbers import (
    Kernel,
    broadcast,
    channels_last_strides,
    images_outline,
    integers,
    laid_out,
    outline_like,
    real,
    without_kernels,
)
from fxcompress.emit.pooling import AVERAGES, MaxPool
from fxcompress.errors import InputError
from fxcompress.quant.cpu import cpu_features
from fxcompress.quant.spec import Grid


class _Binary(Kernel):
    """Base of sum and product.

    Args:
        left, right: grids of the two inputs; None for an input of float32.
        output: grid of the result.
        relu: whether negative results become zero.
    """

    def __init__(
        self, left: Sequence[Any] | None, right: Sequence[Any] | None, output: Sequence[Any], relu: bool = False
    ) -> None:
        super().__init__()
        self.left = None if left is None else Grid.from_config(left)
        self.right = None if right is None else Grid.from_config(right)
        self.output = Grid.from_config(output)
        self.relu = bool(relu)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "left": None if self.left is None else self.left.config(),
            "right": None if self.right is None else self.right.config(),
            "output": self.output.config(),
            "relu": self.relu,
        }

    def outline(self, *inputs: torch.Tensor) -> torch.Tensor:
        """As in `Kernel`."""
        shape = broadcast(*(one.shape for one in inputs))
        if len(shape) > 2:
            return images_outline(shape, torch.uint8)
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    def _numbers(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            left if self.left is None else real(left, self.left),
            right if self.right is None else real(right, self.right),
        )

    def _store(self, result: torch.Tensor) -> torch.Tensor:
        return integers(result.relu_() if self.relu else result, self.output)


class Int8Add(_Binary):
    """Sum of two 8-bit values.

    Images of one shape take the kernel of a depthwise convolution, whose weights are all 1 and whose residual is the
    second addend. (PyTorch's own `onednn.qadd` reads the upper half of the uint8 numbers as negative.)
    """

    def __init__(
        self, left: Sequence[Any] | None, right: Sequence[Any] | None, output: Sequence[Any], relu: bool = False
    ) -> None:
        super().__init__(left, right, output, relu)
        # Derived at the first call. In a tuple, so that it is no child module: it is not part of the state.
        self._layer: tuple[Int8Conv, ...] = ()

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return the sum of two tensors that broadcast to one shape, on the output grid."""
        if left.ndim == 4 and left.shape == right.shape and not without_kernels(left) and cpu_features().kernels:
            if not self._layer or self._layer[0].out_channels != left.shape[1]:
                self._layer = (self._depthwise(left.shape[1]),)
            return self._layer[0](left, right)  # type: ignore[no-any-return]
        first, second = self._numbers(left, right)
        return self._store(first + second)

    def _depthwise(self, channels: int) -> Int8Conv:
        config = self.config()
        layer = Int8Conv(
            channels, channels, [1, 1], [1, 1], [0, 0], [1, 1], channels, bias=False,
            input=config["left"], output=config["output"], residual=config["right"],
            activation=("clamp", 0.0, None) if self.relu else None,
        )  # fmt: skip
        layer.weight.fill_(1)
        return layer

    def repack(self) -> None:
        """Forget the layer derived from the grids."""
        self._layer = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layer": ()}


class Int8Mul(_Binary):
    """Product of two values, of which at least one is 8-bit: a gate on a feature map, for example."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return the product of two tensors that broadcast to one shape, on the output grid."""
        first, second = self._numbers(left, right)
        return self._store(first * second)


class Int8Affine(Kernel):
    """A factor and a summand for each channel, as batch norm has them in evaluation mode.

    Args:
        channels: how many.
        input, output: grids.
        relu: whether negative results become zero.

    Attributes:
        scale, shift: float32 (channels,).
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, channels: int, input: Sequence[Any], output: Sequence[Any], relu: bool = False) -> None:
        super().__init__()
        self.input, self.output = Grid.from_config(input), Grid.from_config(output)
        self.relu = bool(relu)
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("shift", torch.zeros(channels))

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "channels": len(self.scale),
            "input": self.input.config(),
            "output": self.output.config(),
            "relu": self.relu,
        }

    def outline(self, *inputs: torch.Tensor) -> torch.Tensor:
        """As in `Kernel`."""
        (input,) = inputs
        if input.ndim < 2 or input.shape[1] != len(self.scale):
            raise InputError(f"{type(self).__name__} takes {len(self.scale)} channels, not {tuple(input.shape)}")
        return outline_like(input, torch.uint8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return y = x scale + shift for a tensor (n, channels, ...) on the input grid, on the output grid."""
        shape = (-1, *[1] * (input.ndim - 2))
        result = torch.addcmul(self.shift.view(shape), real(input, self.input), self.scale.view(shape))
        return integers(result.relu_() if self.relu else result, self.output)


class Int8MaxPool(MaxPool):
    """Maximum over windows of uint8 numbers, on the grid of the input: one dimension after the other.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: see `MaxPool`.
    """

    _run: onednn.Run | None = None  #: derived at the first call

    def outline(self, *inputs: torch.Tensor) -> torch.Tensor:
        """As in `Kernel`."""
        (input,) = inputs
        if input.ndim != len(self.kernel_size) + 2:
            return super().outline(input)
        return images_outline((*input.shape[:2], *self._geometry(input)[0]), torch.uint8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the maxima of a tensor of shape (..., *spatial)."""
        if without_kernels(input) or input.ndim != len(self.kernel_size) + 2 or not cpu_features().kernels:
            return self._in_slices(input)
        self._run = self._run or onednn.ByShape(self._primitive, lambda x: self._in_slices)
        return self._run(input)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}

    def _primitive(self, input: torch.Tensor) -> onednn.Run:
        sizes, pads = self._geometry(input)
        shape = (*input.shape[:2], *sizes)
        taken, made = channels_last_strides(input.shape), channels_last_strides(shape)
        primitive = onednn.max_pooling(
            onednn.Memory(input.shape, torch.uint8, taken), onednn.Memory(shape, torch.uint8, made),
            self.kernel_size, self.stride, self.dilation, *zip(*pads, strict=True),
        )  # fmt: skip

        def run(x: torch.Tensor) -> torch.Tensor:
            result = torch.empty_strided(shape, made, dtype=torch.uint8)
            primitive(laid_out(x, taken), result)
            return result

        return run

    def _geometry(self, input: torch.Tensor) -> tuple[list[int], list[tuple[int, int]]]:
        """Sizes of the result, and the padding before and behind, of every spatial dimension."""
        sizes, pads = [], []
        for index in range(len(self.kernel_size)):
            count, behind = self._windows(index, int(input.shape[index - len(self.kernel_size)]))
            sizes.append(count)
            pads.append((self.padding[index], behind))
        return sizes, pads

    def _in_slices(self, input: torch.Tensor) -> torch.Tensor:
        sizes, pads = self._geometry(input)
        if any(before > 0 or behind > 0 for before, behind in pads):
            flat = [amount for pair in reversed(pads) for amount in (pair[0], max(pair[1], 0))]
            input = F.pad(input, flat, value=0)  # the smallest number of every grid
        for index, count in enumerate(sizes):
            input = self._along(input, index, count)
        return input

    def _windows(self, index: int, size: int) -> tuple[int, int]:
        """Return how many windows there are along a dimension, and the padding that the last one needs behind."""
        stride, before = self.stride[index], self.padding[index]
        reach = self.dilation[index] * (self.kernel_size[index] - 1) + 1
        room = size + 2 * before - reach
        count = (-(-room // stride) if self.ceil_mode else room // stride) + 1
        if self.ceil_mode and (count - 1) * stride >= size + before:
            count -= 1  # the last window must start inside the input or the padding before it
        return count, (count - 1) * stride + reach - size - before

    def _along(self, x: torch.Tensor, index: int, count: int) -> torch.Tensor:
        axis = index - len(self.kernel_size)
        stride, span = self.stride[index], (count - 1) * self.stride[index] + 1
        steps = [step * self.dilation[index] for step in range(self.kernel_size[index])]
        slices = [_strided(x, axis, start, start + span, stride) for start in steps]
        if len(slices) == 1:
            return slices[0].clone()
        result = torch.maximum(slices[0], slices[1])
        for piece in slices[2:]:
            torch.maximum(result, piece, out=result)
        return result


def _strided(x: torch.Tensor, axis: int, start: int, stop: int, step: int) -> torch.Tensor:
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, stop, step)
    return x[tuple(index)]


class Int8AvgPool(Kernel):
    """Average over windows, or over whole dimensions, of 8-bit values.

    Args:
        input, output: grids.
        operation: "avg_pool", "adaptive_avg_pool" or "mean".
        dimensions: number of spatial dimensions of the pooling; 0 for "mean".
        arguments: the further arguments of that function of `torch.nn.functional`, or of `torch.mean`, by name.
    """

    def __init__(
        self,
        input: Sequence[Any],
        output: Sequence[Any],
        operation: str,
        dimensions: int,
        arguments: dict[str, Any],
    ) -> None:
        super().__init__()
        self.input, self.output = Grid.from_config(input), Grid.from_config(output)
        self.operation, self.dimensions, self.arguments = operation, int(dimensions), dict(arguments)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "input": self.input.config(),
            "output": self.output.config(),
            "operation": self.operation,
            "dimensions": self.dimensions,
            "arguments": self.arguments,
        }

    def outline(self, *inputs: torch.Tensor) -> torch.Tensor:
        """As in `Kernel`."""
        shape, given = list(inputs[0].shape), self.arguments
        if self.operation == "adaptive_avg_pool":
            wanted = given["output_size"]
            wanted = [wanted] * self.dimensions if isinstance(wanted, int) else list(wanted)
            for axis, size in zip(range(-self.dimensions, 0), wanted, strict=True):
                shape[axis] = shape[axis] if size is None else size
        elif self.operation == "mean":
            dims = [given["dim"]] if isinstance(given["dim"], int) else given["dim"]
            averaged = {range(len(shape))[dim] for dim in dims}
            keep = bool(given.get("keepdim"))
            shape = [1 if axis in averaged else size for axis, size in enumerate(shape) if keep or axis not in averaged]
        else:
            return outline_like(self._average_of(outline_like(inputs[0], torch.float32)), torch.uint8)
        if len(shape) > 2:
            return images_outline(shape, torch.uint8)
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the averages of uint8 numbers on the input grid, on the output grid."""
        return integers(self._average_of(real(input, self.input)), self.output)

    def _average_of(self, values: torch.Tensor) -> torch.Tensor:
        if self.operation == "mean":
            return values.mean(**self.arguments)
        average: Callable[..., torch.Tensor] = AVERAGES[self.operation][self.dimensions]
        return average(values, **self.arguments)
