"""FoldBatchNorm and FoldBatchNormForward: batch norms become part of the weights of the layer beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxcompress.graph.metadata import graph_info
from fxcompress.quant.folding import (
    Folded,
    Layer,
    folded_backward,
    folded_forward,
    grouped,
    scale_and_shift,
    ungrouped,
)
from fxcompress.rewrite.driver import RulePass
from fxcompress.rewrite.match import Match, Refusal, Rule, refuse
from fxcompress.rewrite.pattern import op
from fxcompress.rewrite.workspace import tensor_of

_LAYERS = ("conv", "conv_transpose", "linear")


@dataclass(frozen=True)
class FoldBatchNorm(RulePass):
    """Fold a batch norm into the convolution, transposed convolution or linear layer before it.

    With gamma, beta, mean, var and eps of the batch norm, and one number per output channel c:

        scale[c] = gamma[c] / sqrt(var[c] + eps)
        weight'[c] = scale[c] * weight[c]
        bias'[c] = scale[c] * (bias[c] - mean[c]) + beta[c]

    computed in float64 and rounded once to the dtype of the weight. Without affine numbers gamma is 1 and beta 0; a
    layer without a bias gets one. Masks go along: a masked gamma masks its row of the weight. Source: Jacob et al.,
    Quantization and Training of Neural Networks, 2017, section 3.2.

    1. Fires where a batch norm reads a layer that nothing else reads. A pair that is called several times (a network
       with two towers of one set of weights) is folded once, if each call of the one is followed by the other.
    2. Refuses a batch norm in training mode, and one without running statistics: it uses those of the batch.
    3. Refuses if the layer, or one of the two modules, is used in another way as well: read by other nodes, called
       without the other, or with a parameter that something else uses too.
    4. Refuses where the batch norm normalises another axis than the channels of the layer (a linear layer on
       sequences), and where the result has another dtype than the layer's output.
    5. Refuses if a folded weight would not be finite.
    """

    name: ClassVar[str] = "fold-batch-norm"
    refused: ClassVar[str] = "not fused"

    def rules(self) -> tuple[Rule, ...]:
        """Return the one rule of this pass."""
        pattern = op("batch_norm", bind="norm", input=op(*_LAYERS, bind="layer", readers=1))
        done = {"norm": "batch norm folded into {layer}", "layer": "batch norm {norm} folded in"}
        return (Rule("fold-batch-norm", pattern, _fold_backward, check_backward, done, explains_mismatch=True),)


@dataclass(frozen=True)
class FoldBatchNormForward(RulePass):
    """Fold a batch norm into the convolution or linear layer behind it.

    The batch norm computes scale[c] * x[c] + shift[c] per input channel c, with shift = beta - scale * mean, so that

        weight'[o, c] = scale[c] * weight[o, c]
        bias'[o] = bias[o] + sum over c and kernel of shift[c] * weight[o, c]

    computed in float64. Padding with zeros comes after the batch norm, whose shift is then missing at the border;
    padding that repeats the input (circular, reflect, replicate) carries the shift along.

    1. Fires where a layer reads a batch norm that nothing else reads, and the layer does not pad, pads with values of
       its input, or the shift is zero everywhere.
    2. Refuses padding with zeros, and a transposed convolution larger than 1 or with a stride (fewer taps at the
       border), unless the shift is zero.
    3. Refuses as FoldBatchNorm does: training mode, no running statistics, other uses, another axis, not finite.
    4. Refuses if the input of the batch norm is written to in place somewhere.
    """

    name: ClassVar[str] = "fold-batch-norm-forward"
    refused: ClassVar[str] = "not fused"

    def rules(self) -> tuple[Rule, ...]:
        """Return the one rule of this pass."""
        pattern = op(*_LAYERS, bind="layer", input=op("batch_norm", bind="norm", readers=1))
        done = {"norm": "batch norm folded into {layer}", "layer": "batch norm {norm} folded in"}
        return (Rule("fold-batch-norm-forward", pattern, _fold_forward, _check_forward, done),)


# -- when -------------------------------------------------------------------------------------------------------------


def check_backward(match: Match) -> Refusal | None:
    """Return why the batch norm `norm` is no part of the layer `layer` before it, or None."""
    return _check_norm(match) or _check_uses(match) or _check_values(match) or _check_finite(match, folded_backward)


def _check_forward(match: Match) -> Refusal | None:
    return (
        _check_norm(match)
        or _check_uses(match)
        or _check_values(match)
        or _check_border(match)
        or _check_memory(match)
        or _check_finite(match, folded_forward)
    )


def _check_norm(match: Match) -> Refusal | None:
    norm = match.module("norm")
    if norm.running_mean is None or norm.running_var is None:
        return refuse(f"`{match['norm'].target}` has no running statistics: it uses those of each batch", match["norm"])
    if norm.training:
        return refuse("batch norm is in training mode; call model.eval() before compiling", match["norm"])
    return None


def _check_uses(match: Match) -> Refusal | None:
    """The two modules are used with each other only, and share no parameter with anything else."""
    layer, norm = match["layer"], match["norm"]
    layers, norms = match.workspace.calls(layer), match.workspace.calls(norm)
    front, behind = (layers, norms) if layer in norm.all_input_nodes else (norms, layers)
    paired = {node for node in front if len(node.users) == 1} == {node.args[0] for node in behind}
    if not paired or len(front) != len(behind):
        often, other = (norms, layer) if len(norms) > 1 else (layers, norm)
        reason = f"module `{often[0].target}` is called {len(often)} times, not always with `{other.target}`"
        return refuse(reason, *often)
    for node in (layer, norm):
        sharers = match.workspace.sharers(node)
        if sharers:
            return refuse(f"a parameter of `{node.target}` is also used by {', '.join(sharers)}", node)
    return None


def _check_values(match: Match) -> Refusal | None:
    """Axis 1 of every batch norm is the channel axis of the layer, and both have one dtype."""
    layer: Layer = match.module("layer")
    for norm in match.workspace.calls(match["norm"]):
        given, normed = tensor_of(norm.all_input_nodes[0]), tensor_of(norm)
        if given is None or normed is None:
            return refuse(f"the shape of `{norm.name}` is not known", norm)
        if len(given.shape) != layer.weight.ndim:
            axis = f"axis 1 of {given}, which is not the channel axis of `{match['layer'].target}`"
            return refuse(f"`{norm.name}` normalises {axis}", norm, match["layer"])
        if {given.dtype, normed.dtype} != {layer.weight.dtype}:
            reason = f"`{norm.name}` makes {normed} of {given}, and `{match['layer'].target}` has {layer.weight.dtype}"
            return refuse(reason, norm, match["layer"])
    return None


def _check_border(match: Match) -> Refusal | None:
    layer, node = match.module("layer"), match["layer"]
    if not bool(scale_and_shift(match.module("norm"))[1].any()):
        return None
    if isinstance(layer, _ConvTransposeNd):
        if {*layer.kernel_size, *layer.stride} != {1} or any(layer.output_padding):
            return refuse(f"`{node.target}` has fewer taps at the border, and the batch norm has a shift", node)
    elif isinstance(layer, _ConvNd) and layer.padding_mode == "zeros" and _pads(layer):
        return refuse(f"`{node.target}` pads with zeros, and the batch norm has a shift", node)
    return None


def _check_memory(match: Match) -> Refusal | None:
    source = match["norm"].all_input_nodes[0]
    return refuse(f"`{source.name}` is written to in place", source) if match.workspace.is_written(source) else None


def _pads(layer: _ConvNd) -> bool:
    """Whether a convolution pads at all."""
    if layer.padding == "same":
        return any(dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True))
    return layer.padding != "valid" and any(layer.padding)


def _check_finite(match: Match, fold: Callable[[Layer, _BatchNorm], Folded]) -> Refusal | None:
    with torch.no_grad():
        folded = fold(match.module("layer"), match.module("norm"))
    if bool(folded.weight.isfinite().all()) and bool(folded.bias.isfinite().all()):
        match.findings["folded"] = folded
        return None
    layer = match["layer"]
    return refuse(f"the folded weight of `{layer.target}` would not be finite in {folded.weight.dtype}", layer)


# -- the edits --------------------------------------------------------------------------------------------------------


def _fold_backward(match: Match) -> None:
    """Rows of the weight that the batch norm's mask holds at zero stay there; a row's bias does if beta is held too."""
    gamma, beta = _norm_masks(match)
    _mask_weight(match, gamma, 1)
    match.workspace.set_mask(f"{match['layer'].target}.bias", None if beta is None or gamma is None else gamma | beta)
    _finish(match)


def _fold_forward(match: Match) -> None:
    """Columns of the weight that the batch norm's mask holds at zero stay there; the bias does if nothing is added."""
    gamma, _ = _norm_masks(match)
    _mask_weight(match, gamma, 2)
    if bool(scale_and_shift(match.module("norm"))[1].any()):
        match.workspace.set_mask(f"{match['layer'].target}.bias", None)
    _finish(match)


