"""Modules that stand where something will be rounded later, with nothing to observe beforehand."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses import FakeTensor


class Unobserved(nn.Module):
    """Computes without rounding at first; with `trains`, it rounds from its first call in training mode on.

    From then on it rounds in evaluation mode too, as fake-quantisers do (`quant.fake_quantize`).

    Args:
        trains: whether it shall round once training has started.
    """

    started: torch.Tensor

    def __init__(self, trains: bool = False) -> None:
        super().__init__()
        self.trains = trains
        self.register_buffer("started", torch.tensor(False))

    def rounds(self, x: torch.Tensor) -> bool:
        """Whether to round, in a call with `x`; the first one in training mode starts it."""
        if isinstance(x, FakeTensor):
            return False  # only shapes are wanted
        if self.training and self.trains:
            self.started.fill_(True)
        return bool(self.started)
