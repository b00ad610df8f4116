"""Numerical comparison of outputs and graphs, with tolerances by dtype and size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fxcompress.errors import VerificationError
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.shapes import evaluation
from fxcompress.graph.snapshot import Snapshot


def tolerance(dtype: torch.dtype, operations: int) -> float:
    """Return the largest difference, relative to the largest output, that rounding alone explains.

    Rounding errors of independent operations add up like a random walk, with the square root of their number. The
    factor before it leaves room for the length of the sums inside them and, in float64, where there is room to spare,
    for normalisations that divide by a small deviation.
    """
    room = 2.0**16 if dtype == torch.float64 else 64.0
    return room * torch.finfo(dtype).eps * math.sqrt(max(operations, 16))


@dataclass(frozen=True)
class Difference:
    """How far two results are apart.

    relative: largest absolute difference divided by the largest absolute value of the reference; inf where the
        structure, a shape or a dtype differs, or only one of the two is NaN or infinite.
    where: what differs, in words.
    """

    relative: float
    where: str = ""


def difference(reference: Any, result: Any) -> Difference:
    """Compare two results: tensors, or nests of tensors and plain values."""
    expected, found = tree_leaves(reference), tree_leaves(result)
    if len(expected) != len(found):
        return Difference(math.inf, f"{len(expected)} values became {len(found)}")
    worst = Difference(0.0)
    for index, (left, right) in enumerate(zip(expected, found, strict=True)):
        one = _leaf_difference(left, right, f"output {index}")
        if one.relative > worst.relative:
            worst = one
    return worst


def _leaf_difference(left: Any, right: Any, where: str) -> Difference:
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        same = type(left) is type(right) and bool(left == right)
        return Difference(0.0 if same else math.inf, f"{where}: {left!r} became {right!r}")
    if left.shape != right.shape or left.dtype != right.dtype:
        described = f"{tuple(left.shape)} {left.dtype} became {tuple(right.shape)} {right.dtype}"
        return Difference(math.inf, f"{where}: {described}")
    if left.numel() == 0:
        return Difference(0.0)
    if not left.dtype.is_floating_point:
        return Difference(0.0 if torch.equal(left, right) else math.inf, f"{where}: {left.dtype} values differ")
    finite = left.isfinite()
    if not torch.equal(finite, right.isfinite()):
        return Difference(math.inf, f"{where}: NaN or infinity in one of the two")
    if not finite.any():
        return Difference(0.0)
    reference, result = left[finite].double(), right[finite].double()
    scale = reference.abs().max().item()
    gap = (reference - result).abs().max().item()
    return Difference(
        gap / scale if scale else gap, f"{where}: largest difference {gap:.3g}, largest value {scale:.3g}"
    )


def run(module: torch.nn.Module, inputs: ExampleInputs) -> Any:
    """Run a module in evaluation mode without gradients, on copies of the inputs and with a fixed random state."""
    with evaluation(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return inputs.map(lambda tensor: tensor.detach().clone()).call(module)


def require_equal(before: Snapshot, after: fx.GraphModule, inputs: ExampleInputs, expected: Any, title: str) -> Any:
    """Compare `after` with the outputs expected of `before` and return its outputs.

    Raises:
        VerificationError: they differ by more than rounding; names the first node whose value differs.
    """
    found = run(after, inputs)
    gap = difference(expected, found)
    limit = tolerance(coarsest_dtype(expected), len(before.nodes))
    if gap.relative <= limit:
        return found
    raise VerificationError(
        f"{title} changed the outputs: {gap.where} (relative {gap.relative:.2g}, allowed {limit:.2g}). "
        f"{first_difference(before.restore(), after, inputs, limit)}"
    )


@contextmanager
def buffers_kept(module: torch.nn.Module) -> Iterator[None]:
    """Give every buffer its value back: a forward may update them."""
    kept = [(m._buffers, name, tensor, tensor.detach().clone()) for m in module.modules()
            for name, tensor in m._buffers.items() if tensor is not None]  # fmt: skip
    try:
        yield
    finally:
        with torch.no_grad():
            for table, name, tensor, value in kept:
                table[name] = tensor
                if not torch.is_inference(tensor):
                    tensor.copy_(value)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Let transformer layers compute as in training: their fast path writes zeros where the input is padded."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def require_same_outputs(model: torch.nn.Module, captured: fx.GraphModule, inputs: ExampleInputs) -> None:
    """Compare a captured graph with the model it was captured from.

    Raises:
        VerificationError: they differ by more than rounding.
    """
    with without_fast_path(), buffers_kept(model), buffers_kept(captured):
        gap = difference(run(model, inputs), run(captured, inputs))
    if gap.relative > tolerance(torch.float32, len(captured.graph.nodes)):
        raise VerificationError(
            f"the captured graph of {type(model).__name__} does not compute what the model does: {gap.where}. "
            f"A hook that changes values, or state that the forward updates, is the usual cause"
        )


def coarsest_dtype(outputs: Any) -> torch.dtype:
    """The coarsest floating dtype among the outputs; float32 if there is none."""
    dtypes = [leaf.dtype for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def first_difference(before: fx.GraphModule, after: fx.GraphModule, inputs: ExampleInputs, limit: float) -> str:
    """Name the first node, present in both graphs with one shape, whose value differs by more than `limit`."""
    left, right = _values(before, inputs), _values(after, inputs)
    for node in after.graph.nodes:
        if node.name in left and node.name in right and node.op != "output":
            reference, value = left[node.name], right[node.name]
            if isinstance(reference, torch.Tensor) and isinstance(value, torch.Tensor):
                gap = difference(reference, value)
                if reference.shape == value.shape and gap.relative > limit:
                    return f"The first node that differs is {node.name!r}: {gap.where}."
    return "No single node could be compared: the nodes before the output have other shapes or names."


def _values(graph_module: fx.GraphModule, inputs: ExampleInputs) -> dict[str, Any]:
    recorder = _Recorder(graph_module)
    with evaluation(graph_module), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        copies = inputs.map(lambda tensor: tensor.detach().clone())
        recorder.run(*copies.args, *copies.kwargs.values())
    return recorder.recorded


class _Recorder(fx.Interpreter):
    """Keeps the value of every node by name."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.recorded: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.recorded[n.name] = value.clone() if isinstance(value, torch.Tensor) else value
        return value
