"""From tensors to launches of the kernels in `kernels.py`: geometry, packed weights, block sizes.

Nothing here needs a GPU, nor Triton, before a launch is made.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxcompress.emit.cpu_numbers import channels_last_strides, inverse
from fxcompress.quant.spec import Grid

#: What lies between the numbers of a `Grid` and those that a GPU computes with: its matrix units are for signed ones.
SHIFT = 128

#: Activations by the word that layers have for them, with the numbers that the kernels have.
ACTIVATION_NUMBERS = {
    "none": 0, "clamp": 1, "hardswish": 2, "silu": 3, "gelu": 4, "gelu_tanh": 5, "leaky_relu": 6, "tanh": 7,
    "sigmoid": 8, "hardsigmoid": 9,
}  # fmt: skip

#: To be raised when the kernels change, so that what was measured before is measured again.
REVISION = "1"

FREE, REAL, BYTES = range(3)
ZEROS, LOADED, TABLE = range(3)


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution with two spatial dimensions; channels and outputs are those of one group."""

    channels: int
    outputs: int
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def depthwise(self) -> bool:
        """Whether each channel has a window of its own."""
        return self.channels == self.outputs == 1 and self.groups > 1

    @property
    def pointwise(self) -> bool:
        """Whether the window is one pixel, without padding."""
        return self.kernel == (1, 1) and self.padding == (0, 0)

    @property
    def flat(self) -> bool:
        """Whether there are so few channels that window and channels are one dimension of the product."""
        return not self.depthwise and self.channels < 16 and self.kernel != (1, 1)

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the result."""
        sizes = zip((height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        found = [(size + 2 * pad - step * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, step in sizes]
        return found[0], found[1]

    def depth(self) -> int:
        """Return how many products are summed for one number of the result."""
        return self.channels * math.prod(self.kernel)


@dataclass(frozen=True)
class Ending:
    """What happens to sums of products.

    activation: (name, *arguments), see `layers.ACTIVATIONS`. addend: the grid of a second input, "real" for a real one,
    None for none. result: the grid of the result; None: real numbers.
    """

    activation: tuple[Any, ...] | None = None
    addend: Grid | str | None = None
    result: Grid | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the kernels that say so."""
        number, first, second = activation_arguments(self.activation)
        found: dict[str, Any] = {"ACTIVATION": number, "first": first, "second": second, **stored(self.result)}
        addend = self.addend
        if isinstance(addend, Grid):
            found.update(ADDEND=BYTES, addend_scale=addend.scale, addend_zero=float(addend.zero_point - SHIFT))
        else:
            found.update(ADDEND=FREE if addend is None else REAL, addend_scale=1.0, addend_zero=0.0)
        return found


def activation_arguments(activation: tuple[Any, ...] | None) -> tuple[int, float, float]:
    """Return the number of an activation, and its two arguments (0 where it has none)."""
    if activation is None:
        return 0, 0.0, 0.0
    name, *arguments = activation
    if name == "clamp":
        low, high = (math.copysign(math.inf, sign) if limit is None else float(limit)
                     for sign, limit in zip((-1, 1), arguments, strict=True))  # fmt: skip
        return ACTIVATION_NUMBERS["clamp"], low, high
    if name == "gelu":
        return ACTIVATION_NUMBERS["gelu" if arguments == ["none"] else "gelu_tanh"], 0.0, 0.0
    return ACTIVATION_NUMBERS[name], float(arguments[0]) if arguments else 0.0, 0.0


def stored(grid: Grid | None) -> dict[str, Any]:
    """Return the arguments of the kernels that say how a result is kept."""
    if grid is None:
        return {"RESULT": REAL, "inverse": 1.0, "zero": 0.0, "low": 0.0, "high": 0.0}
    return {
        "RESULT": BYTES,
        "inverse": inverse(grid.scale),
        "zero": float(grid.zero_point - SHIFT),
        "low": float(grid.quant_min - SHIFT),
        "high": float(grid.quant_max - SHIFT),
    }


