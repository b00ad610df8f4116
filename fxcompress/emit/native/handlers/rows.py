"""Linear layers over rows: inputs rounded with scales of their own ("dynamic"), or not at all ("weight-only")."""

from __future__ import annotations

import torch

from fxcompress.emit.cpu_dynamic import MOST_FEATURES
from fxcompress.emit.cpu_int8 import Int8DynamicLinear, Int8WeightOnlyLinear, QuantizedLayer, QuantizeRows
from fxcompress.emit.native import packing, steps
from fxcompress.emit.native.draft import Draft
from fxcompress.emit.native.handlers.finish import finish_of, result_of
from fxcompress.emit.native.memory import View
from fxcompress.emit.native.places import place_of_rows
from fxcompress.emit.native.plan import Unplanned


def quantize_rows(draft: Draft, module: QuantizeRows, x: View) -> tuple[View, View, View]:
    """Rows (..., features) as bytes, with a scale and a zero point for each."""
    if x.meta.dtype != torch.float32 or x.meta.numel() == 0:
        raise Unplanned
    q = draft.new(x.meta.shape, torch.uint8)
    scales, zeros = (draft.new((*x.meta.shape[:-1], 1), dtype) for dtype in (torch.float32, torch.int32))
    x, rows = draft.rows(x)
    step = steps.RowEntrance(
        source=place_of_rows(rows), result=steps.Place(q.buffer.index, 0, rows.meta.shape[1], 0),
        scales=steps.Place(scales.buffer.index, 0, 4, 0), zeros=steps.Place(zeros.buffer.index, 0, 4, 0),
        rows=rows.meta.shape[0], channels=rows.meta.shape[1], low=module.quant_min, high=module.quant_max,
    )  # fmt: skip
    draft.emit(step, x, q, scales, zeros)
    return q, scales, zeros


def dynamic_linear(
    draft: Draft, module: Int8DynamicLinear, quantized: tuple[View, View, View], residual: View | None = None
) -> View:
    """A linear layer on such rows."""
    if module.in_features > MOST_FEATURES:
        raise Unplanned
    q, scales, zeros = quantized
    if module not in draft.packed:
        weights = packing.convolution(module.weight[None, :, None, :])
        draft.packed[module] = (weights, *_scaled(module), packing.integer_vectors(module.column_sums()))
    weights, bias, scale, sums = draft.packed[module]
    step = steps.RowLinear(
        run=packing.rounded_up(module.in_features, packing.DEPTH), weights=draft.kept(weights),
        sums=draft.kept(sums),
    )  # fmt: skip
    (scales, scale_rows), (zeros, zero_rows) = draft.rows(scales), draft.rows(zeros)
    step.scales, step.zeros = place_of_rows(scale_rows), place_of_rows(zero_rows)
    return _multiplied_rows(draft, module, step, q, residual, (scale, bias), scales, zeros)


def weight_linear(draft: Draft, module: Int8WeightOnlyLinear, x: View, residual: View | None = None) -> View:
    """A linear layer with 8-bit weights on real numbers."""
    if x.meta.dtype != torch.float32:
        raise Unplanned
    if module not in draft.packed:
        draft.packed[module] = (packing.float_linear(module.weight), *_scaled(module))
    weights, bias, scale = draft.packed[module]
    step = steps.WeightLinear(depth=module.in_features, weights=draft.kept(weights))
    return _multiplied_rows(draft, module, step, x, residual, (scale, bias))


def _multiplied_rows(
    draft: Draft,
    module: QuantizedLayer,
    step: steps.RowLinear | steps.WeightLinear,
    x: View,
    residual: View | None,
    numbers: tuple[torch.Tensor, torch.Tensor],
    *read: View,
) -> View:
    """Emit a step over rows once its places and its finish are filled in; `read` is what else it reads."""
    shape = [*x.meta.shape[:-1], module.weight.shape[0]]
    if x.meta.numel() == 0 or not module.weight.numel():
        raise Unplanned
    if residual is not None:
        if list(residual.meta.shape) != shape:
            raise Unplanned
        residual, added = draft.rows(residual)
    x, rows = draft.rows(x, room=x.meta.dtype == torch.uint8)
    result = result_of(draft, module, shape, residual)
    step.source, step.result = place_of_rows(rows), place_of_rows(result)
    step.rows, step.channels = rows.meta.shape[0], shape[-1]
    step.finish = finish_of(draft, module, *numbers, None if residual is None else added)
    draft.emit(step, x, result, *read, *([residual] if residual else []))
    return result


def _scaled(module: QuantizedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Bias and scale of the output channels of a layer whose input has no scale of its own."""
    bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias
    return packing.vectors(bias), packing.vectors(module.weight_scale)
