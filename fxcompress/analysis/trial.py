"""Trying a choice of channels out: masks that are taken back again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import fx, nn

from fxcompress.analysis.channels import ParameterAxis, analyse
from fxcompress.analysis.plans import ChannelPlan, removable
from fxcompress.errors import UnsupportedError
from fxcompress.graph import edit


def to_zero(
    graph_module: fx.GraphModule, plan: ChannelPlan
) -> Iterator[tuple[ParameterAxis, torch.Tensor, torch.Tensor]]:
    """Yield every parameter that a plan masks, its tensor, and the indices that become zero.

    Statistics of batch norms stay: a channel whose weight and bias are zero is zero whatever they are.
    """
    for parameter in plan.analysis.parameters:
        alive = plan.alive(parameter.axis)
        if alive.all() or parameter.paths[0].endswith(("running_mean", "running_var")):
            continue
        tensor = edit.attribute(graph_module, parameter.paths[0])
        yield parameter, tensor, torch.from_numpy((~alive).nonzero()[0]).to(tensor.device)


@contextmanager
def masked(graph_module: fx.GraphModule, plan: ChannelPlan) -> Iterator[None]:
    """Mask the channels of a plan for a while. Tensors are replaced, never written, and the old ones put back."""
    old: dict[tuple[nn.Module, str], torch.Tensor] = {}
    try:
        for parameter, tensor, indices in to_zero(graph_module, plan):
            for path in parameter.paths:
                module, name = edit.owner(graph_module, path)
                old.setdefault((module, name), getattr(module, name))
            zeroed = tensor.detach().index_fill(parameter.dimension, indices, 0)
            edit.set_tied(graph_module, list(parameter.paths), zeroed)
        yield
    finally:
        for (module, name), tensor in old.items():
            setattr(module, name, tensor)


def refusals(graph_module: fx.GraphModule, plan: ChannelPlan) -> dict[int, str]:
    """Return the groups of a plan that could not be removed once they are masked, with the reasons."""
    with masked(graph_module, plan):
        try:
            found = removable(graph_module, analyse(graph_module, constants=True))
        except UnsupportedError:  # a layer was empty before: whoever removes it says so
            return {}
    twins = {(twin.paths[0], twin.dimension): twin for twin in found.producers()}
    refused: dict[int, str] = {}
    for parameter in plan.producers():
        twin = twins.get((parameter.paths[0], parameter.dimension))
        if twin is None or len(twin.axis) != len(parameter.axis):
            continue
        survivors = ~plan.alive(parameter.axis) & found.alive(twin.axis)
        why = found.analysis.groups(twin.axis)
        for index in np.flatnonzero(survivors).tolist():
            reason = next(filter(None, map(found.why_kept, why[:, index].tolist())), "it would not be removed")
            column = plan.analysis.groups(parameter.axis)[:, index]
            refused.update(dict.fromkeys(column[plan.dead[column]].tolist(), reason))
    return refused
