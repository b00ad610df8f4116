"""What a call of a graph does, for inputs of certain shapes: steps for the kernels, and calls of Python functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fxcompress.emit.native import steps
from fxcompress.emit.native.memory import Buffer, View


class Unplanned(Exception):
    """Raised by a handler: there are no kernels for a node; it is run by Python."""


@dataclass(frozen=True)
class PythonCall:
    """A node that Python runs. `arguments` holds views in the places of tensors; `results` are views in order."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    results: list[View]
    name: str


@dataclass
class Plan:
    """What a call does, item by item, and what it needs.

    items: steps and Python calls, and names: of their nodes. inputs: views of the tensor arguments, in order.
    output: the graph's output, with views in the places of tensors. views: all that steps read and write.
    mixes: whether a step mixes what lies at different indices of the first dimension.
    keep: tensors whose addresses are written in steps. constants: buffers that are tensors of the model.
    """

    items: list[steps.Step | PythonCall] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    inputs: list[View] = field(default_factory=list)
    output: Any = None
    views: list[View] = field(default_factory=list)
    mixes: bool = False
    keep: list[torch.Tensor] = field(default_factory=list)
    constants: dict[int, torch.Tensor] = field(default_factory=dict)
