"""The steps of a plan, as `kernels.cpp` reads them: the same structures with the same names."""

from __future__ import annotations

import ctypes
from typing import ClassVar

#: Row or column of a window that lies in the padding; a sum with it is below zero.
OUTSIDE = -(2**40)

FLOAT, BYTES, NOTHING = 0, 1, -1

#: Activations by the word that lowered layers have for them.
ACTIVATIONS = {
    "clamp": 1, "hardswish": 2, "silu": 3, "gelu": 4, "gelu_tanh": 5, "leaky_relu": 6, "tanh": 7, "sigmoid": 8,
    "hardsigmoid": 9,
}  # fmt: skip

#: Places that a window of a convolution may have.
MAX_PLACES = 1024

MAX_OPERANDS, MAX_OPERATIONS = 8, 24
LOAD, ADD, SUBTRACT, MULTIPLY, DIVIDE, ACTIVATE = range(6)

#: What an operand of a pointwise step has a number for.
ELEMENT, IMAGE_CHANNEL, WHOLE = range(3)

_number, _real, _pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class Place(ctypes.Structure):
    """Part of a buffer: byte offset of the first number, bytes from pixel to pixel and from image to image."""

    _fields_ = (("buffer", _number), ("offset", _number), ("pixel", _number), ("image", _number))


class Finish(ctypes.Structure):
    """What happens to sums of products."""

    _fields_ = (
        ("scale", _pointer), ("bias", _pointer), ("kind", _number), ("activation", _number), ("argument0", _real),
        ("argument1", _real), ("inverse", _real), ("zero", _number), ("low", _number), ("high", _number),
        ("residual_kind", _number), ("residual", Place), ("residual_scale", _real), ("residual_shift", _real),
    )  # fmt: skip


class Step(ctypes.Structure):
    """Base of the steps, each of which has a number."""

    number: ClassVar[int] = 0


class Convolution(Step):
    """Convolution, and linear layers as convolutions of a row of pixels."""

    number = 1
    _fields_ = (
        ("op", _number), ("source", Place), ("result", Place), ("images", _number), ("height", _number),
        ("width", _number), ("channels", _number), ("groups", _number), ("group_in", _number), ("group_out", _number),
        ("rows_of_window", _number), ("columns_of_window", _number), ("run", _number), ("rows", _pointer),
        ("columns", _pointer), ("padding", _pointer), ("weights", _pointer), ("group_weights", _number),
        ("classes", _number), ("order", _pointer), ("ends", _pointer), ("places", _pointer), ("borders", _pointer),
        ("finish", Finish),
    )  # fmt: skip


class Depthwise(Step):
    """Convolution of each channel by itself."""

    number = 2
    _fields_ = (
        ("op", _number), ("source", Place), ("result", Place), ("images", _number), ("height", _number),
        ("width", _number), ("channels", _number), ("rows_of_window", _number), ("columns_of_window", _number),
        ("source_width", _number), ("stride", _number), ("dilation", _number), ("padding_left", _number),
        ("rows", _pointer), ("padding", _pointer), ("weights", _pointer), ("finish", Finish),
    )  # fmt: skip


class Pooling(Step):
    """Largest number or average of windows."""

    number = 3
    _fields_ = (
        ("op", _number), ("source", Place), ("result", Place), ("images", _number), ("height", _number),
        ("width", _number), ("channels", _number), ("rows_of_window", _number), ("columns_of_window", _number),
        ("rows", _pointer), ("columns", _pointer), ("average", _number), ("count_padding", _number),
        ("source_zero", _number), ("factor", _real), ("kind", _number), ("zero", _number), ("low", _number),
        ("high", _number),
    )  # fmt: skip


class Entrance(Step):
    """Real numbers of any layout to bytes with their channels side by side."""

    number = 4
    _fields_ = (
        ("op", _number), ("source", Place), ("result", Place), ("images", _number), ("height", _number),
        ("width", _number), ("channels", _number), ("stride_image", _number), ("stride_row", _number),
        ("stride_column", _number), ("stride_channel", _number), ("result_row", _number), ("inverse", _real),
        ("zero", _number), ("low", _number), ("high", _number),
    )  # fmt: skip


class Copy(Step):
    """Copy between strided places."""

    number = 5
    _fields_ = (
        ("op", _number), ("source", Place), ("result", Place), ("sizes", _number * 4), ("from_", _number * 4),
        ("to", _number * 4), ("bytes", _number),
    )  # fmt: skip


class Fill(Step):
    """Equal bytes."""

    number = 6
    _fields_ = (("op", _number), ("result", Place), ("bytes", _number), ("value", _number))


