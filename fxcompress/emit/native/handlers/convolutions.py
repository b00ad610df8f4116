"""Convolutions and linear layers on integers: one kernel for both, and one for depthwise convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fxcompress.emit.cpu_int8 import Int8Conv, Int8Linear
from fxcompress.emit.native import packing, steps
from fxcompress.emit.native.draft import Draft
from fxcompress.emit.native.handlers.finish import finish_of, result_of
from fxcompress.emit.native.memory import View
from fxcompress.emit.native.pixels import PixelClasses, every_place, pixel_classes
from fxcompress.emit.native.places import place_of, place_of_rows
from fxcompress.emit.native.plan import Unplanned


def conv(draft: Draft, module: Int8Conv, x: View, residual: View | None = None) -> View:
    """A convolution with one or two spatial dimensions."""
    if len(module.stride) == 1:
        lifted = None if residual is None else residual.other(residual.meta.unsqueeze(2))
        result = _conv2d(draft, module, x.other(x.meta.unsqueeze(2)), lifted, _flat_geometry(module))
        return result.other(result.meta.squeeze(2))
    if len(module.stride) != 2:
        raise Unplanned
    geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
    return _conv2d(draft, module, x, residual, geometry)


def _conv2d(draft: Draft, module: Int8Conv, x: View, residual: View | None, geometry: tuple[list[int], ...]) -> View:
    if x.meta.ndim != 4 or x.meta.numel() == 0:
        raise Unplanned
    kernel, stride, padding, dilation = geometry
    if math.prod(kernel) > steps.MAX_PLACES:
        raise Unplanned
    shape = [x.meta.shape[0], module.out_channels]
    for index in range(2):
        reach = dilation[index] * (kernel[index] - 1) + 1
        shape.append((x.meta.shape[2 + index] + 2 * padding[index] - reach) // stride[index] + 1)
    if residual is not None:
        residual = _residual(draft, residual, shape)
    result = result_of(draft, module, shape, residual)
    if module.groups == module.in_channels == module.out_channels > 1 and residual is None:
        _depthwise(draft, module, x, result, geometry)
        return result
    channels = module.in_channels // module.groups
    in_rows = module.groups == 1 and channels % packing.DEPTH != 0 and kernel[1] > 1 and dilation[1] == 1
    if in_rows:  # a row of the window is one run of bytes
        x, padding = _padded(draft, x, padding, module.input.zero_point), [0, 0]
    else:
        joined = packing.joined_groups(module.out_channels, channels, module.groups)
        outside = packing.rounded_up(module.groups, joined) > module.groups or joined * channels % packing.DEPTH > 0
        x = draft.image(x, outside)
    key = (module, "rows" if in_rows else "taps")
    if key not in draft.packed:
        draft.packed[key] = _packed_convolution(module, kernel, in_rows)
    weights, groups, group, run, bias, scale = draft.packed[key]
    row, column = x.strides()[2], x.strides()[3]
    group_in = group * module.in_channels // module.out_channels
    outside_bytes = (groups - 1) * group_in + run + packing.CHUNK
    rows = packing.windows(x.meta.shape[2], kernel[0], stride[0], padding[0], dilation[0], shape[2], row)
    places = 1 if in_rows else kernel[1]
    columns = packing.windows(x.meta.shape[3], places, stride[1], padding[1], dilation[1], shape[3], column)
    skips = module.input.zero_point == 0  # the padding's bytes then: products with them are zeros
    classes = pixel_classes(rows == steps.OUTSIDE, columns == steps.OUTSIDE, shape[0]) if skips else (
        every_place(shape[2] * shape[3], kernel[0] * places)
    )  # fmt: skip
    step = steps.Convolution(
        source=place_of(x), result=place_of(result), images=shape[0], height=shape[2], width=shape[3],
        channels=module.out_channels, groups=groups, group_in=group_in, group_out=group,
        rows_of_window=kernel[0], columns_of_window=places, run=packing.rounded_up(run, packing.DEPTH),
        rows=draft.kept(rows.contiguous()), columns=draft.kept(columns.contiguous()),
        padding=draft.kept(torch.full((outside_bytes,), module.input.zero_point, dtype=torch.uint8)),
        weights=draft.kept(weights), group_weights=weights.numel() // groups,
        finish=finish_of(draft, module, scale, bias, residual), **_kept(draft, classes),
    )  # fmt: skip
    draft.emit(step, x, result, *([residual] if residual else []))
    return result


def _kept(draft: Draft, classes: PixelClasses) -> dict[str, Any]:
    """The fields of a step that say in which order pixels are taken, and what of their windows is multiplied."""
    order = None if classes.order is None else draft.kept(classes.order)
    return {
        "classes": len(classes.ends), "order": order, "ends": draft.kept(classes.ends),
        "places": draft.kept(classes.places), "borders": draft.kept(classes.borders),
    }  # fmt: skip


def _residual(draft: Draft, view: View, shape: Sequence[int]) -> View:
    """What is added to images of a shape, with its channels side by side and its rows one after the other."""
    meta = view.meta
    if meta.shape != torch.Size(shape):
        raise Unplanned
    if meta.stride(1) == 1 and meta.stride(2) == meta.shape[3] * meta.stride(3):
        return view
    copy = draft.new(shape, meta.dtype, images=True)
    draft.copy(view, copy)
    return copy


def _padded(draft: Draft, x: View, padding: Sequence[int], value: int) -> View:
    """A copy of images with a margin."""
    n, c, h, w = x.meta.shape
    if not any(padding) and x.meta.stride(1) == 1 and x.meta.stride(3) == c and x.buffer.place == "arena":
        return x
    result = draft.new((n, c, h + 2 * padding[0], w + 2 * padding[1]), torch.uint8, images=True)
    if any(padding):
        step = steps.Fill(result=place_of(result), bytes=result.buffer.bytes, value=value)
        draft.emit(step, result)
    inside = result.meta[:, :, padding[0] : padding[0] + h, padding[1] : padding[1] + w]
    draft.copy(x, result.other(inside))
    return result


def _depthwise(draft: Draft, module: Int8Conv, x: View, result: View, geometry: tuple[list[int], ...]) -> None:
    kernel, stride, padding, dilation = geometry
    x = draft.image(x)
    if module not in draft.packed:
        bias = module._bias_with_zero_point()
        zeros = torch.zeros(module.out_channels)
        draft.packed[module] = (
            packing.depthwise(module.weight.view(module.out_channels, *kernel)),
            packing.depthwise_vectors(zeros if bias is None else bias),
            packing.depthwise_vectors(module.weight_scale.double() * module.input.scale),
        )
    weights, bias, scale = draft.packed[module]
    n, c, height, width = result.meta.shape
    row = x.strides()[2]
    rows = packing.windows(x.meta.shape[2], kernel[0], stride[0], padding[0], dilation[0], height, row)
    step = steps.Depthwise(
        source=place_of(x), result=place_of(result), images=n, height=height, width=width, channels=c,
        rows_of_window=kernel[0], columns_of_window=kernel[1], source_width=x.meta.shape[3], stride=stride[1],
        dilation=dilation[1], padding_left=padding[1], rows=draft.kept(rows.contiguous()),
        padding=draft.kept(torch.full((packing.CHUNK,), module.input.zero_point, dtype=torch.uint8)),
        weights=draft.kept(weights), finish=finish_of(draft, module, scale, bias, None),
    )  # fmt: skip
    draft.emit(step, x, result)


def linear(draft: Draft, module: Int8Linear, x: View, residual: View | None = None) -> View:
    """A linear layer (..., in features): a convolution over one row of pixels."""
    shape = [*x.meta.shape[:-1], module.out_features]
    if x.meta.numel() == 0 or (residual is not None and list(residual.meta.shape) != shape):
        raise Unplanned
    x, rows = draft.rows(x, room=module.in_features % packing.DEPTH > 0)
    if residual is not None:
        residual, added = draft.rows(residual)
    result = result_of(draft, module, shape, residual)
    if module not in draft.packed:
        bias = module._bias_with_zero_point()
        zeros = torch.zeros(module.out_features)
        draft.packed[module] = (
            packing.convolution(module.weight[None, :, None, :]),
            packing.vectors(zeros if bias is None else bias),
            packing.vectors(module.weight_scale.double() * module.input.scale),
        )
    weights, bias, scale = draft.packed[module]
    count = x.meta.numel() // module.in_features
    step = steps.Convolution(
        source=place_of(rows), result=place_of_rows(result), images=1, height=1, width=count,
        channels=module.out_features, groups=1, group_out=module.out_features,
        rows_of_window=1, columns_of_window=1,
        run=packing.rounded_up(module.in_features, packing.DEPTH),
        rows=draft.kept(torch.zeros(1, dtype=torch.int64)),
        columns=draft.kept(torch.arange(count) * rows.strides()[0]),
        padding=draft.kept(torch.zeros(packing.CHUNK, dtype=torch.uint8)),
        weights=draft.kept(weights), group_weights=weights.numel(),
        finish=finish_of(draft, module, scale, bias, None if residual is None else added),
        **_kept(draft, every_place(count, 1)),
    )  # fmt: skip
    draft.emit(step, x, result, *([residual] if residual else []))
    return result


def _packed_convolution(module: Int8Conv, kernel: Sequence[int], in_rows: bool) -> tuple[Any, ...]:
    """Weights, number of groups, output channels of one, bytes at each place, bias and scale of a convolution."""
    weight = module.weight.flatten(2)  # (out, in of a group, places)
    groups, group = 1, module.out_channels
    if in_rows:
        window = module.weight.view(*module.weight.shape[:2], *kernel)
        rows = window.permute(0, 2, 3, 1).flatten(2)  # (out, rows of the window, columns x channels)
        packed, run = packing.convolution(rows[None]), rows.shape[2]
    else:
        dense, joined = packing.merged_groups(weight, module.groups)
        groups, group, run = dense.shape[0], joined * (module.out_channels // module.groups), dense.shape[2]
        packed = packing.convolution(dense.transpose(2, 3))
    bias = module._bias_with_zero_point()
    bias = torch.zeros(module.out_channels) if bias is None else bias
    scale = module.weight_scale.double() * module.input.scale
    return packed, groups, group, run, packing.vectors(bias, group), packing.vectors(scale, group)


def _flat_geometry(module: Int8Conv) -> tuple[list[int], ...]:
    """A convolution with one spatial dimension, as one with two of which the first has size one."""
    return [1, *module.kernel_size], [1, *module.stride], [0, *module.padding], [1, *module.dilation]
