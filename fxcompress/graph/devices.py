"""A captured graph on another device: its tensors, and the devices that its code names."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.shapes import propagate


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
    for module in copied.modules():
        if isinstance(module, fx.GraphModule):
            _name_device(module.graph, home)
            module.recompile()
    elsewhere = inputs.map(lambda tensor: tensor.detach().to(home))
    propagate(copied, elsewhere)
    return copied, elsewhere


def _name_device(graph: fx.Graph, home: torch.device) -> None:
    """Let nodes that name a device name another one."""

    def rename(argument: Any) -> Any:
        return home if isinstance(argument, torch.device) else argument

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, rename)
        node.kwargs = fx.node.map_aggregate(node.kwargs, rename)
        if isinstance(node.kwargs.get("device"), str):
            node.kwargs = {**node.kwargs, "device": home}
