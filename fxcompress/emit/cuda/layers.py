"""Convolution and linear layers, as modules of a graph that was lowered for a GPU.

Each module keeps plain tensors and plain numbers, like those for CPUs (`emit.cpu_layers`), so that its `state_dict` is
portable. Which of several kernels computes it is found by measuring when it first sees a shape, see `tuning.py`. Where
there is no GPU, the same module computes in float32 by PyTorch's operators.

8-bit values in such a graph are int8 tensors: 128 lower than on their `Grid`, which is written in unsigned numbers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxcompress.emit.cpu_numbers import Kernel, inverse
from fxcompress.emit.cuda import device, launch, pointwise_launch, tuning
from fxcompress.emit.cuda.launch import SHIFT, Blocks, Ending, Packed, Window
from fxcompress.emit.layers import ACTIVATIONS as _SHARED_ACTIVATIONS
from fxcompress.emit.layers import Convolution, Layer, Linear
from fxcompress.emit.layers import activation_of as _shared_activation_of
from fxcompress.errors import OptionError
from fxcompress.graph.devices import in_full_float32
from fxcompress.quant.spec import Grid

Run = Callable[..., torch.Tensor]

#: Words for the dtypes of real numbers.
REALS = {"fp16": torch.float16, "bf16": torch.bfloat16}

#: What the products of a layer may be computed in.
NUMBERS = ("int8", "fp8", *REALS)

#: Shapes of inputs for which a layer remembers how it computes.
_MOST_SHAPES = 64

#: The largest number of 8-bit floating point with four bits of exponent.
FP8_LIMIT = 448.0

#: Activations by name, as float functions of (tensor, *arguments).
ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    **_SHARED_ACTIVATIONS, "sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid,
}  # fmt: skip


def activation_of(kind: str, arguments: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return an activation as (name, *arguments), or None if it is none of `ACTIVATIONS`. See `emit.layers`."""
    return (kind,) if kind in ("sigmoid", "hardsigmoid") else _shared_activation_of(kind, arguments)


