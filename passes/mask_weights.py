"""MaskWeights: zero single weights, and hold them at zero during training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxcompress.analysis.layers import matching_layers
from fxcompress.analysis.schedule import Way
from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import graph_info
from fxcompress.passes.mask_channels import SCOPES
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult, check_choice, check_fraction

METHODS = ("l1", "random")
PATTERNS = ("unstructured", "2:4")


@dataclass(frozen=True)
class MaskWeights(Pass):
    """Zero the least important single weights of convolutions and linear layers.

    1. "unstructured": the share `amount` of all weights is zero afterwards, weights that `torch.nn.utils.prune` or an
       earlier pass has masked included (so a second run changes nothing).
    2. "2:4": of every four weights in a row along the input channels two stay, the form that sparse tensor cores run
       (Mishra et al., Accelerating Sparse Deep Neural Networks, 2021); `amount` and `scope` are not used. A layer whose
       input channels are no multiple of four is left alone, and the ledger says so.

    Masks are remembered: passes that train hold masked weights at zero.

    Args:
        amount: share of weights that are zero afterwards, 0 <= amount < 1.
        method: "l1" (smallest magnitudes) or "random".
        scope: "global" ranks the weights of all layers together, "layer" masks the same share of every layer.
        pattern: "unstructured" or "2:4".
        ignore: layers left alone, as dotted paths or patterns.
        seed: for the random method.
    """

    amount: float = 0.5
    method: str = "l1"
    scope: str = "global"
    pattern: str = "unstructured"
    ignore: str | tuple[str, ...] = ()
    seed: int = 0

    name: ClassVar[str] = "mask-weights"
    contract: ClassVar[Contract] = Contract.APPROXIMATE

    def __post_init__(self) -> None:
        check_fraction("MaskWeights", "amount", self.amount)
        check_choice("MaskWeights", "method", self.method, METHODS)
        check_choice("MaskWeights", "scope", self.scope, SCOPES)
        check_choice("MaskWeights", "pattern", self.pattern, PATTERNS)
        object.__setattr__(self, "ignore", (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore))

    def on_the_way(self, way: Way) -> MaskWeights | None:
        """Return the pass that masks a smaller amount; None for the pattern "2:4", which has no amounts in between."""
        if self.pattern == "2:4":
            return None
        return dataclasses.replace(self, amount=way.gone(self.amount))

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Decide on the masks of all layers, then apply them."""
        ignored = matching_layers(graph_module, self.ignore)
        paths = _weights(graph_module, ignored)
        masks, notes = self._masks(graph_module, paths)
        notes += [Note(layer, "not masked: ignored on request") for layer in sorted(ignored)]
        edits = sum(_apply(graph_module, tied, masks[tied]) for tied in masks)
        return PassResult(graph_module, edits > 0, edits, tuple(notes))

    def _masks(
        self, graph_module: fx.GraphModule, paths: list[tuple[str, ...]]
    ) -> tuple[dict[tuple[str, ...], torch.Tensor], list[Note]]:
        weights = {tied: edit.attribute(graph_module, tied[0]).detach() for tied in paths}
        notes: list[Note] = []
        if self.pattern == "2:4":
            masks = {}
            for tied, weight in weights.items():
                if weight.shape[1] % 4:
                    notes.append(
                        Note(_layer(tied), f"not masked: {weight.shape[1]} input channels are no multiple of 4")
                    )
                else:
                    masks[tied] = two_of_four(self._scores(weight))
        else:
            masks = self._unstructured(weights)
        for tied, mask in masks.items():
            notes.append(Note(_layer(tied), f"{(~mask).sum().item() / mask.numel():.0%} of the weights masked"))
        return masks, notes

    def _unstructured(self, weights: dict[tuple[str, ...], torch.Tensor]) -> dict[tuple[str, ...], torch.Tensor]:
        scores = {tied: self._scores(weight).flatten() for tied, weight in weights.items()}
        if self.scope == "layer" or not scores:
            return {tied: _keep_largest(s, self.amount).view_as(weights[tied]) for tied, s in scores.items()}
        everything = _keep_largest(torch.cat([s.cpu() for s in scores.values()]), self.amount)
        parts = torch.split(everything, [len(s) for s in scores.values()])
        return {
            tied: part.view_as(weights[tied]).to(weights[tied].device) for tied, part in zip(scores, parts, strict=True)
        }

    def _scores(self, weight: torch.Tensor) -> torch.Tensor:
        """Importance of every weight; zero for those that are zero already."""
        if self.method == "l1":
            return weight.abs().double()
        generator = torch.Generator().manual_seed(self.seed + weight.numel())
        noise = 1.0 - torch.rand(weight.shape, generator=generator, dtype=torch.float64)
        return torch.where(weight == 0, 0.0, noise.to(weight.device))


def _weights(graph_module: fx.GraphModule, ignored: set[str]) -> list[tuple[str, ...]]:
    """Paths of the weights of all convolutions and linear layers; tied ones together."""
    tied = edit.tensor_paths(graph_module)
    found: dict[tuple[str, ...], None] = {}
    for node in graph_module.graph.nodes:
        if ops.kind(node) in ops.ANCHOR_KINDS and str(node.target) not in ignored:
            found[tuple(tied[id(edit.attribute(graph_module, f"{node.target}.weight"))])] = None
    return list(found)


def _layer(tied: tuple[str, ...]) -> str:
    return tied[0].removesuffix(".weight")


def _keep_largest(scores: torch.Tensor, amount: float) -> torch.Tensor:
    """Return a mask that is False for exactly the share `amount` of the entries (rounded), the smallest ones."""
    count = round(amount * len(scores))
    mask = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    mask[torch.argsort(scores, stable=True)[:count]] = False
    return mask


def two_of_four(scores: torch.Tensor) -> torch.Tensor:
    """Return a mask that keeps the two best of every four scores along dimension 1.

    Args:
        scores: shape (out, in, ...) with `in` a multiple of 4.
    """
    rows = scores.movedim(1, -1)
    fours = rows.reshape(-1, 4)
    mask = torch.zeros_like(fours, dtype=torch.bool)
    mask.scatter_(1, torch.argsort(fours, dim=1, descending=True, stable=True)[:, :2], True)
    return mask.reshape(rows.shape).movedim(-1, 1)


def _apply(graph_module: fx.GraphModule, tied: tuple[str, ...], mask: torch.Tensor) -> int:
    """Zero the masked weights and remember the mask. Returns how many weights changed."""
    weight = edit.attribute(graph_module, tied[0]).detach()
    changed = int((weight[~mask] != 0).sum())
    if changed:
        edit.set_tied(graph_module, list(tied), weight * mask)
    masks = graph_info(graph_module).masks
    for path in tied:
        masks[path] = mask & masks.get(path, mask)
    return changed
