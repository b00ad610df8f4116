"""Fake quantisation for training: the values of an 8-bit network in float arithmetic, with gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor

from fxcompress.errors import OptionError
from fxcompress.quant.arithmetic import (
    SMALLEST_SCALE,
    broadcast,
    fake_quantize,
    nearest_coarse_scale,
    zero_point_for,
)
from fxcompress.quant.observers import ExternalObserver, Observer
from fxcompress.quant.spec import QuantSpec


class FakeQuantize(nn.Module):
    """Rounds what passes through it to a grid that follows an observer.

    1. Before training it returns what it is given; `Calibrate` shows it data.
    2. From its first call in training mode on it rounds, in evaluation mode too. While training goes on, every call in
       training mode shows the tensor to the observer first, and the grid is the one that the observer then proposes:
       that of a moving average, for example. Gradients pass straight through where nothing is clipped, and are zero
       elsewhere.
    3. Late in training, from the share `freeze_at` of its steps on, the grid stays as it is (`follow_training`).

    All of its state is in the `state_dict`.

    Args:
        observer: proposes the grid.
        is_weight: whether it is given a weight, of which the values at the last call count and no earlier ones.
        channels: how many scales there are, if there is one for each index of the format's channel axis.
        freeze_at: the share of training, in [0, 1], after which the grid stays; 1 for never.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference, 2018; straight-through gradients: Bengio et al., 2013.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    started: torch.Tensor
    frozen: torch.Tensor

    def __init__(
        self,
        observer: Observer | ExternalObserver,
        *,
        is_weight: bool = False,
        channels: int | None = None,
        freeze_at: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= freeze_at <= 1:
            raise OptionError(f"{type(self).__name__}: freeze_at is a share of training in [0, 1], not {freeze_at!r}")
        self.observer = observer
        self.spec: QuantSpec = observer.spec
        self.is_weight = is_weight
        self.freeze_at = float(freeze_at)
        shape = () if self.spec.channel_axis is None or channels is None else (channels,)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("frozen", torch.tensor(False))

    @property
    def recording(self) -> bool:
        """Whether the observer records what passes."""
        return self.observer.recording

    @recording.setter
    def recording(self, on: bool) -> None:
        self.observer.recording = on

    @property
    def quantizing(self) -> bool:
        """Whether values are rounded. Switched on, it starts with the grid that the observer proposes."""
        return bool(self.started)

    @quantizing.setter
    def quantizing(self, on: bool) -> None:
        if on and not self.quantizing:
            self._start(None)
        self.started.fill_(on)

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        """Return `x`, rounded to the grid once training has started.

        Args:
            x: a float tensor.
            gain: positive numbers, one for each scale, that `x` has been multiplied by: see `LearnedQuantize`.
        """
        if isinstance(x, FakeTensor):
            return x  # only shapes are wanted
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()  # as mixed precision gives it: too coarse for a grid of 8 bits
        if self.training and x.numel():
            return self._train(x, gain)
        if self.recording:
            self.observer(x)
        return fake_quantize(x, self.scale, self.zero_point, self.spec) if self.quantizing else x

    def follow_training(self, done: float) -> None:
        """Take notice of how far training has come: the share of its steps that is over, in [0, 1)."""
        self.frozen.fill_(self.quantizing and done >= self.freeze_at)

    def reset(self) -> None:
        """Forget everything recorded, and the grid with it."""
        self.observer.reset()
        self.scale.fill_(1.0)
        self.zero_point.zero_()
        self.started.fill_(False)
        self.frozen.fill_(False)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale (float32) and zero point (int32) in use; before training those that the observer proposes.

        Raises:
            InputError: nothing has been recorded.
        """
        return (self.scale, self.zero_point) if self.quantizing else self.observer.calculate_qparams()

    def extra_repr(self) -> str:
        """The options, for the printed module."""
        return f"freeze_at={self.freeze_at}"

    def _train(self, x: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        """Look at `x`, then round it."""
        if not self.frozen:
            self._observe(x)
            self._start(gain)
        return fake_quantize(x, self.scale, self.zero_point, self.spec)

    def _observe(self, x: torch.Tensor) -> None:
        """Show a tensor to the observer."""
        if self.is_weight:
            self.observer.reset()
        self.observer.recording = True
        self.observer(x)
        self.observer.recording = False

    def _start(self, gain: torch.Tensor | None) -> None:
        """Take over the grid that the observer proposes."""
        scale, zero_point = self.observer.calculate_qparams()
        self._keep(scale, zero_point)
        self.started.fill_(True)

    def _keep(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        self.scale.copy_(scale.detach().reshape(self.scale.shape))
        self.zero_point.copy_(zero_point.detach().reshape(self.zero_point.shape))


class LearnedQuantize(FakeQuantize):
    """Rounds what passes through it to a grid whose step, and whose offset if any, are learned with the weights.

    With the step s, the offset b (the smallest number on the grid, at most 0), the integers quant_min = n .. quant_max
    = p and the zero point z, which is n - b / s rounded, or the format's own for symmetric formats:

        q = clamp(round(x / s) + z, n, p)        y = s (q - z)

        dy/dx = 1 inside, 0 where q is clipped
        dy/ds = round(x / s) - x / s inside; clipped: q - z, or q - n where there is an offset
        dy/db = 0 inside, 1 where q is clipped

    1. The first grid is the observer's: of what `Calibrate` has shown it, or of the first batch in training mode.
    2. The grid in use is the nearest one that the format allows (a coarse scale, an even zero point, see `QuantSpec`);
       the learned numbers themselves stay fine, and take the gradients as if they were in use.
    3. The gradients of s and b are multiplied by g = 1 / sqrt(N * (p - z)), with N the number of weights that have this
       step, or of features of one sample (p - n where there is an offset).
    4. What is learned is relative to the start: s = s0 * `step` and b = b0 * `offset`, both of them 1 at first. The
       gradients are scaled such that plain gradient descent moves s and b as if they were learned themselves; Adam,
       whose steps have the size of the learning rate, moves them by shares of their size. An offset of zero stays.
    5. The weight of a layer with a batch norm behind it passes multiplied by the batch norm's scale (`gain`). The step
       is that of the weight itself, so that it need not be learned anew whenever the batch norm changes.

    Source: Esser et al., Learned Step Size Quantization, 2020; the offset: Bhalgat et al., LSQ+: Improving low-bit
    quantization through learnable offsets and better initialization, 2020. The relative form is this project's own.
    """

    step: nn.Parameter
    offset: nn.Parameter | None
    initial_step: torch.Tensor
    initial_offset: torch.Tensor

    def __init__(self, observer: Observer | ExternalObserver, **options: Any) -> None:
        super().__init__(observer, **options)
        shape = self.scale.shape or (1,)  # FSDP takes no parameters without dimensions
        self.step = nn.Parameter(torch.ones(shape))
        self.register_parameter("offset", None if self.spec.symmetric else nn.Parameter(torch.ones(shape)))
        self.register_buffer("initial_step", torch.ones_like(self.scale))
        self.register_buffer("initial_offset", torch.zeros_like(self.scale))

    def reset(self) -> None:
        """Forget everything recorded and learned."""
        super().reset()
        with torch.no_grad():
            for learned in self.parameters(recurse=False):
                learned.fill_(1.0)

    def _train(self, x: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        """Round to the grid as it has been learned so far; at the first call to the observer's.

        Once that is frozen, the gradients of what was learned are zero: parameters without any would stop training
        on several processes.
        """
        if not self.quantizing:
            if not self.observer.count:
                self._observe(x)
            self._start(gain)
        share = 0.0 if self.frozen else self._gradient_share(x)
        step = _learned(self.initial_step, self.step, share)
        if gain is not None:
            step = step * (gain.detach() if self.frozen else gain)
        offset = None if self.offset is None else _learned(self.initial_offset, self.offset, share)
        if not self.frozen:
            self._keep(*self._grid(step.detach(), offset))
        numbers = self.scale.clone(), self.zero_point.clone()  # another call may change them before the way back
        rounded: torch.Tensor = _LearnedRounding.apply(x, step, offset, *numbers, self.spec)
        return rounded

    def _grid(self, step: torch.Tensor, offset: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale and zero point nearest to what has been learned."""
        scale = nearest_coarse_scale(step.clamp(min=SMALLEST_SCALE), self.spec.significands)
        if offset is None:
            return scale, self.zero_point
        return scale, zero_point_for(offset.detach().clamp(max=0.0), scale, self.spec)

    def _start(self, gain: torch.Tensor | None) -> None:
        """Take over the grid that the observer proposes."""
        super()._start(gain)
        factor = torch.ones_like(self.scale) if gain is None else gain.detach()
        self.initial_step.copy_(torch.where(factor > 0, self.scale / factor, 1.0))  # a gain of zero leaves only zeros
        self.initial_offset.copy_(self.scale * (self.spec.quant_min - self.zero_point))

    def _gradient_share(self, x: torch.Tensor) -> float:
        """The factor g of the gradients."""
        spec = self.spec
        count = x.numel() // max(self.scale.numel() if self.is_weight else len(x), 1)
        most = spec.quant_max - (spec.middle if spec.symmetric else spec.quant_min)
        return 1.0 / math.sqrt(max(count * most, 1))


def _learned(start: torch.Tensor, relative: torch.Tensor, share: float) -> torch.Tensor:
    """Return start * relative, whose gradient is scaled such that descent moves it by `share` of its own gradient."""
    found = start * relative.reshape(start.shape)
    if found.requires_grad:
        factor = torch.where(start == 0, 0.0, share / start.square())
        found.register_hook(lambda gradient: gradient * factor)
    return found


class _LearnedRounding(torch.autograd.Function):
    """The formulas of `LearnedQuantize`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        step: torch.Tensor,
        offset: torch.Tensor | None,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        spec: QuantSpec,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.spec, ctx.has_offset = spec, offset is not None
        return fake_quantize(x, scale, zero_point, spec)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        spec: QuantSpec = ctx.spec
        low, high = (
            broadcast(bound - zero_point, x.ndim, spec.channel_axis) for bound in (spec.quant_min, spec.quant_max)
        )
        steps = x * broadcast(scale.reciprocal(), x.ndim, spec.channel_axis)
        rounded = steps.round()
        clipped = rounded.clamp(low, high)
        inside = clipped == rounded
        through = gradient * inside
        error = torch.where(inside, clipped - steps, clipped - low if ctx.has_offset else clipped)
        step = _summed(gradient * error, scale, spec)
        offset = _summed(gradient - through, scale, spec) if ctx.has_offset else None
        return through, step, offset, None, None, None


def _summed(x: torch.Tensor, like: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Sum to one number for each scale."""
    if spec.channel_axis is None or not like.ndim:
        return x.sum()
    return x.movedim(spec.channel_axis, 0).flatten(1).sum(1)
