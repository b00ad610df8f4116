"""Observers: modules that watch the values that pass through them and propose a scale and a zero point.

The protocol is the one that PyTorch users know: `forward(x)` returns x unchanged and records it, `calculate_qparams()`
returns (scale, zero point). An observer records only while `recording` is on, so that running a graph for another
reason, to compare outputs for example, leaves its statistics alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from fxcompress.errors import InputError, OptionError, did_you_mean
from fxcompress.quant.arithmetic import affine_parameters, coarsened, fake_quantize
from fxcompress.quant.spec import ACTIVATION, VALUE_SIGNIFICANDS, WEIGHT_SIGNIFICANDS, QuantSpec


class Observer(nn.Module):
    """Base class: records nothing itself. Subclasses define `record`, `reset` and `range`.

    Args:
        spec: the format that the proposed scale and zero point are for.
    """

    merges: ClassVar[bool] = False  #: whether two observers of the class can be merged, exactly and in any order
    count: torch.Tensor

    def __init__(self, spec: QuantSpec = ACTIVATION) -> None:
        super().__init__()
        self.spec = spec
        self.recording = False
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` itself, after recording it if `recording` is on."""
        if self.recording and x.numel():
            self.record(x.detach())
            self.count += x.numel()
        return x

    def record(self, x: torch.Tensor) -> None:
        """Add a tensor of any shape, without gradients, to the statistics."""
        raise NotImplementedError

    def merge(self, other: Any) -> None:
        """Add what another observer of this class has recorded, as if this one had seen it, where `merges` is True."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything recorded."""
        self.count.zero_()

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range that the grid should cover: two tensors of shape () or (channels,)."""
        raise NotImplementedError

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale (float32) and zero point (int32), of shape () or (channels,).

        Raises:
            InputError: nothing has been recorded, or something infinite or NaN.
        """
        if not self.count:
            raise InputError(f"{type(self).__name__} has recorded nothing yet; run data through it with recording on")
        low, high = self.range()
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise InputError(f"{type(self).__name__} has recorded NaN or infinity")
        return affine_parameters(low, high, self.spec)

    def extra_repr(self) -> str:
        """The format, for the printed module."""
        axis = "" if self.spec.channel_axis is None else f", axis={self.spec.channel_axis}"
        name = str(self.spec.dtype).removeprefix("torch.")
        return f"{name}[{self.spec.quant_min},{self.spec.quant_max}]{axis}"


