"""What pooling on CPUs and on GPUs shares: its options, and PyTorch's functions for averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxcompress.emit.cpu_numbers import Kernel

#: Averages by the word of the operator table and the number of spatial dimensions.
AVERAGES: dict[str, dict[int, Callable[..., torch.Tensor]]] = {
    "avg_pool": {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d},
    "adaptive_avg_pool": {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d},
}


class MaxPool(Kernel):
    """Base of modules that take the maximum over windows.

    Args:
        kernel_size, stride, padding, dilation: one number for each spatial dimension.
        ceil_mode: as in `torch.nn.MaxPool2d`.
    """

    def __init__(
        self,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride = list(kernel_size), list(stride)
        self.padding, self.dilation = list(padding), list(dilation)
        self.ceil_mode = bool(ceil_mode)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "ceil_mode": self.ceil_mode,
        }
