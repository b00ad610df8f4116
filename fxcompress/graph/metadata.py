"""The metadata that fxcompress keeps on a graph and on its nodes, with this file as its only owner.

`info(node)` and `graph_info(graph_module)` are the ways in; no other file knows the string key.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fxcompress.errors import PassError
from fxcompress.graph.inputs import ExampleInputs

_KEY = "fxcompress"


class Stage(enum.Enum):
    """What a graph is made of. A pass says which stages it takes and which one it leaves."""

    FLOAT = "float"  #: plain float layers and functions
    OBSERVED = "observed"  #: observers or trainable fake-quantisers in place
    QDQ = "qdq"  #: quantise-dequantise pairs with fixed numbers; still plain torch operators
    LOWERED = "lowered"  #: calls of a target's kernels

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class TensorInfo:
    """Shape, dtype and device of a tensor that a node produces; no data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return (
            f"{_SHORT_DTYPES.get(self.dtype, str(self.dtype).removeprefix('torch.'))}[{','.join(map(str, self.shape))}]"
        )


_SHORT_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}

#: What a node produces: a `TensorInfo`, a plain Python value, or tuples, lists and dicts of these.
Value = Any


@dataclass(frozen=True)
class Opaque:
    """Why a node is code that could not be traced, and what it did on the example inputs.

    reason: for example "control flow at model.py:12 (`if x.sum() > 0:`)". inputs, value: its arguments (args, kwargs)
    and its result on the example inputs, with shapes for tensors; None before they were recorded.
    """

    reason: str
    inputs: Value = None
    value: Value = None


@dataclass(frozen=True)
class NodeInfo:
    """What fxcompress knows about a node.

    value: what the node produces (see `Value`); None before shapes have been propagated.
    layer: the layer of the caller's model that the node came from, as a dotted path ("" where unknown).
    epilogue_of: name of the node whose kernel can compute this one as well (an activation or a residual add behind
        a convolution or linear), set by `FuseActivation`.
    opaque: why the node is code that could not be traced; None for every other node.
    """

    value: Value = None
    layer: str = ""
    epilogue_of: str | None = None
    opaque: Opaque | None = None


@dataclass(frozen=True)
class KernelChoices:
    """How a lowered graph runs fastest on one machine, as `Tune` measured it. Results do not depend on it.

    machine: the processor and the number of threads; anywhere else, the choices are not used.
    calls: names of nodes that PyTorch's kernels compute, and not those of fxcompress.
    cuts: shapes of the inputs -> how many of the steps are taken for each image of a batch by itself, before all images
        take the rest together.
    """

    machine: str
    calls: frozenset[str] = frozenset()
    cuts: Mapping[str, int] = field(default_factory=dict)


@dataclass
class GraphInfo:
    """What fxcompress knows about a graph as a whole.

    masks: parameter path -> boolean tensor of the parameter's shape; False entries are held at zero.
    notes: remarks of the capture, shown in the report.
    canonical: whether `Canonicalize` has run.
    regions: example inputs of the graph modules inside opaque modules of this graph, by path, see `graph.regions`.
    choice: the pass that chose channels last, and the shapes of the parameters then: asked again, it has no more to do.
    layer: for such a graph module, its path in the caller's model. batch: the batch size of the whole model's example.
    kernels: how a lowered graph runs fastest, where that was measured.
    """

    stage: Stage = Stage.FLOAT
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    canonical: bool = False
    regions: dict[str, ExampleInputs] = field(default_factory=dict)
    layer: str = ""
    batch: int | None = None
    choice: tuple[str, tuple[tuple[str, tuple[int, ...]], ...]] | None = None
    kernels: KernelChoices | None = None


def info(node: fx.Node) -> NodeInfo:
    """Return the metadata of `node`; an empty one where nothing has been recorded."""
    found = node.meta.get(_KEY)
    return found if isinstance(found, NodeInfo) else NodeInfo()


def set_info(node: fx.Node, **changes: Any) -> None:
    """Change fields of the metadata of `node`."""
    node.meta[_KEY] = replace(info(node), **changes)


def graph_info(graph_module: fx.GraphModule) -> GraphInfo:
    """Return the metadata of the graph, creating it on first use."""
    found = graph_module.meta.get(_KEY)
    if not isinstance(found, GraphInfo):
        found = graph_module.meta[_KEY] = GraphInfo()
    return found


def tensor_info(node: fx.Node) -> TensorInfo:
    """Return shape, dtype and device of the single tensor that `node` produces.

    Raises:
        PassError: the node produces no tensor, or shapes have not been propagated.
    """
    value = info(node).value
    if not isinstance(value, TensorInfo):
        raise PassError(f"node {node.name!r} has no tensor value recorded; run shapes.propagate on the graph first")
    return value


def is_tensor(node: object) -> bool:
    """Whether `node` is a node that is known to produce one tensor."""
    return isinstance(node, fx.Node) and isinstance(info(node).value, TensorInfo)


def tensors(value: Value) -> Iterator[TensorInfo]:
    """Yield every `TensorInfo` inside a nested value."""
    if isinstance(value, TensorInfo):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
