"""8-bit convolution and linear layers, as modules of a lowered CPU graph.

Each module keeps plain tensors (int8 weight, its scales, a float bias) and plain numbers (grids, strides, the
activation), so that its `state_dict` is portable and `config()` describes the rest. What oneDNN's kernels want
besides, weights packed for this machine above all, is derived at the first call and never stored, copied or pickled.

Where there is no kernel (another machine, another device, a fake tensor that carries only a shape), the same module
computes in float arithmetic: to real numbers, the layer, back to integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxcompress.emit import onednn
from fxcompress.emit.cpu_numbers import (
    broadcast,
    channels_last_strides,
    images_outline,
    integers,
    laid_out,
    real,
    without_kernels,
)
from fxcompress.emit.layers import Convolution, Layer, Linear
from fxcompress.errors import InputError
from fxcompress.quant.cpu import cpu_features
from fxcompress.quant.spec import REDUCED_WEIGHT_LIMIT, Grid

Run = Callable[..., torch.Tensor]

_LARGEST = torch.finfo(torch.float32).max

#: oneDNN's words for activations. A clamp from zero upwards is "relu", none at all is "none".
_WORDS = {"clamp": "hardtanh", "hardswish": "hardswish", "silu": "swish", "gelu": "gelu", "leaky_relu": "leaky_relu",
          "tanh": "tanh"}  # fmt: skip


class QuantizedLayer(Layer):
    """What all layers with int8 weights share.

    Args:
        weight_shape, bias, output, activation, residual: see `Layer`; what is real is float32. A residual that has not
            the result's shape takes an add of its own.
        overwrite: whether the result may use the memory of the second input.
    """

    weight_scale: torch.Tensor

    def __init__(
        self,
        weight_shape: Sequence[int],
        bias: bool,
        output: Sequence[Any] | None = None,
        activation: Sequence[Any] | None = None,
        residual: Sequence[Any] | str | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__(weight_shape, bias, output, activation, residual)
        self.overwrite = bool(overwrite)
        self._run: Run | None = None  # derived from all of the above at the first call

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that all layers share."""
        return {**super().config(), "overwrite": self.overwrite}

    def repack(self) -> None:
        """As in `Layer`."""
        self._run = None

    def _has_kernel(self) -> bool:
        """Whether this machine multiplies bytes by these weights without saturation."""
        features = cpu_features()
        if not features.kernels or self.weight.device.type != "cpu" or self.weight.numel() == 0:
            return False
        largest = max(-int(self.weight.min()), int(self.weight.max()))
        return features.vnni or largest <= REDUCED_WEIGHT_LIMIT

    def _finish(self, result: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """What follows products and bias, by PyTorch."""
        if residual is not None:
            result = result + (real(residual, self.residual) if isinstance(self.residual, Grid) else residual)
        result = self._activated(result)
        return result if self.output is None else integers(result, self.output)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}


