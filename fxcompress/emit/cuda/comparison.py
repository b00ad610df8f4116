"""Which numbers a layer is computed with: measured for the shapes that it will see, with random values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxcompress.emit.cuda import device, tuning
from fxcompress.emit.cuda.layers import REALS, CudaLayer
from fxcompress.quant.spec import Grid

#: A conversion between 8 and 16 bits: its launch in microseconds, and bytes moved in one (less than memory could do).
_LAUNCH, _BYTES = 2.0, 2.0e6

#: How much faster numbers with less precision must be.
MARGIN = 0.98


@dataclass(frozen=True)
class Verdict:
    """One candidate among those for a layer.

    layer: the module. microseconds: its time, with conversions that it would need; None: not measured. way: how.
    """

    layer: CudaLayer
    microseconds: float | None = None
    way: str = ""

    @property
    def numbers(self) -> str:
        """What it computes with."""
        return self.layer.numbers

    def __str__(self) -> str:
        if self.microseconds is None:
            return self.numbers
        return f"{self.numbers} {self.microseconds:.1f} us ({self.way})"


def verdicts(
    layers: Sequence[CudaLayer], shape: Sequence[int], addend: Sequence[int] | None, arrives_as: str
) -> list[Verdict]:
    """Return the candidates for a layer, the one to take first.

    Args:
        layers: the same layer with different numbers, the most wanted first: it is taken where nothing is measured.
        shape: of the input. addend: of the second input.
        arrives_as: "int8" if the input is there in 8 bits, so that real layers have to convert it; "real" where 8-bit
            ones have to; "input" where it comes from outside and is converted anyway.
    """
    if len(layers) == 1 or not measures():
        return [Verdict(layer) for layer in layers]
    timed = []
    for layer in layers:
        microseconds, way = layer_microseconds(layer, shape, addend)
        if arrives_as not in ("input", "int8" if layer.numbers == "int8" else "real"):
            microseconds += _LAUNCH + 3 * math.prod(shape) / _BYTES
        timed.append(Verdict(layer, microseconds, way))
    precision = {numbers: rank for rank, numbers in enumerate(("fp16", "bf16", "fp8", "int8"))}

    def cost(one: Verdict) -> float:
        time = one.microseconds if one.microseconds is not None else math.inf
        return time / MARGIN if precision[one.numbers] > 1 else time

    return sorted(timed, key=cost)


def measures() -> bool:
    """Whether there is a GPU to measure on, and measuring is wanted."""
    home = device.home()
    return home.type == "cuda" and tuning.measures(torch.empty(0, device=home))


def layer_microseconds(
    layer: CudaLayer, shape: Sequence[int], addend: Sequence[int] | None = None
) -> tuple[float, str]:
    """Return the time of a layer on the GPU, and the way that it took; infinite where nothing works."""
    home, before = device.home(), layer.weight.device
    layer.to(home)
    real = REALS[layer.real]
    try:
        x = _random(shape, torch.int8 if layer.input is not None else real, home)
        kind = torch.int8 if isinstance(layer.residual, Grid) else real
        second = None if addend is None else _random(addend, kind, home)
        with torch.no_grad():
            layer(x, second)
            choice = layer.choice(x)
            if choice.microseconds is not None:
                return choice.microseconds, choice.name
            return tuning.device_microseconds(lambda: layer(x, second)), choice.name
    except RuntimeError as error:
        return math.inf, str(error).split("\n")[0][:80]
    finally:
        layer.to(before)


def _random(shape: Sequence[int], dtype: torch.dtype, home: torch.device) -> torch.Tensor:
    if dtype == torch.int8:
        x = torch.randint(-128, 128, tuple(shape), dtype=dtype, device=home)
    else:
        x = torch.randn(tuple(shape), dtype=dtype, device=home)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
