"""What an 8-bit tensor may hold: the format (`QuantSpec`) and, once numbers are known, the grid (`Grid`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxcompress.errors import OptionError

#: The largest magnitude of a weight for which the sum of two products with unsigned 8-bit numbers fits 16 bits:
#: 2 * 255 * 64 = 32640. CPUs without VNNI add such pairs with saturation (vpmaddubsw).
REDUCED_WEIGHT_LIMIT = 64

#: How an 8-bit layer gets its input: on a grid that calibration fixed; with a grid for each row, measured at every
#: call; as it is, in float, so that only the weight is 8-bit. The words are those of ONNX Runtime and of torch.ao.
STATIC, DYNAMIC, WEIGHT_ONLY = MODES = ("static", "dynamic", "weight-only")

#: Significands of the scales of values: eighths from 1 to 1.5, times a power of two. See `QuantSpec`.
VALUE_SIGNIFICANDS = (8, 9, 10, 11, 12)

#: Significands of the scales of weights: quarters from 1 to 1.75, times a power of two.
WEIGHT_SIGNIFICANDS = (4, 5, 6, 7)


@dataclass(frozen=True)
class QuantSpec:
    """A format of quantised numbers, without the scale.

    dtype: torch.uint8 or torch.int8.
    quant_min, quant_max: the smallest and the largest integer used.
    symmetric: whether zero is the middle of the range, so that the zero point is fixed.
    channel_axis: the axis that has a scale of its own for each index; None for one scale in all.
    significands: a scale is one of these numbers times a power of two; empty: any number. Zero points are even then.

    Why scales are so coarse by default: a float32 product of numbers on two such grids, and sums of thousands of them,
    need no more than 24 bits. A quantise-dequantise graph in float32 is then free of rounding errors, and a kernel that
    sums integers computes the same numbers bit for bit. With arbitrary scales the two round differently here and there,
    and a deep network makes of one such difference a noise as loud as that of quantisation itself. Two more conditions
    make sums on the edge between two integers fall to the same side. Zero points are even: odd ones would turn "ties to
    even" around. And scales of values leave out 1.625 to 1.875, because a product with the float32 number next to 1/13,
    1/7 or 1/15 does not hit the middle between two integers. Coarse scales cost about half a decibel.
    """

    dtype: torch.dtype = torch.uint8
    quant_min: int = 0
    quant_max: int = 255
    symmetric: bool = False
    channel_axis: int | None = None
    significands: tuple[int, ...] = VALUE_SIGNIFICANDS

    def __post_init__(self) -> None:
        if self.dtype not in (torch.uint8, torch.int8):
            raise OptionError(f"QuantSpec: dtype must be torch.uint8 or torch.int8, not {self.dtype}")
        limits = torch.iinfo(self.dtype)
        if not limits.min <= self.quant_min < self.quant_max <= limits.max:
            raise OptionError(
                f"QuantSpec: quant_min {self.quant_min} and quant_max {self.quant_max} must be ordered and lie within "
                f"{limits.min} and {limits.max}, the range of {self.dtype}"
            )

    @property
    def middle(self) -> int:
        """The zero point of a symmetric format: 0 for signed numbers, the middle of the range for unsigned ones."""
        return 0 if self.dtype == torch.int8 else (self.quant_min + self.quant_max + 1) // 2

    def along(self, axis: int) -> QuantSpec:
        """Return the same format with a scale for each index of `axis`."""
        return replace(self, channel_axis=axis)


#: The default of activations on x86 CPUs: unsigned, affine, one scale for the tensor.
ACTIVATION = QuantSpec()

#: The default of weights: signed, symmetric, a scale for each output channel; -128 is left out for symmetry.
WEIGHT = QuantSpec(torch.int8, -127, 127, symmetric=True, channel_axis=0, significands=WEIGHT_SIGNIFICANDS)

#: Weights for CPUs without VNNI, see `REDUCED_WEIGHT_LIMIT`.
REDUCED_WEIGHT = replace(WEIGHT, quant_min=-REDUCED_WEIGHT_LIMIT, quant_max=REDUCED_WEIGHT_LIMIT)

#: How many bits numbers may have; 8-bit kernels compute with all of them.
BITS = range(2, 9)


def activation_spec(bits: int) -> QuantSpec:
    """Return the default format of activations in some number of `BITS`: unsigned, all numbers used."""
    return replace(ACTIVATION, quant_max=2**bits - 1)


def weight_spec(bits: int, reduced: bool = False) -> QuantSpec:
    """Return the default format of weights in some number of `BITS`: signed, symmetric, a scale for each channel.

    Below 8 bits the smallest number is used as well (-8 .. 7 for 4 bits), as one step more is worth more there than
    symmetry.

    Args:
        reduced: whether 8 bits stay within `REDUCED_WEIGHT_LIMIT`, as fewer do anyway.
    """
    if bits == 8:
        return REDUCED_WEIGHT if reduced else WEIGHT
    return replace(WEIGHT, quant_min=-(2 ** (bits - 1)), quant_max=2 ** (bits - 1) - 1)


@dataclass(frozen=True)
class Grid:
    """The real numbers that a quantised tensor can hold: scale * (q - zero_point), quant_min <= q <= quant_max.

    The integers are unsigned 8-bit numbers; a signed grid is written as the unsigned one with the same real numbers
    (`Grid.unsigned`).
    """

    scale: float
    zero_point: int
    quant_min: int = 0
    quant_max: int = 255

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise OptionError(f"Grid: the scale must be a positive number, not {self.scale}")
        if not 0 <= self.quant_min <= self.zero_point <= self.quant_max <= 255:
            raise OptionError(
                f"Grid: 0 <= quant_min <= zero_point <= quant_max <= 255 must hold, but they are {self.quant_min}, "
                f"{self.zero_point} and {self.quant_max}"
            )

    @classmethod
    def unsigned(cls, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Grid:
        """Return the grid of these numbers with everything moved into 0..255 (by 128 where quant_min is negative)."""
        shift = 128 if quant_min < 0 else 0
        return cls(float(scale), int(zero_point) + shift, int(quant_min) + shift, int(quant_max) + shift)

    @property
    def lowest(self) -> float:
        """The smallest real number on the grid."""
        return self.scale * (self.quant_min - self.zero_point)

    @property
    def highest(self) -> float:
        """The largest real number on the grid."""
        return self.scale * (self.quant_max - self.zero_point)

    def config(self) -> list[Any]:
        """Return plain numbers, for a file."""
        return [self.scale, self.zero_point, self.quant_min, self.quant_max]

    @classmethod
    def from_config(cls, config: Any) -> Grid:
        """Build the grid that `config()` described."""
        scale, zero_point, quant_min, quant_max = config
        return cls(float(scale), int(zero_point), int(quant_min), int(quant_max))
