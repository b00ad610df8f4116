"""How much a group of channels matters.

A criterion scores every index of a weight's output dimension; the score of a group is the mean, sum or maximum over all
the indices that it covers. For a ranking across layers the scores of a family are divided by their mean
(Torch-Pruning's "mean" normaliser), since layers differ in the size of their weights. Where w is the slice of a weight
that belongs to an index:

- "l1": mean of |w|. "l2": root mean square of w (Li et al., Pruning Filters for Efficient ConvNets, 2017).
- "lamp": the mean square of w, divided by the sum of those of all groups of the family that are not smaller (Lee et
  al., Layer-Adaptive Sparsity for the Magnitude-based Pruning, 2021; for groups as Torch-Pruning does). Scores of
  layers compare as they are, so they are not divided by a mean.
- "fpgm": the sum of the distances of w to all other slices of the weight; the smallest is nearest to the geometric
  median, which the others can replace (He et al., Filter Pruning via Geometric Median, 2019).
- "bn_scale": |gamma| of the batch norms behind (Liu et al., Network Slimming, 2017).
- "taylor": sum of (g w)^2, g the gradient of the loss, squared for every batch and averaged (Molchanov et al.,
  Importance Estimation for Neural Network Pruning, 2019, equation 8).
- "hessian": half the sum of h w^2, h the diagonal of the Hessian (LeCun et al., Optimal Brain Damage, 1990) as the
  empirical Fisher matrix has it, the mean squared gradient of single samples (Singh and Alistarh, WoodFisher, 2020).
- "activation": mean |activation| behind the layer's normalisation and activation function (Molchanov et al., Pruning
  Convolutional Neural Networks for Resource Efficient Inference, 2017).
- "random": uniform, from a seed.
- A function(weight, dimension) -> scores of shape (weight.shape[dimension],), at least 0 each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import fx

from fxcompress.analysis.channels import ChannelAnalysis, Floats, ParameterAxis
from fxcompress.analysis.grouping import Booleans, Integers
from fxcompress.errors import OptionError
from fxcompress.graph import edit, ops

CRITERIA = ("l1", "l2", "lamp", "fpgm", "bn_scale", "taylor", "hessian", "activation", "random")

#: Criteria that need data: batches of (input, target), or of inputs.
GRADIENT_CRITERIA = ("taylor", "hessian")
DATA_CRITERIA = (*GRADIENT_CRITERIA, "activation")

AGGREGATES = ("mean", "sum", "max")

#: A criterion by a user: function(weight, dimension) -> one score for every index of that dimension.
Function = Callable[[torch.Tensor, int], object]

#: Scores every index of a dimension of a weight: shape (size,), or None where it cannot.
_Scorer = Callable[[ParameterAxis, torch.Tensor], "torch.Tensor | None"]

#: Rows of a matrix of distances that are in memory at once.
_ROWS = 1024


def score(
    graph_module: fx.GraphModule,
    analysis: ChannelAnalysis,
    criterion: str | Function,
    *,
    aggregate: str = "mean",
    seed: int = 0,
    measured: Mapping[str, torch.Tensor] | None = None,
) -> Floats:
    """Return the importance of every group, shape (groups,); NaN for groups that the criterion cannot judge.

    Groups whose weights are all zero (masked before) score -1, below every other.

    Args:
        criterion: one of `CRITERIA`, or a function.
        aggregate: over the indices of a group: "mean", "sum" or "max".
        seed: for "random".
        measured: for criteria that need data: what `analysis.gradients` measured, by path of the weight.

    Raises:
        OptionError: a function returned scores of another shape, negative ones, NaN or infinity.
    """
    free = analysis.free()
    producers = [one for one in _producers(analysis) if free[analysis.groups(one.axis)].any()]
    magnitude = _over_indices(graph_module, analysis, producers, _magnitude("l2"), "mean")
    if criterion == "random":
        found = np.random.default_rng(seed).random(analysis.group_count)
        found[np.isnan(magnitude)] = np.nan
    elif criterion == "bn_scale":
        scales = _batch_norm_scales(graph_module, analysis)
        found = _over_indices(graph_module, analysis, scales, lambda _, weight: weight.abs(), aggregate)
    else:
        found = _over_indices(graph_module, analysis, producers, _scorer(criterion, measured or {}), aggregate)
    if criterion == "lamp":
        found = _adapted_to_layers(analysis, found)
    return np.where(magnitude == 0, -1.0, found)


def compares_across_layers(criterion: str | Function) -> bool:
    """Whether scores of different layers can be ranked together as they are."""
    return criterion == "lamp"


def _producers(analysis: ChannelAnalysis) -> list[ParameterAxis]:
    return [parameter for parameter in analysis.parameters if parameter.producer]


def _batch_norm_scales(graph_module: fx.GraphModule, analysis: ChannelAnalysis) -> list[ParameterAxis]:
    paths = {f"{node.target}.weight" for node in graph_module.graph.nodes if ops.kind(node) == "batch_norm"}
    return [parameter for parameter in analysis.parameters if paths.intersection(parameter.paths)]


# Criteria


def _scorer(criterion: str | Function, measured: Mapping[str, torch.Tensor]) -> _Scorer:
    if not isinstance(criterion, str):
        return _by_function(criterion)
    if criterion in GRADIENT_CRITERIA:
        return _by_gradient(measured, 0.5 if criterion == "hessian" else 1.0)
    if criterion == "activation":
        return lambda parameter, _: measured.get(parameter.paths[0])
    if criterion == "fpgm":
        return lambda _, weight: _distances(weight.flatten(1))
    return _magnitude(criterion)


def _magnitude(criterion: str) -> _Scorer:
    if criterion == "l1":
        return lambda _, weight: weight.flatten(1).abs().mean(1)
    if criterion == "lamp":
        return lambda _, weight: weight.flatten(1).square().mean(1)
    return lambda _, weight: weight.flatten(1).square().mean(1).sqrt()


def _distances(rows: torch.Tensor) -> torch.Tensor:
    """The sum of the distances of every row to all others."""
    return torch.cat([torch.cdist(some, rows).sum(1) for some in rows.split(_ROWS)])


def _by_gradient(squares: Mapping[str, torch.Tensor], factor: float) -> _Scorer:
    def found(parameter: ParameterAxis, weight: torch.Tensor) -> torch.Tensor | None:
        square = squares.get(parameter.paths[0])
        if square is None:
            return None
        return factor * (square.movedim(parameter.dimension, 0) * weight.double().square()).flatten(1).sum(1)

    return found


def _by_function(function: Function) -> _Scorer:
    def found(parameter: ParameterAxis, weight: torch.Tensor) -> torch.Tensor:
        given = function(weight.movedim(0, parameter.dimension).clone(), parameter.dimension)
        where = f"the importance function, on {parameter.paths[0]!r}, dimension {parameter.dimension}"
        try:
            scores = torch.as_tensor(given).detach().double()
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(f"{where}, returned {type(given).__name__}, not a tensor of scores: {error}") from error
        if scores.shape != weight.shape[:1]:
            raise OptionError(
                f"{where}, returned scores of shape {tuple(scores.shape)}; it must return one for every index: "
                f"shape ({weight.shape[0]},)"
            )
        if not torch.isfinite(scores).all() or (scores < 0).any():
            raise OptionError(f"{where}, returned NaN, infinite or negative scores; they must be finite and at least 0")
        return scores

    return found


def _adapted_to_layers(analysis: ChannelAnalysis, squares: Floats) -> Floats:
    """LAMP: divide every square by the sum of those that are not smaller in the same family."""
    found = np.full(len(squares), np.nan)
    family = families(analysis)
    usable = analysis.free() & (family >= 0) & ~np.isnan(squares)
    for members in _split(family, usable):
        ranked = members[np.argsort(squares[members], kind="stable")]
        tail = np.cumsum(squares[ranked][::-1])[::-1]
        found[ranked] = squares[ranked] / np.where(tail > 0, tail, 1.0)
    return found


def _over_indices(
    graph_module: fx.GraphModule,
    analysis: ChannelAnalysis,
    parameters: list[ParameterAxis],
    scorer: _Scorer,
    aggregate: str,
) -> Floats:
    """Score every index, and bring the scores of each group's indices together; NaN where there are none."""
    total, count = np.zeros(analysis.group_count), np.zeros(analysis.group_count)
    for parameter in parameters:
        tensor = edit.attribute(graph_module, parameter.paths[0]).detach().movedim(parameter.dimension, 0)
        if len(tensor) != len(parameter.axis):  # positions shared by all groups of a transposed convolution
            continue
        values = scorer(parameter, tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor)
        if values is None:
            continue
        per_index = values.double().cpu().numpy()
        for row in analysis.groups(parameter.axis):
            (np.maximum if aggregate == "max" else np.add).at(total, row, per_index)
            np.add.at(count, row, 1)
    found = np.where(count == 0, np.nan, total)
    return np.asarray(found / np.maximum(count, 1)) if aggregate == "mean" else found


# Families


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


def members(analysis: ChannelAnalysis, wanted: Booleans) -> list[Integers]:
    """Return the groups of every family, of those marked in `wanted` (shape (groups,)); families without any are left
    out."""
    family = families(analysis)
    return _split(family, wanted & (family >= 0))


def _split(family: Integers, wanted: Booleans) -> list[Integers]:
    order = np.argsort(family, kind="stable")
    order = order[wanted[order]]
    cuts = np.flatnonzero(np.diff(family[order])) + 1
    return [found for found in np.split(order, cuts) if len(found)]


def widths(analysis: ChannelAnalysis) -> Integers:
    """Return how many channels of its widest layer a group covers, shape (groups,)."""
    found = np.zeros(analysis.group_count, dtype=np.int64)
    for parameter in _producers(analysis):
        for row in analysis.groups(parameter.axis):
            groups, counts = np.unique(row, return_counts=True)
            found[groups] = np.maximum(found[groups], counts)
    return found
