"""A captured graph on another device: its tensors, and the devices that its code names."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxcompress.graph import opaque
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import graph_info


def moved(
    graph_module: fx.GraphModule, inputs: ExampleInputs, home: torch.device
) -> tuple[fx.GraphModule, ExampleInputs]:
    """Return a graph module and its example inputs on a device: the same ones, if they are there already.

    The caller's model keeps its tensors: they are copied.
    """
    tensors = [*graph_module.parameters(), *graph_module.buffers(), *inputs.tensors()]
    if all(tensor.device == home for tensor in tensors):
        return graph_module, inputs
    copied = copy.deepcopy(graph_module).to(home)
    there = lambda tensor: tensor.detach().to(home)  # noqa: E731
    for module in copied.modules():
        if isinstance(module, fx.GraphModule):
            _name_device(module.graph, home)
            module.recompile()
            known = graph_info(module)
            known.masks = {path: mask.to(home) for path, mask in known.masks.items()}
            known.regions = {path: given.map(there) for path, given in known.regions.items()}
    elsewhere = inputs.map(there)
    opaque.propagate(copied, elsewhere)
    return copied, elsewhere


@contextlib.contextmanager
def in_full_float32() -> Iterator[None]:
    """Let GPUs compute float32 in float32, not in TF32 with ten bits: what passes promise could not be checked else."""
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]


def _name_device(graph: fx.Graph, home: torch.device) -> None:
    """Let nodes that name a device name another one."""

    def rename(argument: Any) -> Any:
        return home if isinstance(argument, torch.device) else argument

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, rename)
        node.kwargs = fx.node.map_aggregate(node.kwargs, rename)
        makes = node.op == "call_function" and node.target in _MAKERS and "device" not in node.kwargs
        if makes or isinstance(node.kwargs.get("device"), str):
            node.kwargs = {**node.kwargs, "device": home}


#: Functions that make tensors, on the CPU unless they are told another device.
_MAKERS = frozenset(
    {torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.arange, torch.linspace, torch.logspace,
     torch.tensor, torch.rand, torch.randn, torch.randint, torch.randperm, torch.tril_indices, torch.triu_indices}
)  # fmt: skip