@dataclass(frozen=True)
class Blocks:
    """How a kernel divides its work: sizes of a tile, warps, stages of its pipeline, parts of the sum.

    border: how padding is made up for where the zero point is not 0, see `kernels.py`.
    """

    pixels: int
    outputs: int
    channels: int = 64
    warps: int = 4
    stages: int = 3
    splits: int = 1
    border: int = LOADED
    band: int = 8

    def __str__(self) -> str:
        split = f" / {self.splits}" if self.splits > 1 else ""
        border = ", table" if self.border == TABLE else ""
        return f"{self.pixels}x{self.outputs}x{self.channels}{split}, {self.warps} warps, {self.stages} stages{border}"


#: Where things go that launches of a recording refer to, see `kept`.
_KEEPER: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("keeper", default=None)


def keep(held: Any) -> None:
    """Hand a thing whose memory a launch reads to whoever records launches."""
    keeper = _KEEPER.get()
    if keeper is not None:
        keeper.append(held)


@contextlib.contextmanager
def kept() -> Iterator[list[Any]]:
    """Collect what launches refer to and nobody else may hold for long, while a graph of launches is recorded."""
    held: list[Any] = []
    token = _KEEPER.set(held)
    try:
        yield held
    finally:
        _KEEPER.reset(token)


class Packed:
    """The tensors of a layer as the kernels read them.

    Args:
        window: the layer's geometry.
        weight: (outputs, channels of a group, rows, columns), int8 or real.
        factor: float32 for each output, what sums are multiplied by; None: 1.
        bias: float32 for each output, or None.
        source_zero: the zero point of the input, as the kernels' signed numbers have it.
    """

    def __init__(
        self,
        window: Window,
        weight: torch.Tensor,
        factor: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        source_zero: int = 0,
    ) -> None:
        self.window, self.source_zero = window, source_zero
        self.integers = weight.dtype == torch.int8
        self.narrow = weight.element_size() == 1
        self.factor = None if factor is None else factor.float().contiguous()
        self.bias = None if bias is None else bias.float().contiguous()
        order = (2, 3, 1, 0) if window.depthwise else (0, 2, 3, 1)
        self.weight = weight.permute(order).contiguous()
        self.offset: torch.Tensor | None = None
        if source_zero:
            self.taps = weight.sum(1, dtype=torch.int64)  # (outputs, rows, columns)
            self.offset = (-source_zero * self.taps.sum((1, 2))).int().contiguous()
        self._tables: dict[tuple[int, int], dict[str, Any]] = {}
        self._counters: dict[int, torch.Tensor] = {}

    def borders(self, height: int, width: int) -> dict[str, Any]:
        """Return what sums at the border lack, by class of row and column, and the class of each row and column."""
        found = self._tables.get((height, width))
        if found is None:
            window, device = self.window, self.weight.device
            out_sizes = window.out_size(height, width)
            classes, places = [], []
            for axis, (size, count) in enumerate(zip((height, width), out_sizes, strict=True)):
                seen = _seen(window, axis, size, count)
                names = list(dict.fromkeys([(True,) * window.kernel[axis], *seen]))
                classes.append(torch.tensor(names, device=device))
                places.append(torch.tensor([names.index(one) for one in seen], dtype=torch.int32, device=device))
            lacking = ~(classes[0][:, None, :, None] & classes[1][None, :, None, :])
            table = torch.einsum("rcij,oij->rco", lacking.double(), self.taps.double()) * self.source_zero
            found = {
                "table": table.flatten(0, 1).round().int().contiguous(),
                "row_places": places[0], "column_places": places[1], "table_columns": len(classes[1]),
            }  # fmt: skip
            if len(self._tables) >= 8:
                self._tables.pop(next(iter(self._tables)))
            self._tables[height, width] = found
        keep(found)
        return found

    def counters(self, tiles: int) -> torch.Tensor:
        """Return a zero for each tile, with which its programs count themselves; kernels leave zeros behind."""
        if tiles not in self._counters:
            if len(self._counters) >= 8:
                self._counters.pop(next(iter(self._counters)))
            self._counters[tiles] = torch.zeros(tiles, dtype=torch.int32, device=self.weight.device)
        keep(self._counters[tiles])
        return self._counters[tiles]


