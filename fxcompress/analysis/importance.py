"""How much a group of channels matters.

A criterion scores every index of a weight's output dimension by its slice of the weights; the score of a group is the
mean over all the indices that it covers. For a ranking across layers the scores of a family are divided by their mean
(Torch-Pruning's "mean" normaliser), since layers differ in the size of their weights.

- "l1": mean of |w|. "l2": root mean square of w (Li et al., Pruning Filters for Efficient ConvNets, 2017).
- "bn_scale": |gamma| of the batch norms behind (Liu et al., Network Slimming, 2017).
- "random": uniform, from a seed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import fx

from fxcompress.analysis.channels import ChannelAnalysis, Floats, ParameterAxis
from fxcompress.analysis.grouping import Integers
from fxcompress.graph import edit, ops

CRITERIA = ("l1", "l2", "bn_scale", "random")


def score(graph_module: fx.GraphModule, analysis: ChannelAnalysis, criterion: str, seed: int = 0) -> Floats:
    """Return the importance of every group, shape (groups,); NaN for groups that the criterion cannot judge.

    Groups whose weights are all zero (masked before) score -1, below every other.
    """
    magnitude = _mean_over_indices(graph_module, analysis, _producers(analysis), _slice_norms("l2"))
    if criterion == "random":
        found = np.random.default_rng(seed).random(analysis.group_count)
        found[np.isnan(magnitude)] = np.nan
    elif criterion == "bn_scale":
        scales = _batch_norm_scales(graph_module, analysis)
        found = _mean_over_indices(graph_module, analysis, scales, lambda weight: weight.abs())
    elif criterion == "l2":
        found = magnitude
    else:
        found = _mean_over_indices(graph_module, analysis, _producers(analysis), _slice_norms(criterion))
    return np.where(magnitude == 0, -1.0, found)


def _producers(analysis: ChannelAnalysis) -> list[ParameterAxis]:
    return [parameter for parameter in analysis.parameters if parameter.producer]


def _batch_norm_scales(graph_module: fx.GraphModule, analysis: ChannelAnalysis) -> list[ParameterAxis]:
    paths = {f"{node.target}.weight" for node in graph_module.graph.nodes if ops.kind(node) == "batch_norm"}
    return [parameter for parameter in analysis.parameters if paths.intersection(parameter.paths)]


def _slice_norms(criterion: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if criterion == "l1":
        return lambda weight: weight.flatten(1).abs().mean(1)
    return lambda weight: weight.flatten(1).square().mean(1).sqrt()


def _mean_over_indices(
    graph_module: fx.GraphModule,
    analysis: ChannelAnalysis,
    parameters: list[ParameterAxis],
    norms: Callable[[torch.Tensor], torch.Tensor],
) -> Floats:
    total, count = np.zeros(analysis.group_count), np.zeros(analysis.group_count)
    for parameter in parameters:
        tensor = edit.attribute(graph_module, parameter.paths[0]).detach().movedim(parameter.dimension, 0)
        values = norms(tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor)
        per_index = values.double().cpu().numpy()
        if len(per_index) != len(parameter.axis):  # positions shared by all groups of a transposed convolution
            continue
        for row in analysis.groups(parameter.axis):
            total += np.bincount(row, weights=per_index, minlength=analysis.group_count)
            count += np.bincount(row, minlength=analysis.group_count)
    with np.errstate(invalid="ignore"):
        return np.asarray(total / np.where(count == 0, np.nan, count))


def families(analysis: ChannelAnalysis) -> Integers:
    """Return the family of every group, shape (groups,): groups made by the same set of weights are one family.

    Heads are a family, and positions within heads another. Groups that no weight makes are in family -1.
    """
    signature = np.zeros(analysis.group_count, dtype=np.uint64)
    random = np.random.default_rng(0)
    for parameter in _producers(analysis):
        keys = random.integers(1, 2**63, size=3, dtype=np.uint64)
        found = np.unique(analysis.groups(parameter.axis))
        signature[found] ^= keys[analysis.grouping.kind[found]]
    _, family = np.unique(signature, return_inverse=True)
    return np.where(signature == 0, -1, family)


def widths(analysis: ChannelAnalysis) -> Integers:
    """Return how many channels of its widest layer a group covers, shape (groups,)."""
    found = np.zeros(analysis.group_count, dtype=np.int64)
    for parameter in _producers(analysis):
        for row in analysis.groups(parameter.axis):
            found = np.maximum(found, np.bincount(row, minlength=analysis.group_count))
    return found
