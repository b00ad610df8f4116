"""Real numbers to 8-bit integers and back, as modules of a lowered CPU graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from fxcompress.emit.grid_state import NumbersInState, grids_of, take_grids
from fxcompress.errors import InputError, UnsupportedError
from fxcompress.quant.spec import Grid

#: The memory format in which kernels want images and volumes, by the number of dimensions.
MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor (batch, channels, *spatial) whose channels lie side by side."""
    strides, step = [0] * len(shape), 1
    for axis in (1, *reversed(range(2, len(shape))), 0):
        strides[axis], step = step, step * shape[axis]
    return tuple(strides)


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Return the common shape. (`torch.broadcast_shapes` loads sympy.)"""
    dimensions = max(map(len, shapes))
    result = []
    for sizes in zip(*((1,) * (dimensions - len(shape)) + tuple(shape) for shape in shapes), strict=True):
        others = {size for size in sizes if size != 1}
        if len(others) > 1:
            raise InputError(f"shapes {', '.join(str(tuple(shape)) for shape in shapes)} do not fit each other")
        result.append(others.pop() if others else 1)
    return tuple(result)


def images_outline(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor (batch, channels, *spatial) without numbers whose channels lie side by side."""
    if min(shape) < 0:
        raise InputError(f"no result of shape {tuple(shape)} can be made")
    return torch.empty_strided(tuple(shape), channels_last_strides(shape), dtype=dtype, device="meta")


def outline_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor without numbers that lies as another one does."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta")


def laid_out(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor with the given strides: the same one, if it has them."""
    return x if x.stride() == strides else torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)


class Kernel(NumbersInState):
    """What the modules of a lowered graph share: they are rebuilt from `config()` and a `state_dict`.

    Every `Grid` among the attributes of a module is part of its state.
    """

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments as plain Python values that JSON can hold."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Build the module that `config()` described; `load_state_dict` fills its tensors."""
        return cls(**config)

    def outline(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return a result without numbers for inputs without numbers, all of the device "meta".

        Kernels say it themselves, because much of PyTorch has to be loaded to run its operators on that device.

        Raises:
            InputError: the module does not take such inputs.
        """
        state = {name: part.to("meta") for name, part in (*self.named_parameters(), *self.named_buffers())}
        found: torch.Tensor = functional_call(self, state, inputs)
        return found

    def extra_repr(self) -> str:
        """The config, for the printed module."""
        return ", ".join(f"{name}={value}" for name, value in self.config().items())

    def state_numbers(self) -> dict[str, list[float]]:
        """Return the grids, by name."""
        return grids_of(self)

    def take_state_numbers(self, numbers: dict[str, list[float]]) -> None:
        """Take other grids."""
        take_grids(self, numbers)


def has_kernels(module: nn.Module) -> bool:
    """Whether a module, or a part of it, is a module of a lowered graph."""
    return any(isinstance(part, Kernel) for part in module.modules())


class Quantize(Kernel):
    """Real numbers to uint8, channels last where there are images.

    Args:
        grid: scale, zero point, smallest and largest integer, as `Grid.config()` gives them.
    """

    def __init__(self, grid: Sequence[Any]) -> None:
        super().__init__()
        self.grid = Grid.from_config(grid)
        self._inverse = inverse(self.grid.scale)

    def repack(self) -> None:
        """Derive the factor anew."""
        self._inverse = inverse(self.grid.scale)

    def outline(self, *inputs: torch.Tensor) -> torch.Tensor:
        """As in `Kernel`."""
        (input,) = inputs
        if isinstance(input, torch.Tensor) and not input.dtype.is_floating_point:  # fx traces with proxies
            raise InputError(f"numbers to be quantised must be floating point, not {input.dtype}")
        images = input.ndim in MEMORY_FORMATS
        return images_outline(input.shape, torch.uint8) if images else outline_like(input, torch.uint8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the integers nearest to `input`, a float tensor of any shape.

        Raises:
            InputError: it is a tensor of integers.
            UnsupportedError: somebody looks on who cannot follow 8-bit kernels: `torch.jit`, or torch's ONNX exporter.
        """
        if torch._C._get_tracing_state() is not None or (type(input) is not torch.Tensor and _is_for_onnx()):
            raise UnsupportedError(
                "torch.jit and torch.onnx cannot follow 8-bit kernels. Keep the module with save(path); for ONNX, end "
                "the passes with 'insert-observers, calibrate, convert-observed' and call export_onnx(path)"
            )
        if isinstance(input, torch.Tensor) and not input.dtype.is_floating_point:
            raise InputError(f"numbers to be quantised must be floating point, not {input.dtype}")
        memory_format = MEMORY_FORMATS.get(input.ndim)
        if memory_format is not None:
            input = input.contiguous(memory_format=memory_format)
        return _store(input.detach().mul(self._inverse), self.grid)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {"grid": self.grid.config()}


class Dequantize(Kernel):
    """uint8 to float32 numbers.

    Args:
        grid: as `Grid.config()` gives it.
    """

    def __init__(self, grid: Sequence[Any]) -> None:
        super().__init__()
        self.grid = Grid.from_config(grid)

    def outline(self, *inputs: torch.Tensor) -> torch.Tensor:
        """As in `Kernel`."""
        return outline_like(inputs[0], torch.float32)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the real numbers that integers of any shape stand for."""
        return real(input, self.grid)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {"grid": self.grid.config()}


def _is_for_onnx() -> bool:
    return bool(torch.onnx.is_in_onnx_export())


def inverse(scale: float) -> float:
    """Return 1 / scale, rounded to float32 as `fake_quantize_per_tensor_affine` rounds it."""
    return float(torch.tensor(scale, dtype=torch.float32).reciprocal())


def integers(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the uint8 numbers nearest to a float tensor, whose memory is reused on the way."""
    return _store(x.mul_(inverse(grid.scale)), grid)


def _store(steps: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round, shift, clamp and convert, in place.

    Converting float to int8 is several times faster in PyTorch than to uint8, so the numbers take that way, 128 lower.
    """
    steps = steps.round_().add_(grid.zero_point - 128).clamp_(grid.quant_min - 128, grid.quant_max - 128)
    return steps.to(torch.int8).view(torch.uint8).bitwise_xor_(128)


def real(q: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the float32 numbers that uint8 integers stand for."""
    x = q.to(torch.float32)
    if grid.zero_point:
        x = x.sub_(grid.zero_point)
    return x.mul_(grid.scale)


def without_kernels(x: torch.Tensor) -> bool:
    """Whether a tensor is of a kind that kernels cannot take: fake, traced, or on another device than the CPU."""
    return type(x) is not torch.Tensor or x.device.type != "cpu"
