"""Layers that became smaller but slower: each is timed on its own, at its old and its new size, and given back.

Kernels are tuned for some numbers of channels: 61 of them may take longer than 64. A choice of channels that makes a
layer slower than it was is taken back as far as to the nearest size that is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxcompress.analysis.channels import Axis, Floats
from fxcompress.analysis.grouping import Booleans
from fxcompress.analysis.latency import Pair, in_turns
from fxcompress.analysis.plans import ChannelPlan
from fxcompress.graph import ops
from fxcompress.graph.metadata import TensorInfo, info
from fxcompress.pipeline.base import Note

#: A layer counts as slower from this ratio on: below, it is the noise of the clock.
MARGIN = 1.05

#: Sizes that are tried on the way back to the full one are multiples of these.
_STEPS = (4, 8, 16, 32, 64)

#: How often all layers are looked at: what is given back to one makes others larger.
_ROUNDS = 3


@dataclass(frozen=True)
class LayerShape:
    """All that the speed of a layer depends on.

    kind: class of the module. inputs, outputs: channels. groups: of a convolution. options: its other arguments.
    before, behind: sizes of the input's dimensions before and behind the channels.
    """

    kind: type[nn.Module]
    inputs: int
    outputs: int
    groups: int
    options: tuple[tuple[str, Any], ...]
    before: tuple[int, ...]
    behind: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def build(self) -> Callable[[], torch.Tensor]:
        """Return a call of such a layer, with random weights and input."""
        groups = {} if issubclass(self.kind, nn.Linear) else {"groups": self.groups}
        make: Any = self.kind
        layer = make(
            self.inputs, self.outputs, **groups, **dict(self.options), dtype=self.dtype, device=self.device
        ).eval()
        source = torch.randn(*self.before, self.inputs, *self.behind, dtype=self.dtype, device=self.device)
        return lambda: layer(source)


#: Times a layer at its old and at its new size.
Measure = Callable[[LayerShape, LayerShape], Pair]


def time_layers(dense: LayerShape, pruned: LayerShape) -> Pair:
    """Time two layers in turns."""
    with torch.no_grad():
        return in_turns(dense.build(), pruned.build(), rounds=7, seconds=0.03)


def shape_of(node: fx.Node, batch: float = 1.0) -> LayerShape | None:
    """Return the shape of the layer that a node calls; None if it is no convolution or linear layer.

    Args:
        batch: what the batch size of the example is multiplied by.
    """
    module: Any = ops.submodule(node)
    source = next(iter(node.all_input_nodes), None)
    value = info(source).value if source is not None else None
    if ops.kind(node) not in ops.ANCHOR_KINDS or not isinstance(value, TensorInfo):
        return None
    place = _channel(node, value)
    sizes = list(value.shape)
    if place:
        sizes[0] = max(1, round(sizes[0] * batch))
    if isinstance(module, nn.Linear):
        options: dict[str, Any] = {"bias": module.bias is not None}
        widths = (module.in_features, module.out_features, 1)
    else:
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        options = {name: getattr(module, name) for name in names} | {"bias": module.bias is not None}
        if ops.kind(node) == "conv_transpose":
            options["output_padding"] = module.output_padding
        widths = (module.in_channels, module.out_channels, module.groups)
    return LayerShape(
        type(module), *widths, tuple(options.items()), tuple(sizes[:place]), tuple(sizes[place + 1 :]),
        module.weight.dtype, module.weight.device,
    )  # fmt: skip


def _channel(node: fx.Node, value: TensorInfo) -> int:
    module: Any = ops.submodule(node)
    return len(value.shape) - 1 - max(int(module.weight.ndim) - 2, 0)


def give_back(
    graph_module: fx.GraphModule,
    plan: ChannelPlan,
    scores: Floats,
    *,
    batch: float = 1.0,
    round_to: int = 1,
    measure: Measure = time_layers,
) -> tuple[ChannelPlan, tuple[Note, ...]]:
    """Take back what a plan masks where a layer would be slower than it is.

    Args:
        scores: importance of every group: the most important ones come back first.
        batch: what the batch size of the example is multiplied by.
        round_to: layers keep a multiple of this many channels.
        measure: times a layer at two sizes. Every pair of shapes is timed once.

    Returns:
        The plan, and a line of the ledger for every layer that got channels back.
    """
    return _Return(graph_module, plan, scores, batch, round_to, measure).run()


class _Return:
    def __init__(
        self,
        graph_module: fx.GraphModule,
        plan: ChannelPlan,
        scores: Floats,
        batch: float,
        round_to: int,
        measure: Measure,
    ) -> None:
        self.plan, self.scores, self.batch, self.round_to = plan, scores, batch, round_to
        self.nodes = [node for node in graph_module.graph.nodes if shape_of(node) is not None]
        self.known: dict[tuple[LayerShape, LayerShape], Pair] = {}
        self.measure = measure
        self.notes: dict[str, Note] = {}

    def run(self) -> tuple[ChannelPlan, tuple[Note, ...]]:
        for _ in range(_ROUNDS):
            before = self.plan
            for node in self.nodes:
                self._look_at(node)
            if self.plan is before:
                break
        return self.plan, tuple(self.notes.values())

    def _look_at(self, node: fx.Node) -> None:
        """Give back to one layer, if it is slower."""
        old, (into, out) = shape_of(node, self.batch), self._axes(node)
        new = self._pruned(old, into, out) if old is not None else None
        if old is None or new is None or not self._is_slower(old, new):
            return
        produces = out is not None and new.outputs < old.outputs
        axis, kept, full = (out, new.outputs, old.outputs) if produces else (into, new.inputs, old.inputs)
        sizes = self._sizes(kept, full)
        size = next((size for size in sizes if not self._is_slower(old, self._at(new, size, produces))), full)
        if axis is not None and self._grow(axis, size):
            pair = self.known[old, new]
            text = f"{size} of {full} channels kept: with {kept} it takes {pair.second_ms:.3g} ms, before "
            self.notes[str(node.target)] = Note(str(node.target), f"{text}{pair.first_ms:.3g} ms")

    def _is_slower(self, old: LayerShape, new: LayerShape) -> bool:
        if new == old:
            return False
        if (old, new) not in self.known:
            self.known[old, new] = self.measure(old, new)
        return self.known[old, new].ratio > MARGIN

    def _axes(self, node: fx.Node) -> tuple[Axis | None, Axis | None]:
        """The axes of the channels that a layer reads and makes."""
        source = node.all_input_nodes[0]
        place = _channel(node, info(source).value)
        found = [self.plan.analysis.axes.get(one) for one in (source, node)]
        into, out = (axes[place] if isinstance(axes, tuple) and len(axes) > place else None for axes in found)
        return into, out

    def _pruned(self, old: LayerShape, into: Axis | None, out: Axis | None) -> LayerShape:
        inputs = old.inputs if into is None else int(np.count_nonzero(self.plan.alive(into)))
        outputs = old.outputs if out is None else int(np.count_nonzero(self.plan.alive(out)))
        depthwise = old.groups == old.inputs > 1
        return dataclasses.replace(old, inputs=inputs, outputs=outputs, groups=inputs if depthwise else old.groups)

    def _at(self, new: LayerShape, size: int, produces: bool) -> LayerShape:
        """The layer with another number of the channels that it makes, or that it reads."""
        if new.groups == new.inputs > 1:
            times = new.outputs // new.inputs
            inputs = size // times if produces else size
            return dataclasses.replace(new, inputs=inputs, outputs=inputs * times, groups=inputs)
        return dataclasses.replace(new, outputs=size) if produces else dataclasses.replace(new, inputs=size)

    def _sizes(self, kept: int, full: int) -> Iterator[int]:
        """The sizes to try, from the smallest."""
        steps = {math.lcm(step, self.round_to) for step in _STEPS}
        above = {kept // step * step + step for step in steps}
        yield from sorted(size for size in above if size < full)
        yield full

    def _grow(self, axis: Axis, size: int) -> bool:
        """Bring back the most important channels of an axis until it has the size."""
        dead: Booleans = self.plan.dead.copy()
        groups = self.plan.analysis.groups(axis)
        importance = np.nan_to_num(np.where(dead[groups], self.scores[groups], np.inf), nan=0.0).min(axis=0)
        for index in np.argsort(-importance, kind="stable").tolist():
            if np.count_nonzero(self.plan.analysis.alive(axis, dead)) >= size:
                break
            dead[groups[:, index]] = False
        changed = bool((dead != self.plan.dead).any())
        self.plan = dataclasses.replace(self.plan, dead=dead)
        return changed