def _norm_masks(match: Match) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    masks, path = graph_info(match.workspace.graph_module).masks, str(match["norm"].target)
    return masks.get(f"{path}.weight"), masks.get(f"{path}.bias")


def _mask_weight(match: Match, channels: torch.Tensor | None, axis: int) -> None:
    """Hold at zero what a mask of output (axis 1) or input (axis 2) channels covers, besides what is held already."""
    if channels is None:
        return
    layer, path = match.module("layer"), f"{match['layer'].target}.weight"
    old = graph_info(match.workspace.graph_module).masks.get(path, torch.ones_like(layer.weight, dtype=torch.bool))
    rows = grouped(layer, old)
    shape = [len(rows), 1, 1, 1]
    shape[axis] = -1
    match.workspace.set_mask(path, ungrouped(layer, rows & channels.to(old.device).view(shape)))


def _finish(match: Match) -> None:
    """Write the folded numbers, and take every call of the batch norm out of the graph."""
    layer, norm, folded = match.module("layer"), match.module("norm"), match.findings["folded"]
    trained = any(parameter.requires_grad for parameter in (*layer.parameters(), *norm.parameters()))
    match.workspace.set_tensor(f"{match['layer'].target}.weight", folded.weight)
    match.workspace.set_tensor(f"{match['layer'].target}.bias", folded.bias, requires_grad=trained)
    for call in match.workspace.calls(match["norm"]):
        match.workspace.replace(call, call.all_input_nodes[0])