class Operand(ctypes.Structure):
    """What a pointwise step reads."""

    _fields_ = (
        ("shape", _number), ("kind", _number), ("place", Place), ("scale", _real), ("shift", _real),
    )  # fmt: skip


class Operation(ctypes.Structure):
    """One operation of a pointwise step, on what earlier ones made."""

    _fields_ = (("code", _number), ("first", _number), ("second", _number), ("argument0", _real), ("argument1", _real))


class Pointwise(Step):
    """A chain of elementwise operations."""

    number = 7
    _fields_ = (
        ("op", _number), ("images", _number), ("pixels", _number), ("channels", _number), ("operands", _number),
        ("operations", _number), ("operand", Operand * MAX_OPERANDS), ("operation", Operation * MAX_OPERATIONS),
        ("result", Place), ("kind", _number), ("inverse", _real), ("zero", _number), ("low", _number),
        ("high", _number),
    )  # fmt: skip


class Normalization(Step):
    """Rows with mean 0 and variance 1, times a scale, plus a shift; or the softmax of rows."""

    number = 8
    _fields_ = (
        ("op", _number), ("source", Place), ("result", Place), ("rows", _number), ("channels", _number),
        ("softmax", _number), ("scale", _pointer), ("shift", _pointer), ("epsilon", _real), ("kind", _number),
        ("inverse", _real), ("zero", _number), ("low", _number), ("high", _number),
    )  # fmt: skip


class Product(Step):
    """Products of real matrices, for each index of three outer dimensions."""

    number = 9
    _fields_ = (
        ("op", _number), ("left", Place), ("right", Place), ("result", Place), ("sizes", _number * 3),
        ("left_outer", _number * 3), ("right_outer", _number * 3), ("result_outer", _number * 3), ("rows", _number),
        ("columns", _number), ("depth", _number), ("left_row", _number), ("left_depth", _number),
        ("right_depth", _number), ("right_column", _number), ("result_row", _number), ("factor", _real),
    )  # fmt: skip


class RowEntrance(Step):
    """Rows of real numbers to bytes, each on a grid of its own."""

    number = 10
    _fields_ = (
        ("op", _number), ("source", Place), ("result", Place), ("scales", Place), ("zeros", Place), ("rows", _number),
        ("channels", _number), ("low", _number), ("high", _number),
    )  # fmt: skip


class RowLinear(Step):
    """Linear layer on such rows."""

    number = 11
    _fields_ = (
        ("op", _number), ("source", Place), ("scales", Place), ("zeros", Place), ("result", Place), ("rows", _number),
        ("channels", _number), ("run", _number), ("weights", _pointer), ("sums", _pointer), ("finish", Finish),
    )  # fmt: skip


class WeightLinear(Step):
    """Linear layer of real numbers with int8 weights."""

    number = 12
    _fields_ = (
        ("op", _number), ("source", Place), ("result", Place), ("rows", _number), ("channels", _number),
        ("depth", _number), ("weights", _pointer), ("finish", Finish),
    )  # fmt: skip


class Affine(Step):
    """A factor and a summand for each channel, of bytes."""

    number = 13
    _fields_ = (
        ("op", _number), ("source", Place), ("result", Place), ("images", _number), ("pixels", _number),
        ("channels", _number), ("source_scale", _real), ("source_shift", _real), ("scale", _pointer),
        ("shift", _pointer), ("inverse", _real), ("zero", _number), ("low", _number), ("high", _number),
    )  # fmt: skip


class Attention(Step):
    """Attention on bytes."""

    number = 14
    _fields_ = (
        ("op", _number),
        *((name, Place) for name in ("query", "key", "value", "result", "mask")),
        ("sizes", _number * 3), *((name, _number) for name in ("key_heads", "rows", "keys", "depth", "width")),
        *((f"{name}_outer", _number * 3) for name in ("query", "key", "value", "result", "mask")),
        *((f"{name}_row", _number) for name in ("query", "key", "value", "result", "mask")),
        ("mask_kind", _number), ("causal", _number),
        *((f"{name}_inverse", _real) for name in ("query", "key", "value")),
        *((f"{name}_{part}", _number) for name in ("query", "key", "value") for part in ("zero", "low", "high")),
        ("factor", _real), ("value_scale", _real), ("kind", _number), ("inverse", _real), ("zero", _number),
        ("low", _number), ("high", _number),
    )  # fmt: skip


KINDS: tuple[type[Step], ...] = (
    Convolution, Depthwise, Pooling, Entrance, Copy, Fill, Pointwise, Normalization, Product, RowEntrance, RowLinear,
    WeightLinear, Affine, Attention,
)  # fmt: skip