class MinMax(Observer):
    """Covers everything it has seen."""

    merges: ClassVar[bool] = True
    minimum: torch.Tensor
    maximum: torch.Tensor

    def __init__(self, spec: QuantSpec = ACTIVATION) -> None:
        super().__init__(spec)
        self.register_buffer("minimum", torch.tensor(math.inf))
        self.register_buffer("maximum", torch.tensor(-math.inf))

    def record(self, x: torch.Tensor) -> None:
        """Widen the range to hold `x`."""
        low, high = torch.aminmax(x.float())
        self.minimum.copy_(torch.minimum(self.minimum, low))
        self.maximum.copy_(torch.maximum(self.maximum, high))

    def merge(self, other: MinMax) -> None:
        """Widen the range to hold what another observer has seen."""
        self.minimum.copy_(torch.minimum(self.minimum, other.minimum))
        self.maximum.copy_(torch.maximum(self.maximum, other.maximum))
        self.count += other.count

    def reset(self) -> None:
        """Forget everything recorded."""
        super().reset()
        self.minimum.fill_(math.inf)
        self.maximum.fill_(-math.inf)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the smallest and the largest number seen."""
        return self.minimum, self.maximum


class MovingAverageMinMax(MinMax):
    """Averages the range of each batch, later ones counting more; outliers of single batches fade.

    Args:
        spec: the format.
        momentum: the weight of the newest batch, between 0 and 1.
    """

    merges: ClassVar[bool] = False

    def __init__(self, spec: QuantSpec = ACTIVATION, momentum: float = 0.01) -> None:
        if not 0 < momentum <= 1:
            raise OptionError(f"MovingAverageMinMax: momentum must be above 0 and at most 1, not {momentum}")
        super().__init__(spec)
        self.momentum = float(momentum)

    def record(self, x: torch.Tensor) -> None:
        """Move the range towards that of `x`."""
        low, high = torch.aminmax(x.float())
        if not self.count:
            self.minimum.copy_(low)
            self.maximum.copy_(high)
            return
        self.minimum.lerp_(low, self.momentum)
        self.maximum.lerp_(high, self.momentum)


class PerChannelMinMax(Observer):
    """Covers everything seen, for each index of one axis separately. The default of weights."""

    merges: ClassVar[bool] = True
    minimum: torch.Tensor
    maximum: torch.Tensor

    def __init__(self, spec: QuantSpec) -> None:
        if spec.channel_axis is None:
            raise OptionError("PerChannelMinMax needs a QuantSpec with a channel_axis")
        super().__init__(spec)
        self.register_buffer("minimum", torch.empty(0))
        self.register_buffer("maximum", torch.empty(0))

    def record(self, x: torch.Tensor) -> None:
        """Widen the range of each channel to hold its numbers."""
        rows = x.float().movedim(self.spec.channel_axis or 0, 0).flatten(1)
        low, high = torch.aminmax(rows, dim=1) if rows.shape[1] else (rows.new_zeros(len(rows)),) * 2
        if self.minimum.numel():
            low, high = torch.minimum(self.minimum, low), torch.maximum(self.maximum, high)
        self.minimum, self.maximum = low, high

    def merge(self, other: PerChannelMinMax) -> None:
        """Widen the range of each channel to hold what another observer has seen."""
        if self.minimum.numel() and other.minimum.numel():
            self.minimum = torch.minimum(self.minimum, other.minimum)
            self.maximum = torch.maximum(self.maximum, other.maximum)
        elif other.minimum.numel():
            self.minimum, self.maximum = other.minimum.clone(), other.maximum.clone()
        self.count += other.count

    def reset(self) -> None:
        """Forget everything recorded."""
        super().reset()
        self.minimum, self.maximum = self.minimum.new_empty(0), self.maximum.new_empty(0)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the smallest and the largest number of each channel."""
        return self.minimum, self.maximum

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("minimum", "maximum"):  # their length is known only after the first tensor
            if prefix + name in state_dict:
                setattr(self, name, getattr(self, name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class PerChannelError(Observer):
    """Covers, for each index of one axis, the range with the least squared error of rounding and clipping.

    Looks at the last tensor only, as weights are the same at every call. For few bits, where the largest weights are
    better clipped than all others rounded coarsely.
    """

    def __init__(self, spec: QuantSpec) -> None:
        if spec.channel_axis is None:
            raise OptionError("PerChannelError needs a QuantSpec with a channel_axis")
        super().__init__(spec)
        self.latest = torch.empty(0)

    def record(self, x: torch.Tensor) -> None:
        """Remember `x`, without copying it."""
        self.latest = x

    def reset(self) -> None:
        """Forget everything recorded."""
        super().reset()
        self.latest = self.latest.new_empty(0)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range of each channel, of those that share the middle of the grid with the widest one."""
        rows = self.latest.float().movedim(self.spec.channel_axis or 0, 0).flatten(1)
        low, high = torch.aminmax(rows, dim=1) if rows.shape[1] else (rows.new_zeros(len(rows)),) * 2
        spec = self.spec.along(0)
        best, least = torch.ones_like(low), torch.full_like(low, math.inf)
        for share in torch.linspace(1.0, _NARROWEST, _CANDIDATES):
            error = (
                (fake_quantize(rows, *affine_parameters(low * share, high * share, spec), spec) - rows).square().sum(1)
            )
            best = torch.where(error < least, share, best)
            least = torch.minimum(error, least)
        return low * best, high * best


class Histogram(Observer):
    """Counts numbers in bins, and covers the range with the least squared error of rounding and clipping.

    The width of a bin is a power of two and one bin starts at zero, so that widening merges bins in pairs without
    error: the counts depend on the numbers seen, not on their order or their batches, and those of two observers add up
    exactly.

    Source of the criterion: Sung, Shin and Hwang, Resiliency of Deep Neural Networks under Quantization, 2015 (L2
    error minimisation); the search is this project's own.
    """

    merges: ClassVar[bool] = True
    BINS: ClassVar[int] = 4096
    counts: torch.Tensor
    exponent: torch.Tensor
    minimum: torch.Tensor
    maximum: torch.Tensor

    def __init__(self, spec: QuantSpec = ACTIVATION) -> None:
        if spec.channel_axis is not None:
            raise OptionError("Histogram observes whole tensors; use PerChannelMinMax for a scale for each channel")
        super().__init__(spec)
        self.register_buffer("counts", torch.zeros(self.BINS, dtype=torch.int64))
        self.register_buffer("exponent", torch.zeros((), dtype=torch.int64))
        self.register_buffer("minimum", torch.tensor(math.inf))
        self.register_buffer("maximum", torch.tensor(-math.inf))

    def record(self, x: torch.Tensor) -> None:
        """Count the numbers of `x`."""
        x = x.float()
        low, high = torch.aminmax(x)
        self.minimum.copy_(torch.minimum(self.minimum, low))
        self.maximum.copy_(torch.maximum(self.maximum, high))
        bound = max(-self.minimum.item(), self.maximum.item())
        if not math.isfinite(bound):
            return  # calculate_qparams tells
        self._widen(self._exponent(bound))
        steps = x.flatten() * math.ldexp(1.0, -int(self.exponent))
        # Adding before the floor would round numbers just below the edge of a bin up.
        bins = steps.floor_().to(torch.int32).add_(self.BINS // 2)
        self.counts += torch.bincount(bins, minlength=self.BINS)

    def _exponent(self, bound: float) -> int:
        """The smallest e with bound < 2^e * BINS / 2."""
        _, exponent = math.frexp(bound)
        return max(exponent - int(math.log2(self.BINS)) + 1, -120)

    def _widen(self, exponent: int) -> None:
        """Merge bins until one is 2^exponent wide. Bins before the first number are as narrow as the number asks."""
        if not self.counts.any():
            self.exponent.fill_(exponent)
            return
        while int(self.exponent) < exponent:
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts.zero_()
            start = self.BINS // 4
            self.counts[start : start + self.BINS // 2] = pairs
            self.exponent += 1

    def merge(self, other: Histogram) -> None:
        """Add what another observer has recorded, as if this one had seen it."""
        if not other.count:
            return
        counts, exponent = other.counts.clone(), int(other.exponent)
        donor = Histogram(self.spec)
        donor.counts.copy_(counts)
        donor.exponent.fill_(exponent)
        self._widen(max(exponent, int(self.exponent)) if self.count else exponent)
        donor._widen(int(self.exponent))
        self.counts += donor.counts
        self.count += other.count
        self.minimum.copy_(torch.minimum(self.minimum, other.minimum))
        self.maximum.copy_(torch.maximum(self.maximum, other.maximum))

    def reset(self) -> None:
        """Forget everything recorded."""
        super().reset()
        self.counts.zero_()
        self.exponent.zero_()
        self.minimum.fill_(math.inf)
        self.maximum.fill_(-math.inf)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range with the least squared error, of rounding inside it and clipping outside."""
        if not (torch.isfinite(self.minimum) and torch.isfinite(self.maximum)):
            return self.minimum, self.maximum
        values, counts = self.distribution()
        return _least_squared_error(values, counts, self.minimum, self.maximum, self.spec)

    def distribution(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the middle of each bin that is not empty, and how many numbers fell into it (both float64)."""
        width = math.ldexp(1.0, int(self.exponent))
        filled = self.counts.nonzero().flatten()
        values = (filled - self.BINS // 2).double().add(0.5).mul(width)
        return values.clamp(self.minimum.double(), self.maximum.double()), self.counts[filled].double()


class Percentile(Histogram):
    """Clips a share of the numbers at each end, taken from a histogram.

    Args:
        spec: the format.
        share: the percentage of numbers kept below the upper end and above the lower end, in (50, 100].
    """

    def __init__(self, spec: QuantSpec = ACTIVATION, share: float = 99.99) -> None:
        if not 50 < share <= 100:
            raise OptionError(f"Percentile: share must be above 50 and at most 100 (percent), not {share}")
        super().__init__(spec)
        self.share = float(share)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the two percentiles, exact to the width of a bin."""
        if not (torch.isfinite(self.minimum) and torch.isfinite(self.maximum)):
            return self.minimum, self.maximum
        values, counts = self.distribution()
        below = counts.cumsum(0) / counts.sum()
        half_bin = math.ldexp(0.5, int(self.exponent))
        high = values[int(torch.searchsorted(below, self.share / 100))] + half_bin
        low = values[int(torch.searchsorted(below, 1 - self.share / 100, right=True))] - half_bin
        return torch.maximum(low.float(), self.minimum), torch.minimum(high.float(), self.maximum)


#: How far the search for the least squared error clips: a range is never cut to less than this share of its side.
_NARROWEST = 0.1

#: Candidates tried for one end of the range in one sweep.
_CANDIDATES = 64


def _least_squared_error(
    values: torch.Tensor, counts: torch.Tensor, minimum: torch.Tensor, maximum: torch.Tensor, spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move one end of the range after the other, twice, to where the squared error is least."""
    low, high = minimum.clamp(max=0.0).double(), maximum.clamp(min=0.0).double()
    lowest, highest = low, high
    shares = torch.linspace(1.0, _NARROWEST, _CANDIDATES, dtype=torch.float64, device=values.device)
    if spec.symmetric:
        errors = _squared_errors(values, counts, lowest * shares, highest * shares, spec)
        best = shares[errors.argmin()]
        return (low * best).float(), (high * best).float()
    for _ in range(2):
        if highest > 0:
            errors = _squared_errors(values, counts, low.expand_as(shares), highest * shares, spec)
            high = highest * shares[errors.argmin()]
        if lowest < 0:
            errors = _squared_errors(values, counts, lowest * shares, high.expand_as(shares), spec)
            low = lowest * shares[errors.argmin()]
    return low.float(), high.float()


def _squared_errors(
    values: torch.Tensor, counts: torch.Tensor, lows: torch.Tensor, highs: torch.Tensor, spec: QuantSpec
) -> torch.Tensor:
    """Return the squared error of each candidate range. `values` and `counts` have shape (bins,), the ranges (n,)."""
    scale, zero_point = affine_parameters(lows, highs, spec)
    scale = scale[:, None]
    steps = values.float()[None, :] * scale.reciprocal()
    nearest = steps.round().clamp((spec.quant_min - zero_point)[:, None], (spec.quant_max - zero_point)[:, None])
    return (steps - nearest).mul_(scale).square_().double() @ counts


class ChannelMean(nn.Module):
    """Keeps the mean of each channel of what passes: what a layer is given on average, for the correction of its bias.

    Args:
        channels: number of channels.
        axis: where they lie, counted from the end: -3 for a convolution of images, -1 for a linear layer.
    """

    merges: ClassVar[bool] = True
    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, channels: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.recording = False
        self.register_buffer("total", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` itself, after adding it up if `recording` is on."""
        if self.recording and x.numel():
            others = [axis for axis in range(-x.ndim, 0) if axis != self.axis]
            self.total += x.detach().sum(others).double()
            self.count += x.numel() // x.shape[self.axis]
        return x

    def reset(self) -> None:
        """Forget everything recorded."""
        self.total.zero_()
        self.count.zero_()

    def merge(self, other: ChannelMean) -> None:
        """Add what another one has recorded."""
        self.total += other.total
        self.count += other.count

    def mean(self) -> torch.Tensor | None:
        """Return the mean of each channel (float64), or None if nothing has been recorded."""
        return self.total / self.count if self.count else None

    def extra_repr(self) -> str:
        """Size and place of the channels, for the printed module."""
        return f"{len(self.total)}, axis={self.axis}"


class ExternalObserver(nn.Module):
    """Makes an observer from elsewhere, `torch.ao`'s for example, follow `recording`.

    Args:
        observer: a module with `forward(x)` and `calculate_qparams()`. Its format is read from its attributes `dtype`,
            `quant_min`, `quant_max`, `qscheme` and `ch_axis`.

    Raises:
        OptionError: the protocol or the attributes are not there.
    """

    merges: ClassVar[bool] = False
    count: torch.Tensor

    def __init__(self, observer: nn.Module) -> None:
        super().__init__()
        if not callable(getattr(observer, "calculate_qparams", None)):
            raise OptionError(f"{type(observer).__name__} is no observer: it has no calculate_qparams()")
        self.observer = observer
        self.spec = external_spec(observer)
        self.recording = False
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._fresh = {name: tensor.clone() for name, tensor in observer.state_dict().items()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` itself, after showing it to the observer if `recording` is on."""
        if self.recording and x.numel():
            self.observer(x.detach())
            self.count += x.numel()
        return x

    def reset(self) -> None:
        """Put the observer back into the state that it was given in."""
        self.count.zero_()
        for name, tensor in self._fresh.items():
            module_path, _, attribute = name.rpartition(".")
            owner = self.observer.get_submodule(module_path)
            owner._buffers[attribute] = tensor.clone()

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale (float32) and zero point (int32), as the observer proposes them.

        Raises:
            InputError: nothing has been recorded.
        """
        name = type(self.observer).__name__
        if not self.count:
            raise InputError(f"{name} has recorded nothing yet; run data through it with recording on")
        scale, zero_point = self.observer.calculate_qparams()  # type: ignore[operator]
        if not torch.isfinite(scale).all():
            raise InputError(f"{name} has recorded NaN or infinity")
        shape = () if self.spec.channel_axis is None else (-1,)
        given = scale.detach().float().reshape(shape), zero_point.detach().to(torch.int32).reshape(shape)
        return coarsened(*given, self.spec)

    def extra_repr(self) -> str:
        """Nothing: the observer inside prints itself."""
        return ""


def external_spec(observer: nn.Module) -> QuantSpec:
    """Read the format of an observer from elsewhere.

    Raises:
        OptionError: it does not say, or it is for a format that is not 8 bits wide.
    """
    own = getattr(observer, "spec", None)
    if isinstance(own, QuantSpec):
        return own
    inner = getattr(observer, "activation_post_process", observer)  # torch.ao's FakeQuantize keeps its observer there
    name = str(getattr(inner, "dtype", None)).removeprefix("torch.").removeprefix("q")
    dtype = {"uint8": torch.uint8, "int8": torch.int8}.get(name)
    low, high = getattr(inner, "quant_min", None), getattr(inner, "quant_max", None)
    if dtype is None or low is None or high is None:
        raise OptionError(
            f"{type(observer).__name__} is an observer for {name}, or lacks dtype, quant_min and quant_max; "
            f"fxcompress quantises to 8 bits: use dtype=torch.quint8 or torch.qint8"
        )
    scheme = str(getattr(inner, "qscheme", ""))
    axis = getattr(inner, "ch_axis", -1)
    per_channel = "channel" in scheme
    return QuantSpec(
        dtype,
        int(low),
        int(high),
        symmetric="symmetric" in scheme,
        channel_axis=int(axis) if per_channel else None,
        significands=WEIGHT_SIGNIFICANDS if per_channel else VALUE_SIGNIFICANDS,
    )


#: Observers by the names that options use.
OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "moving-average": MovingAverageMinMax,
    "histogram": Histogram,
    "percentile": Percentile,
    "per-channel": PerChannelMinMax,
    "per-channel-error": PerChannelError,
}


def make_observer(wanted: object, spec: QuantSpec) -> nn.Module:
    """Build an observer from what a user gives: a name, a class or factory, or an observer of torch.ao.

    Args:
        wanted: a name of `OBSERVERS`; a subclass of `Observer`, called with `spec`; or a callable without arguments,
            such as an observer class of torch.ao or what its `with_args` returns. Those of `OBSERVERS` that observe
            whole tensors have one scale, whatever `spec` says.
        spec: the format, for observers that do not bring their own.

    Raises:
        OptionError: it is none of these.
    """
    if isinstance(wanted, str):
        if wanted not in OBSERVERS:
            raise OptionError(f"there is no observer named {wanted!r}{did_you_mean(wanted, OBSERVERS)}")
        wanted = OBSERVERS[wanted]
    if isinstance(wanted, type) and issubclass(wanted, Observer):
        whole = wanted in OBSERVERS.values() and wanted not in (PerChannelMinMax, PerChannelError)
        return wanted(replace(spec, channel_axis=None) if whole else spec)
    if not callable(wanted):
        raise OptionError(f"an observer must be a name, a class or a factory of observers, not {wanted!r}")
    made = wanted()
    if not isinstance(made, nn.Module):
        raise OptionError(f"{wanted!r} made {made!r}, which is no observer")
    return made if isinstance(made, Observer) else ExternalObserver(made)
