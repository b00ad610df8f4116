"""Pooling: the largest number or the mean of each window of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxcompress.emit.cpu_int8 import Int8AvgPool, Int8MaxPool
from fxcompress.emit.cpu_numbers import inverse
from fxcompress.emit.native import packing, steps
from fxcompress.emit.native.draft import Draft
from fxcompress.emit.native.memory import View
from fxcompress.emit.native.places import place_of, side_by_side
from fxcompress.emit.native.plan import Unplanned
from fxcompress.graph import ops


def max_pool(draft: Draft, module: Int8MaxPool, x: View) -> View:
    """Max pooling of 8-bit images."""
    if len(module.kernel_size) != 2 or x.meta.ndim != 4:
        raise Unplanned
    x = draft.image(x)
    sizes, pads = module._geometry(x.meta)
    result = draft.made((*x.meta.shape[:2], *sizes), torch.uint8, images=True)
    tables = [
        packing.windows(x.meta.shape[2 + i], module.kernel_size[i], module.stride[i], pads[i][0],
                        module.dilation[i], sizes[i], x.strides()[2 + i])
        for i in range(2)
    ]  # fmt: skip
    _pool(draft, x, result, tables, steps.Pooling(kind=steps.BYTES, high=255))
    return result


def avg_pool(draft: Draft, module: Int8AvgPool, x: View) -> View:
    """Average pooling of 8-bit images, with windows, to a given size, or to one number."""
    if x.meta.ndim != 4:
        raise Unplanned
    x = draft.image(x)
    tables, sizes, count_padding = _average_windows(module.operation, module.dimensions, module.arguments, x)
    result = draft.made((*x.meta.shape[:2], *sizes), torch.uint8, images=True)
    step = steps.Pooling(
        average=1, kind=steps.BYTES, count_padding=count_padding, source_zero=module.input.zero_point,
        factor=module.input.scale * inverse(module.output.scale), zero=module.output.zero_point,
        low=module.output.quant_min, high=module.output.quant_max,
    )  # fmt: skip
    _pool(draft, x, result, tables, step)
    if module.operation == "mean" and not module.arguments.get("keepdim"):
        return result.other(result.meta.flatten(1))
    return result


def real_average(draft: Draft, given: dict[str, Any]) -> View:
    """Average pooling of real images whose channels lie side by side; means of all pixels, or of all tokens."""
    x, kind = given["input"], ops.kind(draft.node)
    if x.meta.dtype != torch.float32 or x.meta.numel() == 0 or given.get("dtype") is not None:
        raise Unplanned
    if kind != "mean":
        image, dimensions = x, 2 if draft.node.target in (F.avg_pool2d, F.adaptive_avg_pool2d) else 0
    else:
        image, dimensions = _pixels_of_mean(x, given["dim"]), 2
        given = {**given, "dim": (2, 3)}
    if image.meta.ndim != 4 or not side_by_side(image.meta):
        raise Unplanned
    tables, _, count_padding = _average_windows(kind, dimensions, given, image)
    shape = draft.recorded[draft.node].shape
    result = draft.new(shape, torch.float32, images=kind != "mean" and len(shape) == 4)
    place = result.other(result.meta.view(*image.meta.shape[:2], 1, 1)) if kind == "mean" else result
    step = steps.Pooling(average=1, kind=steps.FLOAT, count_padding=count_padding, factor=1.0)
    _pool(draft, image, place, tables, step)
    return result


def _pixels_of_mean(x: View, dims: Any) -> View:
    """A value as images whose last two dimensions are those of a mean."""
    axes = tuple(sorted(dim % x.meta.ndim for dim in ([dims] if isinstance(dims, int) else dims or ())))
    if x.meta.ndim == 4 and axes in ((2, 3), (1, 2)):
        return x if axes == (2, 3) else x.other(x.meta.permute(0, 3, 1, 2))
    if x.meta.ndim == 3 and axes == (1,):
        return x.other(x.meta.transpose(1, 2).unsqueeze(2))
    raise Unplanned


def _pool(draft: Draft, x: View, result: View, tables: Sequence[torch.Tensor], step: steps.Pooling) -> None:
    step.source, step.result = place_of(x), place_of(result)
    step.images, step.channels, step.height, step.width = result.meta.shape
    step.rows_of_window, step.columns_of_window = tables[0].shape[1], tables[1].shape[1]
    step.rows, step.columns = (draft.kept(table.contiguous()) for table in tables)
    draft.emit(step, x, result)


def _average_windows(
    operation: str, dimensions: int, given: dict[str, Any], x: View
) -> tuple[list[torch.Tensor], list[int], int]:
    """Tables of rows and columns, sizes of the result, and whether the padding counts."""
    shape, strides = x.meta.shape, x.strides()
    if operation == "mean":
        dims = given["dim"]
        if dims is None or sorted(dim % 4 for dim in ([dims] if isinstance(dims, int) else dims)) != [2, 3]:
            raise Unplanned
        return [packing.adaptive_windows(shape[i], 1, strides[i]) for i in (2, 3)], [1, 1], 0
    if dimensions != 2:
        raise Unplanned
    if operation == "adaptive_avg_pool":
        wanted = given["output_size"]
        wanted = [wanted, wanted] if isinstance(wanted, int) else list(wanted)
        sizes = [shape[2 + i] if size is None else int(size) for i, size in enumerate(wanted)]
        return [packing.adaptive_windows(shape[2 + i], sizes[i], strides[2 + i]) for i in range(2)], sizes, 0
    if given.get("ceil_mode") or given.get("divisor_override"):
        raise Unplanned
    kernel, padding = _pair(given["kernel_size"]), _pair(given.get("padding") or 0)
    stride = _pair(given.get("stride") or kernel)
    sizes = [(shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
    tables = [
        packing.windows(shape[2 + i], kernel[i], stride[i], padding[i], 1, sizes[i], strides[2 + i]) for i in range(2)
    ]
    return tables, sizes, int(bool(given.get("count_include_pad", True)))


def _pair(value: Any) -> list[int]:
    return [int(value)] * 2 if isinstance(value, int) else [int(one) for one in (list(value) * 2)[:2]]
