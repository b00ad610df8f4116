"""What stands between the layers of a graph that was lowered for a GPU: numbers in and out, sums, pooling, norms.

8-bit values are int8 tensors, 128 lower than on their `Grid`, see `layers.py`. Where there is no GPU, everything is
computed by PyTorch's operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxcompress.emit.cpu_numbers import MEMORY_FORMATS, Kernel
from fxcompress.emit.cuda import device, pointwise_launch
from fxcompress.emit.cuda.launch import Ending, Window, keep
from fxcompress.emit.cuda.layers import REALS, bytes_of, real_of
from fxcompress.emit.pooling import AVERAGES, MaxPool
from fxcompress.errors import OptionError
from fxcompress.quant.spec import Grid


def _grid(config: Sequence[Any] | None) -> Grid | None:
    return None if config is None else Grid.from_config(config)


def _config(grid: Grid | None) -> list[Any] | None:
    return None if grid is None else grid.config()


def _stored(x: torch.Tensor, output: Grid | None, real: str) -> torch.Tensor:
    return x.to(REALS[real]) if output is None else bytes_of(x, output)


def _check_real(module: str, real: str) -> str:
    if real not in REALS:
        raise OptionError(f"{module}: real must be one of {', '.join(map(repr, REALS))}, not {real!r}")
    return real


class CudaEnter(Kernel):
    """Real numbers of any dtype and layout to 16 bits, or to 8-bit integers; images with their channels side by side.

    Args:
        grid: of the result; None: it is real.
        real: dtype of a real result: "fp16" or "bf16".
        channels: how many channels images shall have; further ones are the number zero. None: those that there are.
    """

    def __init__(self, grid: Sequence[Any] | None = None, real: str = "fp16", channels: int | None = None) -> None:
        super().__init__()
        self.grid, self.real = _grid(grid), _check_real(type(self).__name__, real)
        self.channels = None if channels is None else int(channels)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {"grid": _config(self.grid), "real": self.real, "channels": self.channels}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the numbers nearest to `input`, a real tensor of any shape."""
        input = input.detach()
        if self.channels is not None and input.ndim == 4 and input.shape[1] < self.channels:
            return self._wider(input)
        return self._converted(input)

    def _wider(self, input: torch.Tensor) -> torch.Tensor:
        wanted = self.channels or input.shape[1]
        if not device.runs_kernels(input) or not input.numel() or input.dtype == torch.float64:
            return self._converted(F.pad(input, (0, 0, 0, 0, 0, wanted - input.shape[1])))
        ending = Ending(result=self.grid)
        return pointwise_launch.combine(input, ending=ending, dtype=REALS[self.real], channels=wanted).launch()

    def _converted(self, input: torch.Tensor) -> torch.Tensor:
        memory_format = MEMORY_FORMATS.get(input.ndim, torch.contiguous_format)
        if self.grid is None and input.dtype == REALS[self.real] and input.is_contiguous(memory_format=memory_format):
            return input
        if device.runs_kernels(input) and input.numel() and input.dtype != torch.float64:
            ending = Ending(result=self.grid)
            return pointwise_launch.combine(input, ending=ending, dtype=REALS[self.real]).launch()
        return _stored(input.contiguous(memory_format=memory_format), self.grid, self.real)


class CudaLeave(Kernel):
    """8-bit integers to real numbers of 16 bits.

    Args:
        grid: as `Grid.config()` gives it.
        real: dtype of the result: "fp16" or "bf16".
    """

    def __init__(self, grid: Sequence[Any], real: str = "fp16") -> None:
        super().__init__()
        self.grid, self.real = Grid.from_config(grid), _check_real(type(self).__name__, real)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {"grid": self.grid.config(), "real": self.real}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the real numbers that integers of any shape stand for."""
        if device.runs_kernels(input) and input.numel():
            return pointwise_launch.combine(input, grids=(self.grid, None), dtype=REALS[self.real]).launch()
        return real_of(input, self.grid).to(REALS[self.real])


class _Binary(Kernel):
    """Base of sum and product.

    Args:
        left, right: grids of the two inputs; None for a real one.
        output: grid of the result; None: it is real.
        relu: whether negative results become zero.
        real: dtype of a real result: "fp16" or "bf16".
    """

    operation = pointwise_launch.ADD

    def __init__(
        self,
        left: Sequence[Any] | None,
        right: Sequence[Any] | None,
        output: Sequence[Any] | None,
        relu: bool = False,
        real: str = "fp16",
    ) -> None:
        super().__init__()
        self.left, self.right, self.output = _grid(left), _grid(right), _grid(output)
        self.relu, self.real = bool(relu), _check_real(type(self).__name__, real)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "left": _config(self.left),
            "right": _config(self.right),
            "output": _config(self.output),
            "relu": self.relu,
            "real": self.real,
        }

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return the result for two tensors that broadcast to one shape."""
        if device.runs_kernels(left) and device.runs_kernels(right) and left.numel() and right.numel():
            ending = Ending(("clamp", 0.0, None) if self.relu else None, result=self.output)
            grids = (self.left, self.right)
            if left.numel() < right.numel():  # the value that goes with the result comes first
                left, right, grids = right, left, (self.right, self.left)
            return pointwise_launch.combine(left, right, self.operation, grids, ending, REALS[self.real]).launch()
        first = left.float() if self.left is None else real_of(left, self.left)
        second = right.float() if self.right is None else real_of(right, self.right)
        result = first + second if self.operation == pointwise_launch.ADD else first * second
        return _stored(result.relu() if self.relu else result, self.output, self.real)


