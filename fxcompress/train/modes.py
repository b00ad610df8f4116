"""What modules are told while they train: their mode, and how far the training has come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import fx, nn

from fxcompress.graph.metadata import graph_info
from fxcompress.graph.regions import ROOT, regions


@runtime_checkable
class FollowsTraining(Protocol):
    """A module that changes what it does as training goes on, such as a batch norm that is frozen late.

    Whatever it remembers of it must be in its state dict: training that was interrupted goes on from there.
    """

    def follow_training(self, done: float) -> None:
        """Be told, before the first forward of every step of the optimiser, how much of the training is over.

        Args:
            done: steps of the optimiser that are over, as a share of those planned, in [0, 1). Where the data has no
                length and `steps` was not given, it stays 0 in the first epoch.
        """


def followers(module: nn.Module) -> list[FollowsTraining]:
    """Return the submodules, those of regions included, that follow the training."""
    return [child for child in module.modules() if isinstance(child, FollowsTraining)]


def frozen_modules(module: fx.GraphModule, model: nn.Module | None) -> set[nn.Module]:
    """Return the modules that shall stay in evaluation mode while the others train.

    Those are the ones that somebody put there: modules in evaluation mode within a graph, or a caller's model, that is
    itself in training mode. Where the whole is in evaluation mode, it says nothing about its parts.

    Args:
        module: the graph to train. model: the caller's model, where it is known.
    """
    if module.training:
        return {child for child in module.modules() if not child.training}
    if model is None or not model.training:
        return set()
    frozen = {path for path, child in model.named_modules() if not child.training}
    return {child for path, child in _named_as_in_model(module) if path in frozen}


def _named_as_in_model(module: fx.GraphModule) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a graph and its regions, by the path that they have in the caller's model."""
    for path, child in module.named_modules():
        yield path, child
        yield path.removeprefix(f"{ROOT}."), child
        if path == "layer":  # a model that is a single layer
            yield "", child
    for region in regions(module):
        layer = graph_info(region.graph_module).layer
        for path, child in region.graph_module.named_modules():
            yield f"{layer}.{path}".strip("."), child


@contextmanager
def training(module: nn.Module, frozen: frozenset[nn.Module] | set[nn.Module] = frozenset()) -> Iterator[None]:
    """Put a module in training mode but for its frozen parts, and every child back into its own mode afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.train()
    for child in frozen:
        child.training = False
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode
