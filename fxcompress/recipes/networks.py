"""The networks that recipes are tried on, and how their owner would have trained them. Images of 1 x 28 x 28."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.demo import BabyCNN
from fxcompress.errors import OptionError, did_you_mean


class Block(nn.Module):
    """Two convolutions of 3 x 3 with batch norm, and a way around them: (n, inputs, h, w) to (n, outputs, h/s, w/s)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of both ways, above zero."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network for small images, of 6 n + 2 layers (He et al., Deep Residual Learning, 2015, section 4.2).

    Three stages of n blocks with `width`, 2 `width` and 4 `width` channels; ResNet-20 has n = 3 and width 16. Where
    sizes change, the way around is a convolution of 1 x 1. Takes (batch, 1, 28, 28), returns (batch, 10) logits.
    """

    def __init__(self, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages = []
        for stage in range(3):
            outputs = width << stage
            first = Block(outputs // 2 if stage else width, outputs, 2 if stage else 1)
            stages.append(nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1))))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        x = self.stages(F.relu(self.bn(self.conv(x))))
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Network:
    """A network to compress.

    build: makes one with fresh weights, of a width. width: of the network. student: width of one of a third of the
    size. passes: pipeline text that trains it from scratch.
    """

    name: str
    build: Callable[[int], nn.Module]
    width: int
    student: int
    passes: str


_NETWORKS = (
    Network("baby-cnn", BabyCNN, 32, 18, "train{epochs=8, learning_rate=0.002, schedule=cosine}"),
    Network(
        "resnet-20", SmallResNet, 16, 9,
        "train{epochs=12, optimiser=sgd, learning_rate=0.05, weight_decay=0.0005, schedule=cosine, warmup=0.05}",
    ),
)  # fmt: skip

NETWORKS: dict[str, Network] = {network.name: network for network in _NETWORKS}


def find_network(name: str) -> Network:
    """Return the network of that name.

    Raises:
        OptionError: there is none; the nearest name is suggested.
    """
    if name not in NETWORKS:
        raise OptionError(f"there is no network {name!r} for recipes{did_you_mean(name, NETWORKS)}")
    return NETWORKS[name]
