"""How weights lie in memory while they are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from fxcompress.graph import ops
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.observers import Observer


@contextlib.contextmanager
def channels_last(graph_module: fx.GraphModule, wanted: bool) -> Iterator[None]:
    """Let the weights of 2d convolutions, and with them all images, have their channels side by side; then as before.

    Kernels for training are faster so on CPUs, and in half precision on GPUs (PyTorch's "channels last"). Code that
    fxcompress cannot see may count on how numbers lie: then nothing is moved.

    Args:
        graph_module: a graph in canonical form, whose nodes work in any layout.
        wanted: whether to do anything at all.
    """
    if not wanted or any(_is_hidden(node) for node in graph_module.graph.nodes):
        yield
        return
    weights = [parameter for parameter in graph_module.parameters() if parameter.ndim == 4]
    before = [parameter.stride() for parameter in weights]
    handle = graph_module.register_forward_pre_hook(_move_inputs, with_kwargs=True)
    for parameter in weights:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        handle.remove()
        for parameter, strides in zip(weights, before, strict=True):
            data = parameter.data
            parameter.data = torch.empty_strided(data.shape, strides, dtype=data.dtype, device=data.device).copy_(data)


def _move_inputs(module: Any, arguments: Any, keywords: Any) -> Any:
    return tree_map(_moved, arguments), tree_map(_moved, keywords)


def _moved(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point():
        return value.to(memory_format=torch.channels_last)
    return value


def _is_hidden(node: fx.Node) -> bool:
    """Whether a node stands for code that is not a graph; modules of our own work in any layout."""
    if ops.kind(node) != "opaque":
        return False
    return not (node.op == "call_module" and isinstance(ops.submodule(node), (Observer, FakeQuantize)))
