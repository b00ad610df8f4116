"""What a training makes smaller: the loss of one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from fxcompress.errors import InputError, OptionError
from fxcompress.train.data import Batch
from fxcompress.train.losses import Loss

#: A user's own step: step(module, batch) -> loss.
Step = Callable[[nn.Module, Any], Any]


class Objective(Protocol):
    """The loss of a model on one batch.

    helper: a module whose parameters are trained along with the model and thrown away afterwards; None for none.
    looks_inside: whether it runs the model in a way of its own, to see values inside it.
    """

    helper: nn.Module | None
    looks_inside: bool

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss over the samples of a batch, a tensor with one number."""


class Supervised:
    """A loss of output and target.

    Args:
        loss: loss(output, target) -> scalar tensor.
        by_name: whether it is one of the project's, which look at one tensor: `output` says which (see `pick`).
    """

    helper: nn.Module | None = None
    looks_inside: bool = False

    def __init__(self, loss: Loss, by_name: bool = False, output: int | str | None = None) -> None:
        self.loss, self.by_name, self.output = loss, by_name, output

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Run the model and compare its output with the target."""
        output = output_of(module, batch)
        return require_scalar(self.loss(pick(output, self.output) if self.by_name else output, batch.target))


def pick(output: Any, wanted: int | str | None) -> torch.Tensor:
    """Return the tensor of an output that losses and metrics by name look at.

    Args:
        output: a tensor, or several in a tuple or dict.
        wanted: which of them; None for the first tensor.

    Raises:
        OptionError: there is none at that place.
        InputError: there is no tensor at all.
    """
    if isinstance(output, torch.Tensor):
        return output
    if wanted is None:
        first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
        if first is None:
            raise InputError(f"an output of type {type(output).__name__} holds no tensor")
        return first
    try:
        found = output[wanted]
    except (KeyError, IndexError, TypeError):
        parts = ", ".join(map(repr, output)) if isinstance(output, dict) else f"{len(output)} parts"
        raise OptionError(f"output={wanted!r} is not in the output of the model, which has {parts}") from None
    if not isinstance(found, torch.Tensor):
        raise OptionError(f"output={wanted!r} of the model is a {type(found).__name__}, not a tensor")
    return found


class OwnStep:
    """A function of a user that runs the model on a batch of any form, such as the dicts of a tokeniser.

    Args:
        step: step(module, batch) -> loss.
    """

    helper: nn.Module | None = None
    looks_inside: bool = False

    def __init__(self, step: Step) -> None:
        self.step = step

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Call the function."""
        return require_scalar(self.step(module, batch.whole))


def output_of(module: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch; what autocast has made shorter than 32 bits is widened, so that losses are exact."""
    if batch.inputs is None:
        raise InputError("the batches hold no inputs that are known as such; give step(module, batch) -> loss")
    return tree_map(widened, batch.inputs.call(module))


def widened(leaf: Any) -> Any:
    """Return a tensor of 16-bit floats as 32-bit floats, and anything else as it is."""
    short = isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if short else leaf


def require_scalar(value: Any) -> torch.Tensor:
    """Return a loss, or raise `InputError` if it is not one number that depends on parameters."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = f"one of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(f"the loss must be a tensor with one number, not {found}; take the mean over the samples")
    if torch.is_grad_enabled() and not value.requires_grad:
        raise InputError("the loss does not depend on any parameter through operations that can be differentiated")
    return value.reshape(())