class Int8Layer(QuantizedLayer):
    """What convolution and linear on integers share.

    Args:
        input: grid of the input.
        weight_shape, bias, output, activation, residual, overwrite: see `QuantizedLayer`.
    """

    def __init__(
        self,
        weight_shape: Sequence[int],
        bias: bool,
        input: Sequence[Any],
        output: Sequence[Any] | None = None,
        activation: Sequence[Any] | None = None,
        residual: Sequence[Any] | str | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__(weight_shape, bias, output, activation, residual, overwrite)
        self.input = Grid.from_config(input)

    def outline(self, *inputs: torch.Tensor) -> torch.Tensor:
        """As in `Kernel`."""
        shape = self._result_shape(self._fitting(inputs[0]).shape)
        shape = broadcast(shape, *(residual.shape for residual in inputs[1:]))
        dtype = torch.float32 if self.output is None else torch.uint8
        if isinstance(self, Int8Conv):
            return images_outline(shape, dtype)
        return torch.empty(shape, dtype=dtype, device="meta")

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's result for uint8 numbers on the input grid, and for a second input if it takes one."""
        run = self._run
        if run is None or without_kernels(input):
            run = self._prepare(input)
        return run(input) if residual is None else run(input, residual)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that all layers on integers share."""
        return {"input": self.input.config(), **super().config()}

    # What is derived

    def _prepare(self, input: torch.Tensor) -> Run:
        if without_kernels(input) or not self._has_kernel():
            return self._in_floats
        self._run = self._with_kernel(input)
        return self._run

    def _with_kernel(self, input: torch.Tensor) -> Run:
        word, arguments, algorithm = self._kernel_activation()
        if self.residual is None and word in self._words():
            return self._clamped(
                onednn.ByShape(
                    lambda x: self._primitive(self._fitting(x), word, arguments, algorithm),
                    lambda x: self._kernel(x, word, arguments, algorithm),
                )
            )
        same_kind = isinstance(self.residual, Grid) == (self.output is not None)
        if self.residual is not None and same_kind and word in self._summing_words():
            kernel = onednn.ByShape(
                lambda x: self._primitive(self._fitting(x), word, arguments, algorithm),
                lambda x: self._summing_kernel(x, word),
            )
            return self._summing(self._clamped(kernel))
        return self._finishing_outside(input)

    def _fitting(self, input: torch.Tensor) -> torch.Tensor:
        """Return an input of a new shape, for which kernels, that look at addresses only, are about to be made.

        Raises:
            InputError: the layer does not take this shape.
        """
        count, axis = self._inputs()
        if input.ndim < -axis or input.shape[axis] != count:
            raise InputError(
                f"{type(self).__name__} takes {count} input channels or features (dimension {axis}), "
                f"but its input has shape {tuple(input.shape)}"
            )
        return input

    def _inputs(self) -> tuple[int, int]:
        """How many channels or features the input must have, and along which axis."""
        raise NotImplementedError

    def _primitive(self, input: torch.Tensor, word: str, arguments: list[Any], algorithm: str) -> Run:
        """Return a function of the input, and of the residual if there is one, that executes a prepared primitive.

        Raises:
            KernelUnavailable: there is none for this layer.
        """
        raise NotImplementedError

    def _attributes(self, word: str, arguments: list[Any], algorithm: str, weight_mask: int) -> onednn.Attributes:
        """Scales of the layer, and the operations behind its products."""
        made = onednn.Attributes()
        made.scale(onednn.SOURCE, torch.tensor(self.input.scale))
        made.scale(onednn.WEIGHTS, self.weight_scale, weight_mask)
        scale, zero_point, dtype = self._result()
        if dtype == torch.uint8:
            made.scale(onednn.RESULT, torch.tensor(scale))
            made.zero_point(onednn.RESULT, zero_point)
        if self.residual is not None:
            made.add_to_result(*self._accumulator(), dtype)
        made.activation(word, arguments, algorithm)
        return made

    def _kernel(self, input: torch.Tensor, word: str, arguments: list[Any], algorithm: str) -> Run:
        """Return a function of the input that calls PyTorch's operator."""
        raise NotImplementedError

    def _words(self) -> tuple[str, ...]:
        """The activations that the kernel computes; found by trying each one."""
        raise NotImplementedError

    def _summing_words(self) -> tuple[str, ...]:
        """The activations that the kernel computes behind the sum with a residual."""
        raise NotImplementedError

    def _summing_kernel(self, input: torch.Tensor, word: str) -> Run:
        """Return a function of the input and the residual that calls PyTorch's operator."""
        raise NotImplementedError

    def _summing(self, kernel: Run) -> Run:
        """The summing kernel for a residual of the result's shape, which it takes for granted; an add for any other."""
        apart: Run | None = None
        fitting: tuple[torch.Size, torch.Size] | None = None  # the shapes of the last call

        def run(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            nonlocal apart, fitting
            shapes = (x.shape, residual.shape)
            if shapes != fitting:
                if residual.shape != self._result_shape(x.shape):
                    apart = apart or self._finishing_outside(x)
                    return apart(x, residual)
                fitting = shapes
            return kernel(x, residual)

        return run

    def _finishing_outside(self, input: torch.Tensor) -> Run:
        """A kernel for the products alone, with a float result; everything behind them by PyTorch."""
        plain = self.from_config({**self.config(), "output": None, "activation": None, "residual": None})
        plain.weight, plain.weight_scale, plain.bias = self.weight, self.weight_scale, self.bias
        multiply = plain._with_kernel(input)
        return lambda x, residual=None: self._finish(multiply(x), residual)

    def _clamped(self, run: Run) -> Run:
        """Clip what the kernel stored to a range narrower than 0..255, unless its activation has done it."""
        grid = self.output
        if grid is None or (grid.quant_min, grid.quant_max) == (0, 255):
            return run
        low, high = grid.quant_min, grid.quant_max
        return lambda *inputs: run(*inputs).clamp_(low, high)

    # The layer in float arithmetic

    def _in_floats(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self._finish(self._products(real(input, self.input), self._real_weight()), residual)

    # What kernels are given

    def _kernel_activation(self) -> tuple[str, list[Any], str]:
        """Return oneDNN's word for the activation, its arguments and its algorithm.

        Storing a result in 8 bits clips it to what its grid holds. A clamp that does no more than that is left out.
        """
        if self.activation is None:
            return "none", [], "none"
        name, *arguments = self.activation
        word = _WORDS[name]
        if name == "gelu":
            return word, [], arguments[0]
        if name != "clamp":
            return word, arguments, "none"
        low, high = (
            limit if limit is not None else sign * math.inf for sign, limit in zip((-1, 1), arguments, strict=True)
        )
        if self.output is not None:
            half = self.output.scale / 2
            low = -math.inf if low <= half - self.output.scale * self.output.zero_point else low
            high = math.inf if high >= self.output.scale * (255 - self.output.zero_point) - half else high
        if math.isinf(high) and (math.isinf(low) or low == 0):
            return ("none" if math.isinf(low) else "relu"), [], "none"
        return word, [max(low, -_LARGEST), min(high, _LARGEST)], "none"

    def _result(self) -> tuple[float, int, torch.dtype]:
        """Scale, zero point and dtype of the result."""
        if self.output is None:
            return 1.0, 0, torch.float32
        return self.output.scale, self.output.zero_point, torch.uint8

    def _accumulator(self) -> tuple[float, int]:
        """Scale and zero point of the residual."""
        return (self.residual.scale, self.residual.zero_point) if isinstance(self.residual, Grid) else (1.0, 0)

    def _bias_with_zero_point(self) -> torch.Tensor | None:
        """The bias of the same layer on integers without zero point: sum w (q - z) + b = sum w q + (b - z sum w)."""
        if not self.input.zero_point:
            return self.bias
        sums = _row_sums(self.weight.flatten(1))
        shift = sums.double() * self.weight_scale.double() * (self.input.scale * self.input.zero_point)
        return (-shift if self.bias is None else self.bias.double() - shift).float()


def _row_sums(weight: torch.Tensor) -> torch.Tensor:
    """Return int64 sums of the rows, a few at a time: adding up in 64 bits makes a copy in 64 bits.

    The copies share one place. Each in a place of its own would be freed, and yet add up: glibc does not use aligned
    memory again for a piece of the same size.
    """
    sums = weight.new_empty(len(weight), dtype=torch.int64)
    some = max(1, _ADDED_AT_ONCE // max(1, weight.shape[1]))
    place = weight.new_empty(some, weight.shape[1], dtype=torch.int64)
    for rows, found in zip(weight.split(some), sums.split(some), strict=True):
        torch.sum(place[: len(rows)].copy_(rows), 1, out=found)
    return sums


#: Numbers that are added up at once.
_ADDED_AT_ONCE = 1 << 17


class Int8Conv(Convolution, Int8Layer):
    """Convolution with one, two or three spatial dimensions.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: see `Convolution`.
        bias, input, output, activation, residual, overwrite: see `Int8Layer`.
    """

    def _inputs(self) -> tuple[int, int]:
        return self.in_channels, -len(self.kernel_size) - 1

    # A kernel with one spatial dimension knows few activations and no sum, so that one is made two.

    def _words(self) -> tuple[str, ...]:
        return ("none",) if len(self.kernel_size) == 3 else ("none", "relu", "hardtanh", "hardswish", "swish")

    def _summing_words(self) -> tuple[str, ...]:
        return () if len(self.kernel_size) == 3 else ("none", "relu")

    def _primitive(self, input: torch.Tensor, word: str, arguments: list[Any], algorithm: str) -> Run:
        enter = self._entrance()
        x = input if enter is None else enter(input)
        padding = self.padding if enter is None else [0] * len(self.padding)
        dtype = self._result()[2]
        shape = self._result_shape(input.shape)
        if len(shape) != len(self.stride) + 2:
            raise onednn.KernelUnavailable("an image without a batch dimension")
        taken, made = channels_last_strides(x.shape), channels_last_strides(shape)
        primitive = onednn.convolution(
            onednn.Memory(x.shape, torch.uint8, taken), self.weight, self._bias_with_zero_point(),
            onednn.Memory(shape, dtype, made), (self.stride, padding, self.dilation, self.groups),
            self._attributes(word, arguments, algorithm, 3 if self.groups > 1 else 1),
        )  # fmt: skip

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            if enter is not None:
                x = enter(x)
            if residual is None:
                result = torch.empty_strided(shape, made, dtype=dtype)
            elif self.overwrite and residual.stride() == made:
                result = residual
            else:
                result = torch.empty_strided(shape, made, dtype=dtype).copy_(residual)
            primitive(laid_out(x, taken), result)
            return result

        return run

    def _packed(self, shape: Sequence[int]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The operator's arguments from the input's scale to the weight, and from the bias to the dtype of the result.

        The input's zero point costs the kernel up to twice its time, so it is folded into the bias; `_entrance` does
        the padding that it stands for.
        """
        weight, stride, padding, dilation = self.weight, self.stride, self.padding, self.dilation
        if self.input.zero_point:
            shape = [*shape[:2], *(size + 2 * more for size, more in zip(shape[2:], padding, strict=True))]
            padding = [0] * len(stride)
        if len(stride) == 1:
            weight, shape = weight.unsqueeze(2), [*shape[:2], 1, shape[2]]
            stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
        geometry = (stride, padding, dilation, self.groups)
        scale = self.input.scale
        packed = torch.ops.onednn.qconv_prepack(weight, self.weight_scale, scale, 0, *geometry, list(shape))
        zeros = torch.zeros(self.out_channels, dtype=torch.int32)
        bias = self._bias_with_zero_point()
        return (scale, 0, packed, self.weight_scale, zeros), (bias, *geometry, *self._result())

    def _entrance(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What happens to the input before the kernel sees it: a padding with its zero point."""
        zero_point = self.input.zero_point
        if not zero_point or not any(self.padding):
            return None
        amounts = [amount for size in reversed(self.padding) for amount in (size, size)]
        return lambda x: F.pad(x, amounts, value=zero_point)

    def _kernel(self, input: torch.Tensor, word: str, arguments: list[Any], algorithm: str) -> Run:
        before, after = self._packed(input.shape)
        rest = (*before, *after, word, arguments, "")
        operators = torch.ops.onednn
        call = (operators.qconv3d_pointwise if len(self.stride) == 3 else operators.qconv2d_pointwise).default
        enter, flat = self._entrance(), len(self.stride) == 1
        if flat:
            return lambda x: call((enter(x) if enter else x).unsqueeze(2), *rest).squeeze(2)
        if enter:
            return lambda x: call(enter(x), *rest)
        return lambda x: call(x, *rest)

    def _summing_kernel(self, input: torch.Tensor, word: str) -> Run:
        call = torch.ops.onednn.qconv2d_pointwise.binary
        before, after = self._packed(input.shape)
        rest = (*after, *self._accumulator(), "sum", 1.0, word, [], "")
        take = torch.Tensor.contiguous if self.overwrite else torch.clone
        enter, flat = self._entrance(), len(self.stride) == 1

        def run(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            if enter is not None:
                x = enter(x)
            if flat:
                x, residual = x.unsqueeze(2), residual.unsqueeze(2)
            total = take(residual, memory_format=torch.channels_last)
            result: torch.Tensor = call(x, *before, total, *rest)
            return result.squeeze(2) if flat else result

        return run


class Int8Linear(Linear, Int8Layer):
    """Linear layer on inputs of shape (..., in_features).

    Args:
        in_features, out_features: as in `torch.nn.Linear`.
        bias, input, output, activation, residual, overwrite: see `Int8Layer`.
    """

    def _inputs(self) -> tuple[int, int]:
        return self.in_features, -1

    def _primitive(self, input: torch.Tensor, word: str, arguments: list[Any], algorithm: str) -> Run:
        dtype = self._result()[2]
        rows, shape = input.numel() // self.in_features, self._result_shape(input.shape)
        primitive = onednn.linear(
            onednn.Memory((rows, self.in_features), torch.uint8, (self.in_features, 1)), self.weight,
            self._bias_with_zero_point(),
            onednn.Memory((rows, self.out_features), dtype, (self.out_features, 1)),
            self._attributes(word, arguments, algorithm, 1),
        )  # fmt: skip

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            if residual is None:
                result = torch.empty(shape, dtype=dtype)
            elif self.overwrite:
                result = residual.contiguous()
            else:
                result = residual.clone(memory_format=torch.contiguous_format)
            primitive(x.contiguous(), result)
            return result

        return run

    def _packed(self) -> tuple[Any, ...]:
        weight = torch.ops.onednn.qlinear_prepack(self.weight, None)
        zeros = torch.zeros(self.out_features, dtype=torch.int32)
        return self.input.scale, 0, weight, self.weight_scale, zeros

    def _kernel(self, input: torch.Tensor, word: str, arguments: list[Any], algorithm: str) -> Run:
        call = torch.ops.onednn.qlinear_pointwise.default
        rest = (*self._packed(), self._bias_with_zero_point(), *self._result(), word, arguments, algorithm)
        return lambda x: call(x, *rest)

    def _words(self) -> tuple[str, ...]:
        return ("none", "relu", "hardtanh", "hardswish", "swish", "gelu", "leaky_relu", "tanh")

    def _summing_words(self) -> tuple[str, ...]:
        return ("none", "relu")

    def _summing_kernel(self, input: torch.Tensor, word: str) -> Run:
        call = torch.ops.onednn.qlinear_pointwise.binary
        before, bias, overwrite = self._packed(), self._bias_with_zero_point(), self.overwrite
        rest: tuple[Any, ...] = (bias, *self._result(), *self._accumulator(), "sum", 1.0, word, [], "none")

        def run(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            total = residual.contiguous() if overwrite else residual.clone(memory_format=torch.contiguous_format)
            return call(x, *before, total, *rest)  # type: ignore[no-any-return]

        return run
