"""EliminateDead: nodes, modules, parameters and buffers that the outputs do not need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from fxcompress.graph.metadata import Stage, graph_info
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult
from fxcompress.rewrite import effects
from fxcompress.rewrite.match import layer_of


@dataclass(frozen=True)
class EliminateDead(Pass):
    """Remove what the outputs of the model do not need.

    1. A node that nothing reads goes, and then what only it read.
    2. A node that writes to memory in place, changes running statistics, checks something or is unknown to the operator
       table stays (layers and functions of torch without such effects are known), and so does whatever it reads.
    3. Inputs of the model stay, so that it can be called as before.
    4. Modules that no node calls, parameters and buffers that no node reads, and masks of those go.
    """

    name: ClassVar[str] = "eliminate-dead"
    requires: ClassVar[frozenset[Stage]] = frozenset(Stage)
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Remove dead nodes from the last to the first, then what no node refers to."""
        notes: list[Note] = []
        for node in reversed(graph_module.graph.nodes):
            if not node.users and not effects.has_effects(node):
                notes.append(Note(layer_of(node), f"{node.name} removed: nothing reads it"))
                graph_module.graph.erase_node(node)
        if notes:
            graph_module.recompile()
        dropped = _drop_unused(graph_module)
        notes += [Note(path, "removed: nothing uses it") for path in dropped]
        return PassResult(graph_module, bool(notes), len(notes), tuple(notes))


def _drop_unused(graph_module: fx.GraphModule) -> list[str]:
    """Take out what no node refers to, and return the paths of tensors and of modules without tensors that went."""
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    needed = called | read
    for path in tuple(needed):
        while path := path.rpartition(".")[0]:
            needed.add(path)
    dropped: list[str] = []
    _prune(graph_module, "", called, needed, dropped)
    masks, tensors = graph_info(graph_module).masks, dict.fromkeys(_tensors(graph_module))
    for path in [path for path in masks if path not in tensors]:
        del masks[path]
    return dropped


def _prune(module: nn.Module, prefix: str, called: set[str], needed: set[str], dropped: list[str]) -> None:
    """Prune what lies below a module that no node calls: what is called stays whole."""
    for name in [name for name, tensor in _own_tensors(module).items() if f"{prefix}{name}" not in needed]:
        dropped.append(f"{prefix}{name}")
        delattr(module, name)
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}"
        if path in called:
            continue
        if path in needed:
            _prune(child, f"{path}.", called, needed, dropped)
        else:
            dropped.extend(f"{path}.{below}" for below in _tensors(child))
            if not _tensors(child):
                dropped.append(path)
            delattr(module, name)


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(recurse=False, remove_duplicate=False)),
        **dict(module.named_buffers(recurse=False, remove_duplicate=False)),
    }


def _tensors(module: nn.Module) -> list[str]:
    """Paths of all parameters and buffers, in order."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return [name for name, _ in named]