def real_of(q: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the float32 numbers that signed 8-bit integers stand for."""
    return (q.float() - (grid.zero_point - SHIFT)) * grid.scale


def bytes_of(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the signed 8-bit integers nearest to real numbers."""
    steps = (x.float() * inverse(grid.scale)).round() + (grid.zero_point - SHIFT)
    return steps.clamp(grid.quant_min - SHIFT, grid.quant_max - SHIFT).to(torch.int8)


class CudaLayer(Layer):
    """What convolution and linear share.

    Args:
        weight_shape, bias, output, activation, residual: see `Layer`.
        numbers: what products are computed in: "int8", "fp8", "fp16" or "bf16". "fp8" takes real inputs, which it
            rounds row by row with scales of their own.
        real: dtype of real inputs, residuals and results: "fp16" or "bf16".
        input: grid of the input; only with "int8".
    """

    activations = ACTIVATIONS

    def __init__(
        self,
        weight_shape: Sequence[int],
        bias: bool,
        numbers: str = "int8",
        real: str = "fp16",
        input: Sequence[Any] | None = None,
        output: Sequence[Any] | None = None,
        activation: Sequence[Any] | None = None,
        residual: Sequence[Any] | str | None = None,
    ) -> None:
        if numbers not in NUMBERS or real not in REALS or (numbers == "int8") != (input is not None):
            raise OptionError(f"{type(self).__name__} cannot compute in {numbers!r} with values in {real!r}")
        dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, **REALS}[numbers]
        super().__init__(weight_shape, bias, output, activation, residual, dtype, scaled=numbers in ("int8", "fp8"))
        self.numbers, self.real = numbers, real
        self.input = None if input is None else Grid.from_config(input)
        self.repack()

    def repack(self) -> None:
        """As in `Layer`."""
        self._packed: Packed | None = None
        self._chosen: dict[Any, Run] = {}
        self._library_tensors: dict[str, Any] = {}

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that all layers share."""
        own = {"numbers": self.numbers, "real": self.real, "input": None if self.input is None else self.input.config()}
        return {**own, **super().config()}

    def fill(self, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | None = None) -> None:
        """Set the tensors: int8 numbers with their scales, or real ones, which are rounded to what the layer has."""
        if self.numbers == "fp8":
            scale = weight.float().flatten(1).abs().amax(1).clamp(min=1e-12) / FP8_LIMIT
            weight = weight.float() / scale.view(-1, *[1] * (weight.ndim - 1))
        self.weight.data = weight.detach().to(self.weight.dtype)
        if self.weight_scale is not None and scale is not None:
            self.weight_scale.data = scale.detach().float()
        if self.bias is not None and bias is not None:
            self.bias.data = bias.detach().float()
        self.repack()

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's result, for a second input as well if it takes one."""
        if residual is not None and residual.shape != self._result_shape(input.shape):
            residual = residual.expand(self._result_shape(input.shape))
        if not device.runs_kernels(input) or input.numel() == 0:
            return self._in_floats(input, residual)
        if self.numbers != "int8":
            input = input.to(REALS[self.real])
        run = self._chosen.get(input.shape)
        if run is None:
            run = self._choose(input, residual)
        return run(input, residual)

    # Choosing

    def _choose(self, input: torch.Tensor, residual: torch.Tensor | None) -> Run:
        """Find the fastest way for inputs of a shape, and keep it."""
        ways = self._ways(input)

        def listed() -> list[tuning.Way]:
            return [
                tuning.Way(name, functools.partial(run, input, residual), _preparation(run, input, residual))
                for name, run in ways.items()
            ]

        measure = tuning.measures(input)
        choice = tuning.choices(input).find(self.key(input), listed, measure)
        run = ways.get(choice.name) or next(iter(ways.values()))
        if measure or input.device.type != "cuda":
            if len(self._chosen) >= _MOST_SHAPES:
                self._chosen.pop(next(iter(self._chosen)))
            self._chosen[input.shape] = run
        return run

    def choice(self, input: torch.Tensor) -> tuning.Choice:
        """Return which way was taken for inputs of a shape that the layer has run on."""
        ways = self._ways(input)
        return tuning.choices(input).find(self.key(input), lambda: [tuning.Way(name, int) for name in ways], False)

    def key(self, input: torch.Tensor) -> str:
        """Return what the time of the layer depends on, as a text."""
        described = {name: value for name, value in self.config().items() if name not in ("input", "output")}
        described["input"] = None if self.input is None else self.input.zero_point != SHIFT
        described["output"] = self.output is not None
        described["residual"] = type(self.residual).__name__
        described["activation"] = None if self.activation is None else self.activation[0]
        described["sparse"] = self.numbers in REALS and self._library_sparse() is not None
        return f"{type(self).__name__} {tuple(input.shape)} {sorted(described.items())}"

    def _ways(self, input: torch.Tensor) -> dict[str, Run]:
        """Return every way to compute the layer by name, the default first."""
        packed = self._pack()
        window = packed.window
        rows = self._as_images(input)
        out = window.out_size(rows.shape[2], rows.shape[3])
        pixels = rows.shape[0] * out[0] * out[1]
        tiles = launch.candidates(
            window, pixels, packed.narrow, packed.source_zero, device.processors(input), device.shared_memory(input)
        )
        own: dict[str, Run] = {str(blocks): Tiled(self, packed, blocks) for blocks in tiles}
        return own if self.numbers in ("int8", "fp8") else {**self._library_ways(), **own}

    def _library_ways(self) -> dict[str, Run]:
        """Ways through PyTorch's libraries, for real numbers."""
        raise NotImplementedError

    def _library_sparse(self) -> Any:
        """The weight as the matrix units for 2:4 sparsity take it, if two of every four numbers are zero; else None."""
        return None

    def _pack(self) -> Packed:
        if self._packed is None:
            zero = 0 if self.input is None else self.input.zero_point - SHIFT
            factor = self.weight_scale
            if self.input is not None and factor is not None:
                factor = factor * self.input.scale
            self._packed = Packed(self.window, self._window_weight(), factor, self.bias, zero)
        return self._packed

    def ending(self) -> Ending:
        """Return what happens to sums of products."""
        addend = "real" if self.residual == "float" else self.residual
        return Ending(self.activation, addend, self.output)

    def finished(self, result: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Return a library's result (with its bias) as the layer's: one more kernel where there is more to do."""
        if residual is None and self.activation is None and self.output is None:
            return result
        grid = self.residual if isinstance(self.residual, Grid) else None
        ending = Ending(self.activation, None, self.output)
        return pointwise_launch.combine(
            result, residual, grids=(None, grid), ending=ending, dtype=REALS[self.real]
        ).launch()  # fmt: skip

    # What differs between convolution and linear

    @property
    def window(self) -> Window:
        """The layer as a convolution with two spatial dimensions."""
        raise NotImplementedError

    def _window_weight(self) -> torch.Tensor:
        """The weight with four dimensions."""
        raise NotImplementedError

    def _as_images(self, x: torch.Tensor) -> torch.Tensor:
        """A value as (images, channels, height, width)."""
        raise NotImplementedError

    # In float32

    def _in_floats(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        with in_full_float32():
            x = input.float() if self.input is None else real_of(input, self.input)
            result = self._products(x, self._real_weight())
        if residual is not None:
            grid = self.residual
            result = result + (real_of(residual, grid) if isinstance(grid, Grid) else residual.float())
        result = self._activated(result)
        return result.to(REALS[self.real]) if self.output is None else bytes_of(result, self.output)

    # Copies, devices, files

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.repack()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_chosen": {}, "_library_tensors": {}}


def _preparation(run: Run, input: torch.Tensor, residual: torch.Tensor | None) -> Callable[[], Any] | None:
    """What can be done before a way is timed: compiling the kernel."""
    return (lambda: run.call(input, residual).warm_up()) if isinstance(run, Tiled) else None


class Tiled:
    """A layer computed by our own kernel with some block sizes."""

    def __init__(self, layer: CudaLayer, packed: Packed, blocks: Blocks) -> None:
        self.layer, self.packed, self.blocks = layer, packed, blocks
        self.ending = layer.ending()

    def call(self, input: torch.Tensor, residual: torch.Tensor | None) -> launch.Call:
        """Return the launch."""
        layer = self.layer
        x = layer._as_images(input)
        addend = None if residual is None else layer._as_images(residual)
        row_factor = None
        if layer.numbers == "fp8":
            x, row_factor = pointwise_launch.scaled_rows(x, FP8_LIMIT)
        return launch.convolve(self.packed, self.ending, self.blocks, x, addend, REALS[layer.real], row_factor)

    def __call__(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Launch, and return the result in the layer's shape."""
        result, shape = self.call(input, residual).launch(), self.layer._result_shape(input.shape)
        return result if result.shape == shape else result.reshape(shape)


class CudaConv(Convolution, CudaLayer):
    """Convolution with one or two spatial dimensions.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: see `Convolution`.
        bias, numbers, real, input, output, activation, residual: see `CudaLayer`.
    """

    @property
    def window(self) -> Window:
        """The layer as a convolution with two spatial dimensions."""
        flat = len(self.kernel_size) == 1
        lead: Callable[[list[int], int], tuple[int, int]]
        lead = lambda values, first: (first, values[0]) if flat else (values[0], values[1])  # noqa: E731
        return Window(
            self.in_channels // self.groups, self.out_channels // self.groups, self.groups,
            lead(self.kernel_size, 1), lead(self.stride, 1), lead(self.padding, 0), lead(self.dilation, 1),
        )  # fmt: skip

    def _window_weight(self) -> torch.Tensor:
        return self.weight.unsqueeze(2) if len(self.kernel_size) == 1 else self.weight

    def _as_images(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.kernel_size) == 1:
            x = x.unsqueeze(-2)
        return x if x.ndim == 4 else x.unsqueeze(0)

    # cuDNN

    def _library_ways(self) -> dict[str, Run]:
        found: dict[str, Run] = {"cuDNN": self._cudnn}
        if self.weight.device.type == "cuda" and self._only_relu() and len(self.stride) == 2:
            found["cuDNN, fused"] = self._cudnn_fused
        if self.weight.device.type != "cuda":
            return {}
        return found

    def _only_relu(self) -> bool:
        return self.activation == ("clamp", 0.0, None) and self.output is None and self.residual in (None, "float")

    def _cudnn_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        held = self._library_tensors
        if "weight" not in held:
            weight = self._window_weight()
            held["weight"] = launch.dense(weight)
            bias = torch.zeros(self.out_channels, device=weight.device) if self.bias is None else self.bias
            held["bias"] = bias.to(weight.dtype)
        return held["weight"], held["bias"]

    def _cudnn_geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        window = self.window
        return window.stride, window.padding, window.dilation, window.groups

    def _cudnn(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        weight, bias = self._cudnn_tensors()
        x = self._as_images(input)
        x = launch.dense(x)
        only_bias = bias if self.bias is not None else None
        with _benchmarked():
            result = F.conv2d(x, weight, only_bias, *self._cudnn_geometry())
        addend = None if residual is None else self._as_images(residual)
        return self.finished(result, addend).reshape(self._result_shape(input.shape))

    def _cudnn_fused(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        weight, bias = self._cudnn_tensors()
        stride, padding, dilation, groups = self._cudnn_geometry()
        x = launch.dense(input)
        with _benchmarked():
            if residual is None:
                return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
            addend = launch.dense(residual)
            return torch.cudnn_convolution_add_relu(x, weight, addend, 1.0, bias, stride, padding, dilation, groups)


@contextlib.contextmanager
def _benchmarked() -> Iterator[None]:
    """Let cuDNN choose among its kernels by measuring as well."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class CudaLinear(Linear, CudaLayer):
    """Linear layer on inputs of shape (..., in_features).

    Args:
        in_features, out_features: as in `torch.nn.Linear`.
        bias, numbers, real, input, output, activation, residual: see `CudaLayer`.
    """

    @property
    def window(self) -> Window:
        """The layer as a convolution of single pixels."""
        return Window(self.in_features, self.out_features)

    def _window_weight(self) -> torch.Tensor:
        return self.weight[:, :, None, None]

    def _as_images(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, x.shape[-1], 1, 1)

    # cuBLAS and cuSPARSELt

    def _library_ways(self) -> dict[str, Run]:
        if self.weight.device.type != "cuda":
            return {}
        found: dict[str, Run] = {"cuBLAS": functools.partial(self._matrix, "dense")}
        plain = self.bias is not None and self.residual is None and self.output is None
        if plain and self.activation in _CUBLAS_ACTIVATIONS:
            found["cuBLAS, fused"] = self._fused
        if self._library_sparse() is not None:
            found["2:4 sparse"] = functools.partial(self._matrix, "sparse")
        return found

    def _half_bias(self) -> torch.Tensor | None:
        held = self._library_tensors
        if "bias" not in held:
            held["bias"] = None if self.bias is None else self.bias.to(self.weight.dtype)
        found: torch.Tensor | None = held["bias"]
        return found

    def _matrix(self, kind: str, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        weight = self._library_sparse() if kind == "sparse" else self.weight
        rows = input.reshape(-1, self.in_features)
        result = F.linear(rows, weight, self._half_bias())
        addend = None if residual is None else residual.reshape(result.shape)
        return self.finished(result, addend).reshape(self._result_shape(input.shape))

    def _fused(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        rows, bias = input.reshape(-1, self.in_features), self._half_bias()
        assert bias is not None  # for the type checker: asked for in _library_ways
        gelu = self.activation == ("gelu", "tanh")
        result = torch._addmm_activation(bias, rows, self.weight.t(), use_gelu=gelu)
        return result.reshape(self._result_shape(input.shape))

    def _library_sparse(self) -> Any:
        held = self._library_tensors
        if "sparse" not in held:
            held["sparse"] = self._compressed()
        return held["sparse"]

    def _compressed(self) -> Any:
        if self.weight.device.type != "cuda" or self.numbers == "fp8" or not is_two_of_four(self.weight):
            return None
        try:
            return torch.sparse.to_sparse_semi_structured(self.weight.contiguous())
        except (RuntimeError, ValueError, NotImplementedError):  # a shape or a GPU that has no such kernels
            return None


def joined(layers: Sequence[CudaLinear]) -> CudaLinear:
    """Return one layer that computes several of the same input, numbers and kind, their outputs behind each other."""
    first = layers[0]
    config = {**first.config(), "out_features": sum(layer.out_features for layer in layers)}
    made: CudaLinear = CudaLinear.from_config(config)
    for name, buffer in first._buffers.items():
        if buffer is not None:
            made._buffers[name] = torch.cat([getattr(layer, name) for layer in layers])
    return made.eval()


#: Activations that cuBLAS computes with a matrix product.
_CUBLAS_ACTIVATIONS = (("clamp", 0.0, None), ("gelu", "tanh"))


#: The module classes of this file, by the name that the artefact writes.
MODULES: dict[str, type[Kernel]] = {kernel.__name__: kernel for kernel in (CudaConv, CudaLinear)}


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether at least two of every four neighbours in each row of a matrix are zero."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool((weight.unflatten(1, (-1, 4)) == 0).sum(2).ge(2).all())
