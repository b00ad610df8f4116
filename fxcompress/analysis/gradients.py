"""What the gradients of a loss say about every weight, and what reaches the readers of every channel.

Both run data through a copy of the whole model, in evaluation mode: no parameter, gradient or statistic of the
caller's graph changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from fxcompress import processes
from fxcompress.analysis.channels import Axis, ChannelAnalysis, ParameterAxis
from fxcompress.errors import InputError
from fxcompress.graph import edit, ops
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.shapes import evaluation

#: A statistic by the dotted path of a parameter.
Measured = dict[str, torch.Tensor]

Loss = Callable[[Any, Any], torch.Tensor]

#: Layers whose weights make channels, and whose output can be looked at.
_MAKERS = (*ops.ANCHOR_KINDS, "embedding")

#: What belongs to a layer as far as its activation goes: normalisation, and functions of one tensor.
_BEHIND = (
    "batch_norm", "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "mish", "gelu", "leaky_relu", "elu",
    "selu", "celu", "sigmoid", "tanh", "softplus", "softsign", "prelu", "clamp",
)  # fmt: skip


# Gradients


def squared_gradients(
    root: fx.GraphModule,
    path: str,
    pairs: Iterable[tuple[ExampleInputs, Any]],
    loss: Loss,
    *,
    by_sample: bool,
    progress: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Return the mean square of the gradient of a loss, for every weight of a graph.

    Args:
        root: the whole model; a copy of it is differentiated. path: of the graph within it, "" for itself.
        pairs: inputs and target of each batch.
        loss: loss(output, target) -> scalar, the mean over the samples of a batch.
        by_sample: whether each sample's gradient is squared, which is the diagonal of the empirical Fisher matrix; or
            that of each batch.
        progress: called with the number of batches done.

    Returns:
        parameter path within the graph -> tensor of the parameter's shape; parameters without a gradient are missing.

    Raises:
        InputError: there is no batch, or a loss or gradient that is not finite, not scalar, or not there.
    """
    whole = copy.deepcopy(root)
    parameters = dict(edit.attribute(whole, path).named_parameters(remove_duplicate=False))
    total: Measured = {}
    units = 0
    with evaluation(whole), torch.enable_grad():
        for parameter in whole.parameters():
            parameter.requires_grad_(parameter.dtype.is_floating_point)
        for number, (inputs, target) in enumerate(pairs, start=1):
            for piece, goal in _samples(inputs, target, number) if by_sample else [(inputs, target)]:
                whole.zero_grad(set_to_none=True)
                _differentiate(whole, piece, goal, loss, number)
                _add_squares(total, parameters, number)
                units += 1
            progress(number)
    units = _total(total, parameters, units)
    if not units:
        raise InputError("the data holds no batch; an iterator can be used once only")
    return {name: tensor / units for name, tensor in total.items()}


def _total(sums: Measured, parameters: dict[str, nn.Parameter], units: int) -> int:
    """Add up the sums of all processes in place, and return how much they are of."""
    if processes.count() == 1:
        return units
    known = sorted(set().union(*processes.gather(set(sums), "adding up importance")))
    for name in known:
        if name not in sums:
            sums[name] = torch.zeros_like(parameters[name], dtype=torch.float64)
    processes.add_up([sums[name] for name in known], "adding up importance")
    return sum(processes.gather(units, "adding up importance"))


def _differentiate(whole: fx.GraphModule, inputs: ExampleInputs, target: Any, loss: Loss, number: int) -> None:
    try:
        value = loss(inputs.call(whole), target)
    except (RuntimeError, ValueError, TypeError, IndexError, InputError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"the loss of batch {number} cannot be computed: {type(error).__name__}: {reason}") from error
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise InputError(f"the loss must be a tensor with one number, not {_described(value)}")
    if not torch.isfinite(value):
        raise InputError(f"the loss of batch {number} is {value.item()}; check the data and the model for NaN")
    if not value.requires_grad:
        raise InputError("the loss does not depend on any parameter through operations that can be differentiated")
    value.backward()


def _described(value: Any) -> str:
    return f"one of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _add_squares(total: Measured, parameters: dict[str, nn.Parameter], number: int) -> None:
    for name, parameter in parameters.items():
        if parameter.grad is None:
            continue
        square = parameter.grad.detach().double().square()
        if not torch.isfinite(square).all():
            raise InputError(f"the gradient of {name!r} in batch {number} is not finite")
        total[name] = total[name] + square if name in total else square


def _samples(inputs: ExampleInputs, target: Any, number: int) -> Iterator[tuple[ExampleInputs, Any]]:
    """Cut a batch into batches of one sample."""
    size = int(inputs.tensors()[0].shape[0])
    for index in range(size):

        def cut(leaf: Any, index: int = index) -> Any:
            same = isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == size
            return leaf[index : index + 1] if same else leaf

        if isinstance(target, (list, tuple)) and len(target) == size:  # one target a sample, as detectors take them
            goal: Any = type(target)([target[index]])
        else:
            goal = tree_map(cut, target)
            if isinstance(target, torch.Tensor) and goal is target:
                raise InputError(
                    f"batch {number} has {size} inputs but a target of shape {tuple(target.shape)}: it cannot be cut "
                    f"into samples"
                )
        yield inputs.map(cut), goal


