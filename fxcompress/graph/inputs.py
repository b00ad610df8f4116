"""Example inputs: positional and keyword arguments of a model, checked and normalised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from fxcompress.errors import InputError


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments that a model can be called with: `model(*args, **kwargs)`."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: object) -> ExampleInputs:
        """Normalise what a user gives: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.

        Raises:
            InputError: there is no tensor in it, or it holds something that is no input.
        """
        if isinstance(given, ExampleInputs):
            return given
        if isinstance(given, torch.Tensor):
            inputs = cls((given,))
        elif isinstance(given, (tuple, list)):
            inputs = cls(tuple(given))
        elif isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
            inputs = cls((), dict(given))
        else:
            raise InputError(
                f"example_inputs must be a tensor, a tuple of positional inputs or a dict of keyword inputs, "
                f"not {type(given).__name__}; for example example_inputs=(torch.randn(1, 3, 224, 224),)"
            )
        if not inputs.tensors():
            raise InputError("example_inputs holds no tensor; give inputs as the model takes them in its forward")
        return inputs

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor in the inputs, nested ones included."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ExampleInputs:
        """Return the same inputs with `function` applied to every tensor."""

        def apply(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, torch.Tensor) else leaf

        return ExampleInputs(tree_map(apply, self.args), tree_map(apply, self.kwargs))

    def call(self, module: Callable[..., Any]) -> Any:
        """Return `module(*args, **kwargs)`."""
        return module(*self.args, **self.kwargs)

    def describe(self) -> str:
        """Return the shapes and dtypes of the tensors, for messages."""
        return ", ".join(
            f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in self.tensors()
        )


def check_device(inputs: ExampleInputs, model: nn.Module) -> None:
    """Raise `InputError` if the inputs are on devices where no parameter of the model is."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    strangers = {tensor.device for tensor in inputs.tensors()} - devices
    if devices and strangers:
        raise InputError(
            f"example_inputs are on {', '.join(sorted(map(str, strangers)))} but the model is on "
            f"{', '.join(sorted(map(str, devices)))}; move one of them with .to(device)"
        )
