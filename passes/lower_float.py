"""LowerFloat: a float graph into the kernels of a GPU, in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcompress.emit.cuda import device
from fxcompress.graph.metadata import Stage
from fxcompress.passes.lower_cuda import lower_cuda
from fxcompress.pipeline.base import Contract, Pass, PassContext, PassResult, check_choice

_DTYPES = ("fp16", "bf16", "fp8")


@dataclass(frozen=True)
class LowerFloat(Pass):
    """Compute a float graph in 16 bits on a GPU, each layer in the way that measures fastest; see `lower_cuda`.

    Args:
        dtype: "fp16" or "bf16"; "fp8" is fp16 with linear layers and 1x1 convolutions in 8-bit floating point where
            that is faster. None takes the dtype of `fxcompress.compile`, or fp16.
    """

    dtype: str | None = None

    name: ClassVar[str] = "lower-float"
    produces: ClassVar[Stage | None] = Stage.LOWERED
    contract: ClassVar[Contract] = Contract.APPROXIMATE

    def __post_init__(self) -> None:
        check_choice(type(self).__name__, "dtype", self.dtype, (None, *_DTYPES))

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Lower the graph for the GPU at hand."""
        device.require()
        dtype = self.dtype or (context.dtype if context.dtype in _DTYPES else None) or "fp16"
        return lower_cuda(graph_module, dtype, context.progress)