# Activations


def mean_activations(
    root: fx.GraphModule,
    path: str,
    graph_module: fx.GraphModule,
    analysis: ChannelAnalysis,
    batches: Iterable[ExampleInputs],
    progress: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Return the mean absolute activation of every channel, behind the layer's normalisation and activation function.

    Args:
        root: the whole model; a copy of it is run. path: of the graph within it, "" for itself.
        graph_module: the graph. analysis: of it.
        batches: inputs of the whole model.
        progress: called with the number of batches done.

    Returns:
        path of the weight that makes the channels -> tensor of shape (channels,). Layers that were not run are missing.

    Raises:
        InputError: there is no batch, a batch does not fit the model, or an activation is not finite.
    """
    whole = copy.deepcopy(root)
    probes = _place_probes(edit.attribute(whole, path), graph_module, analysis)
    count = 0
    with evaluation(whole), torch.no_grad():
        for count, inputs in enumerate(batches, start=1):
            try:
                inputs.call(whole)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                reason = str(error).strip().split("\n")[0]
                raise InputError(f"batch {count} ({inputs.describe()}) does not fit the model: {reason}") from error
            progress(count)
    if not sum(processes.gather(count, "adding up importance")):
        raise InputError("the data holds no batch; an iterator can be used once only")
    _add_up_probes([probe for placed in probes.values() for probe in placed])
    found: Measured = {}
    for weight, placed in probes.items():
        seen = [probe for probe in placed if probe.samples]
        if seen:
            found[weight] = torch.stack([probe.mean() for probe in seen]).mean(0)
            if not torch.isfinite(found[weight]).all():
                raise InputError(f"the channels of {weight!r} are not finite on this data")
    return found


class _Probe(nn.Module):
    """Hands on what it is given, and remembers the mean absolute value of every index of one dimension."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.dimension = dimension
        self.total = torch.zeros((), dtype=torch.float64)
        self.samples = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x."""
        values = x.detach().abs().double().movedim(self.dimension, 0).flatten(1)
        self.total = values.sum(1) + self.total.to(values.device)
        self.samples += values.shape[1]
        return x

    def mean(self) -> torch.Tensor:
        """Return the mean over all that was seen, shape (channels,)."""
        return self.total / self.samples


def _add_up_probes(probes: list[_Probe]) -> None:
    """Give every process what the probes of all have seen."""
    seen = processes.gather([(probe.total.cpu(), probe.samples) for probe in probes], "adding up importance")
    for index, probe in enumerate(probes):
        parts = [found[index] for found in seen if found[index][1]]
        if parts:
            device = probe.total.device
            probe.total = torch.stack([total for total, _ in parts]).sum(0).to(device)
            probe.samples = sum(samples for _, samples in parts)


def _place_probes(
    target: fx.GraphModule, graph_module: fx.GraphModule, analysis: ChannelAnalysis
) -> dict[str, list[_Probe]]:
    """Put a probe behind every layer of `target`, a copy of `graph_module`. Returns them by the path of the weight."""
    twins = {node.name: node for node in target.graph.nodes}
    weights = {path: parameter for parameter in analysis.parameters if parameter.producer for path in parameter.paths}
    probes: dict[str, list[_Probe]] = {}
    for node in graph_module.graph.nodes:
        parameter = weights.get(f"{node.target}.weight") if ops.kind(node) in _MAKERS else None
        if parameter is None:
            continue
        end, dimension = _end_of_layer(node, parameter, analysis)
        if end is None:
            continue
        probe = _Probe(dimension)
        probes.setdefault(parameter.paths[0], []).append(probe)
        _insert_behind(target, twins[end.name], probe)
    target.recompile()
    return probes


def _end_of_layer(
    node: fx.Node, parameter: ParameterAxis, analysis: ChannelAnalysis
) -> tuple[fx.Node | None, int]:  # fmt: skip
    """Return the last node that belongs to a layer, and which of its dimensions holds the channels."""
    dimension = _dimension_of(node, parameter, analysis)
    if dimension is None:
        return None, 0
    while len(node.users) == 1:
        (user,) = node.users
        axes: Any = analysis.axes.get(user)
        axis = axes[dimension] if isinstance(axes, tuple) and len(axes) > dimension else None
        if ops.kind(user) not in _BEHIND or not isinstance(axis, Axis) or len(axis) != len(parameter.axis):
            break
        node = user
    return node, dimension


def _dimension_of(node: fx.Node, parameter: ParameterAxis, analysis: ChannelAnalysis) -> int | None:
    axes = analysis.axes.get(node)
    for dimension, axis in enumerate(axes if isinstance(axes, tuple) else ()):
        if isinstance(axis, Axis) and np.array_equal(axis.atoms, parameter.axis.atoms):
            return dimension
    return None


def _insert_behind(graph_module: fx.GraphModule, node: fx.Node, probe: _Probe) -> None:
    name = edit.unique_path(graph_module, "probe")
    graph_module.add_module(name, probe)
    with graph_module.graph.inserting_after(node):
        call = graph_module.graph.call_module(name, (node,))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
