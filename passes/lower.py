"""Lower: quantise-dequantise pairs and their operators into the kernels of a target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from fxcompress.emit.cuda import device
from fxcompress.emit.native.library import unavailable
from fxcompress.graph.metadata import Stage
from fxcompress.passes.lower_cpu_int8 import lower_cpu_int8
from fxcompress.passes.lower_cuda import lower_cuda
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult, check_choice

_TARGETS = ("cpu", "cuda")


@dataclass(frozen=True)
class Lower(Pass):
    """Give quantised layers, and what stands between them, to the kernels of a target.

    For "cpu" see `lower_cpu_int8`; for "cuda" see `lower_cuda`, which computes what is not quantised in 16 bits.
    Parameters of layers that stay float no longer require gradients: a lowered graph is for inference.
    `requires_grad_()` on some of them takes that back, and the graph then runs node by node wherever gradients are
    recorded.

    Args:
        target: "cpu" or "cuda"; None takes the target of `fxcompress.compile`.
    """

    target: str | None = None

    name: ClassVar[str] = "lower"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.QDQ})
    produces: ClassVar[Stage | None] = Stage.LOWERED
    contract: ClassVar[Contract] = Contract.APPROXIMATE

    def __post_init__(self) -> None:
        check_choice(type(self).__name__, "target", self.target, (None, *_TARGETS))

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Lower to the target."""
        target = self.target or context.target
        if target == "cuda":
            device.require()
            return lower_cuda(graph_module, "int8", context.progress)
        result = lower_cpu_int8(graph_module)
        if result.modified:
            result.graph_module.requires_grad_(False)
        context.progress("building the kernels, once on each machine", 0, None)
        reason = unavailable() if result.modified else None
        if reason is None:
            return result
        note = Note("target cpu", f"the graph runs node by node, without kernels of our own: {reason}")
        return replace(result, notes=(*result.notes, note))
