"""Edits that every pass needs: modules and parameters by path, ties kept, unique names."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import fx, nn

from fxcompress.errors import PassError


def attribute(root: nn.Module, path: str) -> Any:
    """Return the module, parameter or buffer at a dotted path ("" is the root itself)."""
    found: Any = root
    for name in filter(None, path.split(".")):
        if not hasattr(found, name):
            raise PassError(f"the module has no attribute {path!r}")
        found = getattr(found, name)
    return found


def owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that holds the attribute at `path`, and the attribute's name."""
    parent, _, name = path.rpartition(".")
    return attribute(root, parent), name


def tensor_paths(root: nn.Module) -> dict[int, list[str]]:
    """Return all dotted paths of each parameter and buffer, by identity of the tensor: tied ones have several."""
    paths: dict[int, list[str]] = defaultdict(list)
    named = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
    for path, tensor in named:
        paths[id(tensor)].append(path)
    return dict(paths)


def set_tensor(root: nn.Module, path: str, data: torch.Tensor) -> None:
    """Replace the parameter or buffer at one path by new data, keeping `requires_grad`. Other paths are not touched."""
    module, name = owner(root, path)
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(data.detach().clone(), requires_grad=old.requires_grad))
    elif name in module._buffers:
        module._buffers[name] = data.detach().clone()
    else:
        setattr(module, name, data.detach().clone())


def set_tied(root: nn.Module, paths: list[str], data: torch.Tensor) -> None:
    """Replace a tensor at all of its paths at once, so that it stays one tensor."""
    set_tensor(root, paths[0], data)
    first = attribute(root, paths[0])
    for path in paths[1:]:
        module, name = owner(root, path)
        if name in module._buffers:
            module._buffers[name] = first
        else:
            setattr(module, name, first)


def unique_path(root: nn.Module, wanted: str) -> str:
    """Return `wanted`, or with a number behind it if the root has an attribute of that path already."""
    path, number = wanted, 0
    while _has(root, path):
        number += 1
        path = f"{wanted}_{number}"
    return path


def add_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path, making plain containers on the way."""
    parent = root
    *containers, name = path.split(".")
    for container in containers:
        if not hasattr(parent, container):
            parent.add_module(container, nn.Module())
        parent = getattr(parent, container)
    parent.add_module(name, module)


def callers(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Return the nodes that call each module, by the module's path."""
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            found[str(node.target)].append(node)
    return dict(found)


def replace_and_erase(node: fx.Node, replacement: fx.Node) -> None:
    """Let every user of `node` read `replacement`, and erase `node`."""
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)


def _has(root: nn.Module, path: str) -> bool:
    found: Any = root
    for name in path.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True
