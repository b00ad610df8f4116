"""The training loop behind the passes that train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.errors import InputError, OptionError, did_you_mean
from fxcompress.graph import edit
from fxcompress.graph.metadata import graph_info
from fxcompress.graph.regions import regions

Loss = Callable[[Any, Any], torch.Tensor]

LOSSES: dict[str, Loss] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "nll": F.nll_loss,
}

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def find_loss(given: str | Loss) -> Loss:
    """Return a loss by name, or the function given: loss(output, target) -> scalar.

    Raises:
        OptionError: there is no loss of that name.
    """
    if callable(given):
        return given
    if given not in LOSSES:
        raise OptionError(f"there is no loss named {given!r}{did_you_mean(given, LOSSES)}; or give a function")
    return LOSSES[given]


def find_optimiser(name: str, parameters: Iterable[nn.Parameter], **options: float) -> torch.optim.Optimizer:
    """Return an optimiser by name.

    Raises:
        OptionError: there is no optimiser of that name.
    """
    if name not in OPTIMISERS:
        raise OptionError(f"there is no optimiser named {name!r}{did_you_mean(name, OPTIMISERS)}")
    return OPTIMISERS[name](parameters, **options)


def fit(
    module: fx.GraphModule,
    data: Any,
    loss: Loss,
    optimiser: torch.optim.Optimizer,
    epochs: int,
    progress: Callable[[str, int, int | None], None],
) -> list[float]:
    """Train for a number of epochs over an iterable of (input, target) batches and return the mean loss of each.

    Weights that are masked stay zero. The module is in training mode meanwhile, and in its own mode afterwards.

    Raises:
        InputError: no batch, a batch that is no (input, target) pair, or a loss that is not finite.
    """
    history: list[float] = []
    total = len(data) if hasattr(data, "__len__") else None
    with training(module):
        for epoch in range(epochs):
            losses: list[float] = []
            for index, batch in enumerate(data):
                source, target = _pair(batch, index)
                optimiser.zero_grad(set_to_none=True)
                value = loss(_call(module, source), target)
                if not math.isfinite(value.item()):
                    raise InputError(
                        f"the loss is {value.item()} in epoch {epoch + 1}, batch {index + 1}; check the data for NaN, "
                        f"or lower the learning rate"
                    )
                value.backward()
                optimiser.step()
                hold_masks(module)
                losses.append(value.item())
                progress(f"epoch {epoch + 1}/{epochs}, loss {value.item():.3f}", index + 1, total)
            if not losses:
                raise InputError("the training data holds no batch; an iterator can be used for one epoch only")
            history.append(sum(losses) / len(losses))
    return history


def _pair(batch: Any, index: int) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise InputError(
            f"training data must yield (input, target) pairs, but batch {index + 1} is a {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        )
    return batch[0], batch[1]


def _call(module: fx.GraphModule, source: Any) -> Any:
    if isinstance(source, dict):
        return module(**source)
    return module(*source) if isinstance(source, (tuple, list)) else module(source)


def hold_masks(module: fx.GraphModule) -> None:
    """Set masked weights back to zero, whatever momentum or weight decay did to them."""
    with torch.no_grad():
        for graph in (module, *(region.graph_module for region in regions(module))):
            for path, mask in graph_info(graph).masks.items():
                edit.attribute(graph, path).mul_(mask)


@contextmanager
def training(module: nn.Module) -> Iterator[None]:
    """Put a module in training mode, and every child back into its own mode afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.train()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode
