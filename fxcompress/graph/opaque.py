"""Opaque nodes: code that could not be traced, kept as one call, and what it did on the example inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxcompress.errors import InputError
from fxcompress.graph import shapes
from fxcompress.graph.compare import buffers_kept
from fxcompress.graph.examples import DataDependentError, ExampleValues
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import Opaque, info, set_info
from fxcompress.graph.shapes import bind_placeholders, describe_value, evaluation


def nodes(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Return the opaque nodes of a graph."""
    return [node for node in graph_module.graph.nodes if info(node).opaque is not None]


def reasons(graph_module: fx.GraphModule) -> dict[str, str]:
    """Return why each opaque node could not be traced, by the path of its module or the node's name."""
    found = {}
    for node in nodes(graph_module):
        opaque = info(node).opaque
        if opaque is not None:
            found[str(node.target) if node.op == "call_module" else node.name] = opaque.reason
    return found


def record(graph_module: fx.GraphModule, inputs: ExampleInputs) -> None:
    """Run the graph on the example inputs, if it has opaque nodes, and record what they are given and return.

    The shapes of what they return can be known in no other way, as long as their inputs have these shapes.
    """
    if not nodes(graph_module):
        return
    placeholders = bind_placeholders(graph_module.graph, inputs.map(lambda tensor: tensor.detach().clone()))
    with evaluation(graph_module), buffers_kept(graph_module), torch.no_grad(), torch.random.fork_rng(devices=[]):
        _Recorder(graph_module).run(initial_env=placeholders)


def propagate(graph_module: fx.GraphModule, inputs: ExampleInputs) -> None:
    """Record shapes after an edit. Where opaque nodes are given other shapes than before, they are run on the inputs.

    Raises:
        InputError: the graph cannot be run on inputs of these shapes.
    """
    try:
        shapes.propagate(graph_module, inputs)
    except InputError:
        if not nodes(graph_module):
            raise
        record(graph_module, inputs)
        shapes.propagate(graph_module, inputs)


def mark_data_dependent(graph_module: fx.GraphModule, inputs: ExampleInputs) -> bool:
    """Mark nodes whose shape depends on data (`x[mask]`, `torch.nonzero`, ...) as opaque. Returns whether any is."""
    arguments = {str(node.target): value for node, value in bind_placeholders(graph_module.graph, inputs).items()}
    values = ExampleValues(graph_module, arguments)
    found = False
    for node in graph_module.graph.nodes:
        try:
            values.of(node)
        except DataDependentError:
            set_info(node, opaque=Opaque("its result's shape depends on data"))
            found = True
        except Exception:  # a node that does not run at all: shapes.propagate explains it
            return False
    return found


class _Recorder(fx.Interpreter):
    """Keeps what opaque nodes take and give."""

    def run_node(self, n: fx.Node) -> Any:
        opaque = info(n).opaque
        if opaque is None:
            return super().run_node(n)
        given = describe_value(self.fetch_args_kwargs_from_env(n))
        result = super().run_node(n)
        set_info(n, opaque=replace(opaque, inputs=given, value=describe_value(result)))
        return result
