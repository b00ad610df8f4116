"""Layers and the batch norms behind them, joined by `InsertObservers` for training and folded afterwards."""

from __future__ import annotations

from torch import fx, nn

from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import graph_info
from fxcompress.passes.fuse_conv_bn import check_backward
from fxcompress.quant.normed_layers import NormedLayer
from fxcompress.rewrite.driver import Applied, apply
from fxcompress.rewrite.match import Match, Refusal, Rule, refuse
from fxcompress.rewrite.pattern import op


def join_batch_norms(graph_module: fx.GraphModule, model: nn.Module | None = None) -> Applied:
    """Turn every convolution or linear layer with a batch norm that `FoldBatchNorm` would fold into one `NormedLayer`.

    Parameters stay what they are, and masks stay with them: those of the layer at their paths, those of the batch norm
    below them at `norm`. Edits the graph in place.

    Args:
        graph_module: the graph.
        model: the caller's model, where it is known. Batch norms that it keeps in evaluation mode, while it is in
            training mode itself, are frozen.
    """
    kept = _kept_norms(graph_module, model)
    pattern = op("batch_norm", bind="norm", input=op("conv", "linear", bind="layer", readers=1))
    done = {"norm": "batch norm trained as a part of {layer}", "layer": "trained with batch norm {norm}"}
    applied = apply(graph_module, [Rule("join-batch-norm", pattern, _join, _check, done)])
    for joined in normed_layers(graph_module).values():
        if joined.norm in kept:
            joined.freeze_norm(0.0)
    return applied


def _kept_norms(graph_module: fx.GraphModule, model: nn.Module | None) -> set[nn.Module]:
    """The modules of a graph that the caller's model keeps in evaluation mode."""
    if model is None or not model.training:
        return set()
    still = {path for path, child in model.named_modules() if not child.training}
    prefix = graph_info(graph_module).layer
    paths = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    return {graph_module.get_submodule(path) for path in paths if f"{prefix}.{path}".strip(".") in still}


def _check(match: Match) -> Refusal | None:
    layer = match["layer"]
    if isinstance(match.module("layer"), NormedLayer):
        return refuse(f"`{layer.target}` is joined with another batch norm already", layer)
    return check_backward(match)


def _join(match: Match) -> None:
    graph_module, path, old = match.workspace.graph_module, str(match["layer"].target), str(match["norm"].target)
    masks = graph_info(graph_module).masks
    moved = {name: masks[f"{old}.{name}"] for name in ("weight", "bias") if f"{old}.{name}" in masks}
    joined = NormedLayer.of(match.module("layer"), match.module("norm"))
    for call in match.workspace.calls(match["norm"]):
        match.workspace.replace(call, call.all_input_nodes[0])
    owner, name = edit.owner(graph_module, path)
    setattr(owner, name, joined)
    masks.update({f"{path}.norm.{parameter}": mask for parameter, mask in moved.items()})


def normed_layers(graph_module: fx.GraphModule) -> dict[str, NormedLayer]:
    """Return the joined layers that a graph calls, by path."""
    found = {str(node.target): ops.submodule(node) for node in graph_module.graph.nodes if node.op == "call_module"}
    return {path: module for path, module in found.items() if isinstance(module, NormedLayer)}


def fold_batch_norms(graph_module: fx.GraphModule) -> dict[str, NormedLayer]:
    """Put plain layers with folded numbers in the places of all joined ones, and return these by path."""
    joined = normed_layers(graph_module)
    masks = graph_info(graph_module).masks
    for path, module in joined.items():
        owner, name = edit.owner(graph_module, path)
        setattr(owner, name, module.folded().train(module.training))
        for parameter in ("bias", "norm.weight", "norm.bias"):  # the folded bias has a part of each
            masks.pop(f"{path}.{parameter}", None)
    return joined
