"""Export to ONNX, for float graphs and for graphs of quantise-dequantise pairs."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from fxcompress.errors import InputError, MissingExtraError, UnsupportedError
from fxcompress.graph import ops
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import Stage, TensorInfo, graph_info, info

_STAGES = (Stage.FLOAT, Stage.QDQ)


def export_onnx(module: fx.GraphModule, path: str | Path, example_inputs: object = None) -> None:
    """Write a graph as an ONNX file with torch's exporter. The batch size stays free where the graph allows it.

    Quantise-dequantise pairs become QuantizeLinear and DequantizeLinear, which ONNX runtimes fuse into int8 kernels.

    Args:
        module: a graph in evaluation mode.
        path: the file.
        example_inputs: inputs to export with; None: zeros of the shapes that the module was compiled for.

    Raises:
        MissingExtraError: the packages of the extra `onnx` are not installed.
        UnsupportedError: the graph holds observers or kernels of this machine, or torch cannot export it.
        InputError: there are no example inputs and none can be made.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "onnx", "export_onnx")
    stage = graph_info(module).stage
    if stage not in _STAGES:
        raise UnsupportedError(
            f"a graph of stage {stage} cannot become ONNX: it calls kernels or observers of its own. Export the graph "
            f"before lowering: end the passes with 'insert-observers, calibrate, convert-observed'"
        )
    inputs = _default_inputs(module) if example_inputs is None else ExampleInputs.of(example_inputs)
    exportable = _with_onnx_pairs(module).eval()
    try:
        program = _export(exportable, inputs, free_batch=True) or _export(exportable, inputs, free_batch=False)
    except Exception as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise UnsupportedError(f"torch.onnx cannot export this graph: {reason}") from error
    program.save(str(path))


def _export(module: fx.GraphModule, inputs: ExampleInputs, free_batch: bool) -> Any:
    """Return torch's ONNX program; None if the graph does not allow other batch sizes."""
    shapes = tree_map(lambda leaf: {0: torch.export.Dim.DYNAMIC} if _has_batch(leaf) else None, inputs.args)
    keyword_shapes = tree_map(lambda leaf: {0: torch.export.Dim.DYNAMIC} if _has_batch(leaf) else None, inputs.kwargs)
    names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
    dynamic = {**dict(zip(names, shapes, strict=False)), **keyword_shapes}
    try:
        with _quiet(), torch.no_grad():
            return torch.onnx.export(
                module, inputs.args, kwargs=inputs.kwargs, dynamo=True, verbose=False,
                dynamic_shapes=dynamic if free_batch else None,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError:
        if free_batch:
            return None
        raise


def _has_batch(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the remarks that torch's exporter makes about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _default_inputs(module: fx.GraphModule) -> ExampleInputs:
    values = [info(node).value for node in module.graph.nodes if node.op == "placeholder"]
    if not values or not all(isinstance(value, TensorInfo) for value in values):
        raise InputError("export_onnx needs example_inputs for this module: its inputs are not all plain tensors")
    return ExampleInputs(tuple(_zeros(value) for value in values))


def _zeros(value: TensorInfo) -> torch.Tensor:
    shape = (max(value.shape[0], 2), *value.shape[1:]) if value.shape else ()  # torch.export fixes a size of 1
    return torch.zeros(shape, dtype=value.dtype, device=value.device)


def _with_onnx_pairs(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy whose quantise-dequantise pairs are written as ONNX operators."""
    duplicate = copy.deepcopy(module)
    for node in duplicate.graph.nodes:
        if ops.kind(node) in ("fake_quantize", "fake_quantize_channel"):
            bound = ops.arguments(node)
            node.target = quantize_dequantize
            node.args = (bound["input"], bound["scale"], bound["zero_point"], bound.get("axis"),
                         bound["quant_min"], bound["quant_max"])  # fmt: skip
            node.kwargs = {}
    duplicate.recompile()
    return duplicate


def quantize_dequantize(
    input: torch.Tensor,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | int,
    axis: int | None,
    quant_min: int,
    quant_max: int,
) -> torch.Tensor:
    """A pair of QuantizeLinear and DequantizeLinear for `torch.onnx.export`; it computes nothing by itself.

    A range narrower than 8 bits is kept by clipping the input, since QuantizeLinear knows whole types only.
    """
    dtype = torch.int8 if quant_min < 0 else torch.uint8
    scales = torch.as_tensor(scale, dtype=torch.float32)
    zeros = torch.as_tensor(zero_point).to(dtype)
    if (quant_min, quant_max) != (torch.iinfo(dtype).min, torch.iinfo(dtype).max):
        shape = [-1 if dim == axis else 1 for dim in range(input.ndim)] if axis is not None else []
        offset = zeros.to(torch.float32)
        low, high = ((bound - offset) * scales for bound in (quant_min, quant_max))
        input = torch.minimum(torch.maximum(input, low.reshape(shape)), high.reshape(shape))
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    quantized = torch.onnx.ops.symbolic(
        "QuantizeLinear", (input, scales, zeros), attributes, dtype=dtype, shape=input.shape, version=20
    )
    restored: torch.Tensor = torch.onnx.ops.symbolic(
        "DequantizeLinear", (quantized, scales, zeros), attributes, dtype=torch.float32, shape=input.shape, version=20
    )
    return restored