def _seen(window: Window, axis: int, size: int, count: int) -> list[tuple[bool, ...]]:
    """Which taps of each window along an axis lie inside the image."""
    stride, padding, step = window.stride[axis], window.padding[axis], window.dilation[axis]
    return [
        tuple(0 <= index * stride - padding + tap * step < size for tap in range(window.kernel[axis]))
        for index in range(count)
    ]


@dataclass
class Call:
    """One launch: a kernel by its name, the grid, arguments by name, and what the compiler is told.

    result: the tensor that it writes, in the shape that the caller gets.
    """

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    result: torch.Tensor
    options: dict[str, int] = field(default_factory=dict)

    def launch(self) -> torch.Tensor:
        """Run the kernel, and return its result."""
        with _on_device_of(self.result):
            kernel(self.kernel)[self.grid](**self.arguments, **self.options)
        return self.result

    def warm_up(self) -> None:
        """Compile the kernel, without running it."""
        with _on_device_of(self.result):
            kernel(self.kernel).warmup(grid=self.grid, **self.arguments, **self.options)


def _on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it that of a tensor."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def dense(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor (images, channels, *spatial) with its channels side by side: the same one, if they are."""
    strides = channels_last_strides(x.shape)
    if all(size == 1 or here == there for size, here, there in zip(x.shape, x.stride(), strides, strict=True)):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def has_no_gaps(x: torch.Tensor) -> bool:
    """Whether the numbers of a tensor lie side by side in some order of its dimensions, each in a place of its own."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


@functools.cache
def kernel(name: str) -> Any:
    """Return a kernel by its name. Triton is imported here, when it is needed."""
    from fxcompress.emit.cuda import kernels, pointwise_kernels

    return getattr(kernels, name, None) or getattr(pointwise_kernels, name)


def convolve(
    packed: Packed,
    ending: Ending,
    blocks: Blocks,
    x: torch.Tensor,
    addend: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    row_factor: torch.Tensor | None = None,
) -> Call:
    """Return the launch of a convolution.

    Args:
        packed: the layer.
        ending: what happens to sums.
        blocks: how the work is divided.
        x: (images, channels, height, width), int8 or real.
        addend: the second input, of the result's shape.
        dtype: of a real result.
        row_factor: float32, what the sums of each image (of one pixel) are multiplied by; None: 1.
    """
    window = packed.window
    images, _, height, width = x.shape
    out_height, out_width = window.out_size(height, width)
    shape = (images, window.outputs * window.groups, out_height, out_width)
    made = channels_last_strides(shape)
    kind = torch.int8 if ending.result is not None else dtype
    result = torch.empty_strided(shape, made, dtype=kind, device=x.device)
    if window.pointwise and window.stride == (1, 1):  # every pixel is an image: nothing is divided
        images, height, width, out_height, out_width = images * height * width, 1, 1, 1, 1
    arguments: dict[str, Any] = {
        "source": dense(x),
        "weight": packed.weight,
        "result": result,
        "addend": None if addend is None else dense(addend),
        "factor": packed.factor,
        "bias": packed.bias,
        "offset": packed.offset,
        "pixels": images * out_height * out_width,
        "outputs": window.outputs,
        "height": height,
        "width": width,
        "out_height": out_height,
        "out_width": out_width,
        **geometry(window),
        "source_zero": packed.source_zero,
        **ending.arguments(),
        "HAS_OFFSET": packed.offset is not None,
        "HAS_FACTOR": packed.factor is not None,
        "HAS_BIAS": packed.bias is not None,
        "INTEGERS": packed.integers,
        "BLOCK_PIXELS": blocks.pixels,
        "BLOCK_OUTPUTS": blocks.outputs,
    }
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    rows = steps(arguments["pixels"], blocks.pixels)
    if window.depthwise:
        unit = unit_of(window.groups)
        arguments.update(channel_units=window.groups // unit, UNIT=unit)
        grid = (rows, steps(window.groups, blocks.outputs), 1)
        return Call("depthwise", grid, arguments, result, options)
    arguments.update(row_factor=row_factor, HAS_ROW_FACTOR=row_factor is not None)
    arguments.update(_matrix_arguments(packed, blocks, x, rows))
    grid = (rows * steps(window.outputs, blocks.outputs), window.groups, blocks.splits)
    return Call("convolution", grid, arguments, result, options)


def geometry(window: Window) -> dict[str, int]:
    """Return the geometry as the kernels take it."""
    return {
        "rows_of_window": window.kernel[0], "columns_of_window": window.kernel[1],
        "stride_row": window.stride[0], "stride_column": window.stride[1],
        "padding_row": window.padding[0], "padding_column": window.padding[1],
        "dilation_row": window.dilation[0], "dilation_column": window.dilation[1],
    }  # fmt: skip


def _matrix_arguments(packed: Packed, blocks: Blocks, x: torch.Tensor, rows: int) -> dict[str, Any]:
    """What the implicit matrix product takes besides."""
    window = packed.window
    border = blocks.border if packed.source_zero and window.padding != (0, 0) else ZEROS
    unit = unit_of(window.channels)
    found: dict[str, Any] = {
        "channel_units": window.channels // unit, "UNIT": unit, "GROUPS": window.groups,
        "POINTWISE": window.pointwise, "FLAT": window.flat,
        "CHANNELS": window.channels if window.flat else 0, "WINDOW_COLUMNS": window.kernel[1] if window.flat else 0,
        "BORDER": border, "EVEN": window.channels % blocks.channels == 0 and not window.flat,
        "SPLITS": blocks.splits, "BLOCK_CHANNELS": blocks.channels, "BAND": blocks.band,
        "table": None, "row_places": None, "column_places": None, "table_columns": 1, "parts": None, "arrived": None,
    }  # fmt: skip
    if border == TABLE:
        found.update(packed.borders(x.shape[2], x.shape[3]))
    if blocks.splits > 1:
        tiles = rows * steps(window.outputs, blocks.outputs) * window.groups
        kind = torch.int32 if packed.integers else torch.float32
        cells = tiles * blocks.splits * blocks.pixels * blocks.outputs
        found.update(parts=torch.empty(cells, dtype=kind, device=x.device), arrived=packed.counters(tiles))
    return found


def unit_of(count: int) -> int:
    """The largest power of two up to 16 that divides a number: what Triton needs to know for wide loads."""
    return math.gcd(count, 16)


def steps(amount: int, block: int) -> int:
    """Return how many blocks an amount takes."""
    return -(-amount // block)


# Block sizes


def candidates(
    window: Window,
    pixels: int,
    narrow: bool,
    source_zero: int = 0,
    processors: int = 132,
    memory: int = 220_000,
) -> list[Blocks]:
    """Return block sizes worth trying, the most promising first.

    Args:
        window: the geometry.
        pixels: of all images of the result together.
        narrow: whether the numbers have 8 bits.
        source_zero: the zero point of the input.
        processors: multiprocessors of the device. memory: bytes that one of them can share.
    """
    if window.depthwise:
        return _depthwise_candidates(window, pixels)
    found: list[tuple[float, Blocks]] = []
    for (rows, columns, warps, stages), block in itertools.product(_SHAPES, _blocks_of_channels(window, narrow)):
        if columns > max(32, next_power(window.outputs)) or rows > max(32, next_power(pixels)):
            continue
        if window.flat and rows * columns > 8192:
            continue  # addresses of single pixels take too many registers
        if stages * (rows + columns) * block * (1 if narrow else 2) > memory:
            continue
        tiles = steps(pixels, rows) * steps(window.outputs, columns) * window.groups
        loops = _loops(window, block)
        for splits in _splits(tiles, loops, processors):
            blocks = Blocks(rows, columns, block, warps, stages, splits)
            found.append((_estimate(blocks, tiles, loops, narrow, processors), blocks))
    found.sort(key=lambda item: item[0])
    chosen = [blocks for _, blocks in found[:_MOST]]
    first = next((index for index, one in enumerate(chosen) if one.pixels * one.outputs <= _SAFE_AREA), 0)
    chosen.insert(0, chosen.pop(first))
    if source_zero and window.padding != (0, 0):
        safe = [blocks for blocks in chosen[:4] if blocks.pixels * blocks.outputs <= _SAFE_AREA]
        chosen += [replace(blocks, border=TABLE) for blocks in safe]
    return chosen


#: Rows and columns of a tile, warps, stages.
_SHAPES = (
    (128, 256, 8, 3), (256, 128, 8, 3), (128, 128, 8, 4), (128, 64, 4, 4), (256, 64, 8, 4), (64, 128, 4, 4),
    (64, 64, 4, 5), (64, 32, 4, 5), (32, 64, 4, 5), (32, 32, 4, 5), (128, 32, 4, 4), (16, 64, 4, 5), (16, 32, 2, 5),
)  # fmt: skip

#: How many block sizes are tried.
_MOST = 8

#: Numbers of a tile with which registers suffice, whatever is done to sums.
_SAFE_AREA = 128 * 128


def _blocks_of_channels(window: Window, narrow: bool) -> list[int]:
    """How many products are summed at a time: a row of 128 bytes or less."""
    most = 128 if narrow else 64
    if window.flat:
        return [most // 2, most // 4]
    least = 32 if narrow else 16
    sizes = [size for size in (most, most // 2, most // 4) if size <= max(least, next_power(window.channels))]
    return sizes or [least]


def _loops(window: Window, block: int) -> int:
    """How many blocks of products are summed."""
    if window.flat:
        return steps(window.depth(), block)
    return steps(window.channels, block) * math.prod(window.kernel)


def _splits(tiles: int, loops: int, processors: int) -> list[int]:
    """Into how many parts sums may be split: enough to give every multiprocessor something to do."""
    found = [1]
    for splits in (2, 4, 8, 16):
        if tiles * splits <= 2 * processors and loops >= 2 * splits:
            found.append(splits)
    return found


def _estimate(blocks: Blocks, tiles: int, loops: int, narrow: bool, processors: int) -> float:
    """A rough time in cycles: rounds of tiles over the multiprocessors, each as long as its products or its loads.

    The rates are those of one multiprocessor of an H100: 4096 products of 8 bits or 2048 of 16 a cycle, 64 bytes from
    the L2 cache, 14 bytes to memory. Only the order matters: the first ones are measured.
    """
    rows, columns, width = blocks.pixels, blocks.outputs, 1 if narrow else 2
    memory = blocks.stages * (rows + columns) * blocks.channels * width
    together = max(1, min(4, 32_768 // (rows * columns), 220_000 // memory))
    rounds = steps(tiles * blocks.splits, processors * together)
    products = rows * columns * blocks.channels * width / 4096
    loads = (rows + columns) * blocks.channels * width / 64
    share = steps(loops, blocks.splits)
    summing = max(150.0 * share, together * max(products, loads) * share)
    ending = together * rows * columns * (width + (4 if blocks.splits > 1 else 0)) / 14
    return rounds * (summing + ending + 1500) + (2500 + 100 * blocks.splits if blocks.splits > 1 else 0)


def _depthwise_candidates(window: Window, pixels: int) -> list[Blocks]:
    widest = max(16, next_power(window.groups))
    shapes = ((32, 64, 4), (64, 64, 4), (16, 128, 4), (32, 128, 4), (64, 32, 4), (128, 32, 4), (16, 64, 2), (8, 64, 2),
              (16, 32, 1))  # fmt: skip
    fitting = [Blocks(rows, columns, 1, warps, 2) for rows, columns, warps in shapes if columns <= widest]
    fitting.sort(key=lambda blocks: steps(pixels, blocks.pixels) * steps(window.groups, blocks.outputs) < 132)
    return fitting or [Blocks(32, 16, 1, 4, 2)]


def next_power(number: int) -> int:
    """Return the smallest power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()
