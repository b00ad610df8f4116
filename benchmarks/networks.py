"""Torchvision's networks with random weights whose numbers keep their size from layer to layer.

`networks.py:resnet18`, and so on, is what `fxcompress.bench` and the command line take as a model. As they are
initialised, some networks make outputs of 1e-15, or nothing but zeros: no engine's output could be judged by them. So
the statistics of batch norms are those of random images, and last layers that start at zero get random numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torchvision import models


def __getattr__(name: str) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    if name not in models.list_models():
        raise AttributeError(f"torchvision has no model {name!r}")
    return functools.partial(conditioned, name)


def conditioned(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a network in evaluation mode, and an image (1, 3, 224, 224)."""
    torch.manual_seed(0)
    model: nn.Module = models.get_model(name, weights=None)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches
        norm.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, 224, 224))
    return model.eval(), torch.randn(1, 3, 224, 224)
