"""Weights split over the processes while they train (fully sharded data parallelism).

Each process keeps a part of every weight, of its gradient and of the optimiser's state, and gets the whole weights only
while it runs the model. Source: Zhao et al., PyTorch FSDP, 2023; the splitting itself is `torch.distributed.fsdp`'s.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from fxcompress import processes


def is_wanted(option: bool) -> bool:
    """Whether weights shall be split: there are several processes, and a pass or `accelerate launch` asks for it."""
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    return processes.count() > 1 and (option or by_launcher)


def sharded_copy(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """Return a copy of a graph whose parameters are split over the processes.

    Args:
        module: stays as it is. device: where it is.
    """
    processes.gather(None, "splitting weights")  # starts the group of processes
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    duplicate = copy.deepcopy(module)
    fully_shard(duplicate, mesh=init_device_mesh(device.type, (processes.count(),)))
    return duplicate


def is_split(tensor: Any) -> bool:
    """Whether a tensor is split over the processes."""
    return hasattr(tensor, "full_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process has, which shares its memory; all of it where it is not split."""
    return tensor.to_local() if is_split(tensor) else tensor  # type: ignore[attr-defined]


def whole(tree: Any) -> Any:
    """Return whole tensors in the place of split ones, in a nested structure; every process must call it."""
    return tree_map(lambda leaf: leaf.full_tensor() if is_split(leaf) else leaf, tree)


def split_like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor, which every process has, split as another is; it talks to no other process."""
    if not is_split(model) or tensor.shape != model.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = model.device_mesh, model.placements  # type: ignore[attr-defined]
    found: torch.Tensor = distribute_tensor(tensor.to(model.device), mesh, placements, src_data_rank=None)
    return found


def split_state(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict of an optimiser, of whole tensors, with its tensors split as its parameters are."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]

    def split(value: Any, parameter: torch.Tensor) -> Any:
        return split_like(value, parameter) if isinstance(value, torch.Tensor) else value

    entries = {
        index: {name: split(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}
