"""The rules that a graph keeps between passes: fx's own, and those of its stage."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from fxcompress.errors import VerificationError
from fxcompress.graph import ops
from fxcompress.graph.edit import attribute
from fxcompress.graph.metadata import Stage, graph_info

#: What a module may be at a stage, told by where its class is defined. One row a stage.
_OBSERVERS = ("fxcompress.quant", "torch.ao.quantization", "torchao")
_KERNELS = ("fxcompress.emit",)


def _is_from(*prefixes: str) -> Callable[[nn.Module], bool]:
    return lambda module: type(module).__module__.startswith(prefixes)


FORBIDDEN_MODULES: dict[Stage, tuple[Callable[[nn.Module], bool], str]] = {
    Stage.FLOAT: (_is_from(*_OBSERVERS, *_KERNELS), "an observer or a kernel"),
    Stage.OBSERVED: (_is_from(*_KERNELS), "a kernel"),
    Stage.QDQ: (_is_from(*_OBSERVERS, *_KERNELS), "an observer or a kernel"),
    Stage.LOWERED: (_is_from(*_OBSERVERS), "an observer"),
}

FORBIDDEN_KINDS: dict[Stage, frozenset[str]] = {
    Stage.FLOAT: frozenset({"fake_quantize", "fake_quantize_channel", "fake_quantize_rows", "fake_quantize_attention"}),
    Stage.OBSERVED: frozenset(),
    Stage.QDQ: frozenset(),
    Stage.LOWERED: frozenset(),
}


def verify(graph_module: fx.GraphModule, title: str) -> None:
    """Check a graph after the pass called `title`.

    Raises:
        VerificationError: the graph is malformed, names something that is not there, or breaks the rules of its stage.
    """
    try:
        graph_module.graph.lint()
    except Exception as error:
        raise VerificationError(f"{title} left a malformed graph: {error}") from error
    stage = graph_info(graph_module).stage
    forbidden, what = FORBIDDEN_MODULES[stage]
    for node in graph_module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            try:
                found = attribute(graph_module, str(node.target))
            except Exception as error:
                raise VerificationError(f"{title}: node {node.name!r} names {node.target!r}, which is gone") from error
            if node.op == "call_module" and forbidden(found):
                raise VerificationError(
                    f"{title} left {what} ({type(found).__name__} at {node.target!r}) in a graph of stage {stage}"
                )
        elif ops.kind(node) in FORBIDDEN_KINDS[stage]:
            raise VerificationError(f"{title} left {node.name!r} ({ops.kind(node)}) in a graph of stage {stage}")
