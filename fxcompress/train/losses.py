"""Losses by name, for the passes that train or differentiate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fxcompress.errors import InputError
from fxcompress.train.calls import read_call

Loss = Callable[[Any, Any], torch.Tensor]

LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "nll": F.nll_loss,
}

#: Losses of classes: the output has one dimension more than a target of labels.
OF_CLASSES = ("cross_entropy", "nll")


def find_loss(given: str | Loss) -> Loss:
    """Return a loss by name, with options ("cross_entropy(label_smoothing=0.1)"), or the function given.

    Args:
        given: a name of `LOSSES`, or a function loss(output, target) -> scalar tensor.

    Raises:
        OptionError: there is no loss of that name, or it does not have such an option.
    """
    if callable(given):
        return given
    name, options = read_call(given, LOSSES, "loss")
    function = functools.partial(LOSSES[name], **options)
    return function if name in OF_CLASSES else functools.partial(_of_equal_shapes, function, name)


def is_of_classes(given: str | Loss) -> bool:
    """Whether a loss is one, by name, that compares the output of a classifier with labels."""
    return isinstance(given, str) and given.partition("(")[0].strip() in OF_CLASSES


def _of_equal_shapes(function: Loss, name: str, output: Any, target: Any) -> torch.Tensor:
    """Refuse what torch would broadcast: a target (n,) against an output (n, 1) compares every pair of samples."""
    shapes = [tuple(value.shape) for value in (output, target) if isinstance(value, torch.Tensor)]
    if len(shapes) == 2 and shapes[0] != shapes[1]:
        raise InputError(f"the loss {name!r} needs output and target of one shape, not {shapes[0]} and {shapes[1]}")
    return function(output, target)
