"""What a training makes smaller: the loss of one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map

from fxcompress.errors import InputError
from fxcompress.train.data import Batch
from fxcompress.train.losses import Loss

#: A user's own step: step(module, batch) -> loss.
Step = Callable[[nn.Module, Any], Any]


class Objective(Protocol):
    """The loss of a model on one batch.

    helper: a module whose parameters are trained along with the model and thrown away afterwards; None for none.
    """

    helper: nn.Module | None

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss over the samples of a batch, a tensor with one number."""


class Supervised:
    """A loss of output and target.

    Args:
        loss: loss(output, target) -> scalar tensor.
    """

    helper: nn.Module | None = None

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Run the model and compare its output with the target."""
        return require_scalar(self.loss(output_of(module, batch), batch.target))


class OwnStep:
    """A function of a user that runs the model on a batch of any form, such as the dicts of a tokeniser.

    Args:
        step: step(module, batch) -> loss.
    """

    helper: nn.Module | None = None

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
