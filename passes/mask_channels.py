"""MaskChannels: choose groups of channels and zero them everywhere they reach."""

from __future__ import annotations

import dataclasses
import fnmatch
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxcompress.analysis.budget import Budget
from fxcompress.analysis.channels import analyse
from fxcompress.analysis.importance import CRITERIA, score
from fxcompress.analysis.plans import HEADS, ChannelPlan, choose
from fxcompress.errors import OptionError, did_you_mean
from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import graph_info
from fxcompress.pipeline.base import Contract, Pass, PassContext, PassResult, check_choice, check_fraction

SCOPES = ("global", "layer")


@dataclass(frozen=True)
class MaskChannels(Pass):
    """Choose groups of channels by importance and zero every weight that belongs to them.

    1. Channels that belong together (through residual adds, depthwise convolutions, concatenation, ...) are one group.
    2. The least important groups are masked: their slices of every weight, bias and normalisation become zero, both
       where the channels are made and where they are read, so that removing them afterwards changes nothing.
    3. Outputs of the model, and channels that an operator fixes, stay; the ledger says why.

    Args:
        ratio: share of the channels to mask, 0 <= ratio < 1; of every layer, or of all layers together.
        budget: instead of a ratio, `fxc.Parameters(0.5)`, `fxc.MACs(0.5)` or text such as "macs:0.5"; met within 3 %.
        importance: "l1", "l2", "bn_scale" or "random".
        scope: "global" (all layers ranked together) or "layer" (the same share of every layer).
        round_to: every layer keeps a multiple of this many channels.
        heads: what goes from attention heads: "positions" (every head becomes narrower), "whole" (fewer heads) or
            "both" (a little of each).
        ignore: layers whose channels stay, as dotted paths or patterns ("features.0", "head.*").
        seed: for random importance.
    """

    ratio: float | None = None
    budget: Budget | str | None = None
    importance: str = "l2"
    scope: str = "global"
    round_to: int = 1
    heads: str = "positions"
    ignore: str | tuple[str, ...] = ()
    seed: int = 0

    name: ClassVar[str] = "mask-channels"
    contract: ClassVar[Contract] = Contract.APPROXIMATE

    def __post_init__(self) -> None:
        check_channel_options(self)

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Plan, then zero."""
        analysis = analyse(graph_module, ignore=matching_layers(graph_module, self.ignore))
        scores = score(graph_module, analysis, self.importance, self.seed)
        budget = None if self.budget is None else Budget.of(self.budget)
        plan = choose(
            graph_module, analysis, scores,
            ratio=self.ratio, budget=budget, scope=self.scope, round_to=self.round_to, heads=self.heads,
        )  # fmt: skip
        edits = mask(graph_module, plan)
        return PassResult(graph_module, edits > 0, edits, tuple(plan.notes("masked")))


def check_channel_options(item: object) -> None:
    """Check the options that `MaskChannels` and `PruneChannels` share."""
    options = {field.name: getattr(item, field.name) for field in dataclasses.fields(MaskChannels)}
    name = type(item).__name__
    if (options["ratio"] is None) == (options["budget"] is None):
        raise OptionError(f"{name} takes either a ratio or a budget: {name}(ratio=0.5) or {name}(budget='macs:0.5')")
    if options["ratio"] is not None:
        check_fraction(name, "ratio", options["ratio"])
    if options["budget"] is not None:
        object.__setattr__(item, "budget", Budget.of(options["budget"]))
    check_choice(name, "importance", options["importance"], CRITERIA)
    check_choice(name, "scope", options["scope"], SCOPES)
    check_choice(name, "heads", options["heads"], HEADS)
    if not isinstance(options["round_to"], int) or options["round_to"] < 1:
        raise OptionError(f"{name}: round_to must be a positive whole number, not {options['round_to']!r}")
    given = options["ignore"]
    object.__setattr__(item, "ignore", (given,) if isinstance(given, str) else tuple(given))


def matching_layers(graph_module: fx.GraphModule, patterns: str | tuple[str, ...]) -> set[str]:
    """Return the layers whose paths in the caller's model match one of the patterns.

    Raises:
        OptionError: a pattern matches no layer of a model without regions; the nearest one is suggested.
    """
    known = graph_info(graph_module)
    prefix = f"{known.layer}." if known.layer else ""
    in_pieces = bool(known.layer or known.regions)  # the pattern may be meant for another piece of the model
    layers = {
        str(node.target) for node in graph_module.graph.nodes if ops.kind(node) in (*ops.ANCHOR_KINDS, "embedding")
    }
    found: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        hits = {
            path for path in layers
            if fnmatch.fnmatchcase(f"{prefix}{path}", pattern) or f"{prefix}{path}".startswith(f"{pattern}.")
        }  # fmt: skip
        if not hits and not in_pieces:
            raise OptionError(f"ignore={pattern!r} matches no layer{did_you_mean(pattern, layers)}")
        found |= hits
    return found


def mask(graph_module: fx.GraphModule, plan: ChannelPlan) -> int:
    """Zero the planned channels and remember the masks. Returns the number of groups whose weights changed."""
    changed = False
    masks = graph_info(graph_module).masks
    for parameter in plan.analysis.parameters:
        alive = plan.alive(parameter.axis)
        path = parameter.paths[0]
        if alive.all() or path.endswith(("running_mean", "running_var")):
            continue
        tensor = edit.attribute(graph_module, path)
        indices = torch.from_numpy((~alive).nonzero()[0]).to(tensor.device)
        if not torch.count_nonzero(tensor.detach().index_select(parameter.dimension, indices)):
            _remember(masks, parameter.paths, tensor, parameter.dimension, indices)
            continue
        edit.set_tied(graph_module, list(parameter.paths), tensor.detach().index_fill(parameter.dimension, indices, 0))
        _remember(masks, parameter.paths, tensor, parameter.dimension, indices)
        changed = True
    return int(plan.dead.sum()) if changed else 0


def _remember(
    masks: dict[str, torch.Tensor], paths: tuple[str, ...], tensor: torch.Tensor, dimension: int, indices: torch.Tensor
) -> None:
    for path in paths:
        known = masks.get(path)
        full = torch.ones_like(tensor, dtype=torch.bool) if known is None else known
        masks[path] = full.index_fill(dimension, indices, False)
