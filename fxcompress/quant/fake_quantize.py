"""Fake quantisation for training: the values of an 8-bit network in float arithmetic, with gradients."""

from __future__ import annotations

import torch
from torch import nn

from fxcompress.quant.arithmetic import fake_quantize
from fxcompress.quant.observers import ExternalObserver, Observer


class FakeQuantize(nn.Module):
    """An observer that can also round what passes through it to the grid it proposes.

    Gradients pass straight through where nothing was clipped and are zero elsewhere.

    Args:
        observer: proposes the grid. While `recording` is on, the grid follows it; otherwise it stays as it is.

    Attributes:
        recording: whether the observer records what passes.
        quantizing: whether values are rounded. Off at first, so that putting the module into a graph changes nothing.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference, 2018; straight-through gradients: Bengio et al., 2013.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, observer: Observer | ExternalObserver) -> None:
        super().__init__()
        self.observer = observer
        self.spec = observer.spec
        self.quantizing = False
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    @property
    def recording(self) -> bool:
        """Whether the observer records what passes."""
        return self.observer.recording

    @recording.setter
    def recording(self, on: bool) -> None:
        self.observer.recording = on

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, rounded to the grid if `quantizing` is on and a grid is known."""
        self.observer(x)
        if self.recording and self.observer.count:
            self.scale, self.zero_point = self.observer.calculate_qparams()
        if not self.quantizing or not self.observer.count:
            return x
        return fake_quantize(x, self.scale, self.zero_point, self.spec)

    def reset(self) -> None:
        """Forget everything recorded, and the grid with it."""
        self.observer.reset()
        self.scale, self.zero_point = torch.ones(()), torch.zeros((), dtype=torch.int32)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale (float32) and zero point (int32) in use.

        Raises:
            InputError: nothing has been recorded.
        """
        if not self.observer.count:
            return self.observer.calculate_qparams()  # raises, with the name of the observer
        return self.scale, self.zero_point