class CudaAdd(_Binary):
    """Sum of two values."""


class CudaMul(_Binary):
    """Product of two values: a gate on a feature map, for example."""

    operation = pointwise_launch.MULTIPLY


class CudaMaxPool(MaxPool):
    """Maximum over windows of 8-bit or real numbers; 8-bit ones stay on their grid.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: see `MaxPool`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the maxima of a tensor of shape (..., *spatial)."""
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(self.kernel_size) - 1]
        arguments = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        if device.runs_kernels(input) and len(self.kernel_size) == 2 and input.ndim == 4 and input.numel():
            sizes = pool(torch.empty(1, *input.shape[2:], device="meta"), *arguments).shape
            pairs = [(values[0], values[1]) for values in (self.kernel_size, self.stride, self.padding, self.dilation)]
            window = Window(1, 1, 1, *pairs)
            return pointwise_launch.max_pool(input, window, (sizes[1], sizes[2])).launch()
        if input.dtype != torch.int8:
            return pool(input, *arguments)
        return pool(input.float(), *arguments).to(torch.int8)


class CudaAvgPool(Kernel):
    """Average over windows, or over whole dimensions, of 8-bit values.

    Args:
        input: grid of the input; None: it is real. output: grid of the result; None: it is real.
        operation: "avg_pool", "adaptive_avg_pool" or "mean".
        dimensions: number of spatial dimensions of the pooling; 0 for "mean".
        arguments: the further arguments of that function of `torch.nn.functional`, or of `torch.mean`, by name.
        real: dtype of a real result: "fp16" or "bf16".
    """

    def __init__(
        self,
        input: Sequence[Any] | None,
        output: Sequence[Any] | None,
        operation: str,
        dimensions: int,
        arguments: dict[str, Any],
        real: str = "fp16",
    ) -> None:
        super().__init__()
        self.input, self.output = _grid(input), _grid(output)
        self.operation, self.dimensions, self.arguments = operation, int(dimensions), dict(arguments)
        self.real = _check_real(type(self).__name__, real)
        self._counters: dict[int, torch.Tensor] = {}

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "input": _config(self.input),
            "output": _config(self.output),
            "operation": self.operation,
            "dimensions": self.dimensions,
            "arguments": self.arguments,
            "real": self.real,
        }

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the averages."""
        keeps = self._whole_images(input.ndim)
        if keeps is not None and device.runs_kernels(input) and input.numel():
            call = pointwise_launch.mean(input, self.input, self.output, self._counters, REALS[self.real])
            keep(call.arguments["arrived"])
            result = call.launch()
            return result if keeps else result.flatten(1)
        values = input.float() if self.input is None else real_of(input, self.input)
        if self.operation == "mean":
            return _stored(values.mean(**self.arguments), self.output, self.real)
        average = AVERAGES[self.operation][self.dimensions]
        return _stored(average(values, **self.arguments), self.output, self.real)

    def takes(self, dimensions: int) -> bool:
        """Whether our own kernel computes the averages of values with so many dimensions."""
        return self._whole_images(dimensions) is not None

    def _whole_images(self, dimensions: int) -> bool | None:
        """Whether averages over whole images keep the dimensions; None: that is not what is computed."""
        if dimensions != 4:
            return None
        if self.operation == "mean":
            dims = self.arguments.get("dim")
            axes = {axis % 4 for axis in dims} if isinstance(dims, (tuple, list)) else set()
            return bool(self.arguments.get("keepdim", False)) if axes == {2, 3} else None
        size = self.arguments.get("output_size")
        sizes = set(size) if isinstance(size, (tuple, list)) else {size}
        return True if self.operation == "adaptive_avg_pool" and self.dimensions == 2 and sizes == {1} else None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._counters = {}
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_counters": {}}


class CudaLayerNorm(Kernel):
    """Layer norm of real numbers, rounded to 8 bits if its readers want that.

    Args:
        normalized_shape: sizes of the last dimensions, over which mean and variance are taken.
        eps: as in `torch.nn.LayerNorm`.
        weight, bias: whether there are such tensors.
        output: grid of the result; None: it is real, of the input's dtype.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None

    #: Rows that are longer are left to PyTorch.
    longest = 16_384

    def __init__(
        self,
        normalized_shape: Sequence[int],
        eps: float,
        weight: bool,
        bias: bool,
        output: Sequence[Any] | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape, self.eps = list(normalized_shape), float(eps)
        self.output = _grid(output)
        self.register_buffer("weight", torch.ones(tuple(normalized_shape)) if weight else None)
        self.register_buffer("bias", torch.zeros(tuple(normalized_shape)) if bias else None)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "normalized_shape": self.normalized_shape,
            "eps": self.eps,
            "weight": self.weight is not None,
            "bias": self.bias is not None,
            "output": _config(self.output),
        }

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the normalised rows of a tensor (..., *normalized_shape)."""
        features = 1
        for size in self.normalized_shape:
            features *= size
        if device.runs_kernels(input) and input.numel() and features <= self.longest:
            call = pointwise_launch.normalize(input, self.weight, self.bias, self.eps, self.output, features)
            return call.launch()
        result = F.layer_norm(input.float(), self.normalized_shape, self.weight, self.bias, self.eps)
        return result.to(input.dtype) if self.output is None else bytes_of(result, self.output)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


#: The module classes of this file, by the name that the artefact writes.
MODULES: dict[str, type[Kernel]] = {
    kernel.__name__: kernel
    for kernel in (CudaEnter, CudaLeave, CudaAdd, CudaMul, CudaMaxPool, CudaAvgPool, CudaLayerNorm)
}
