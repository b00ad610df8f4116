"""Chains of elementwise operations: `chain` emits one; what are such chains, and activations as kernels number them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxcompress.emit.cpu_int8 import Int8Add, Int8Mul, activation_of
from fxcompress.emit.cpu_numbers import broadcast, inverse
from fxcompress.emit.native import steps
from fxcompress.emit.native.draft import Draft
from fxcompress.emit.native.memory import View, meta_tensor
from fxcompress.emit.native.places import side_by_side
from fxcompress.emit.native.plan import Unplanned
from fxcompress.graph import ops
from fxcompress.quant.spec import Grid

_ARITHMETIC = {"add": steps.ADD, "sub": steps.SUBTRACT, "mul": steps.MULTIPLY, "div": steps.DIVIDE}

#: Kinds that make one number of the numbers at each place.
ELEMENTWISE = frozenset({
    *_ARITHMETIC, "relu", "relu6", "hardtanh", "clamp", "gelu", "leaky_relu", "hardswish", "silu", "tanh", "sigmoid",
    "hardsigmoid",
})  # fmt: skip

#: In the place of a limit that a clamp does not have.
LARGEST = torch.finfo(torch.float32).max


def elementwise(draft: Draft, given: dict[str, Any]) -> View:
    """Arithmetic, or an activation, on real numbers."""
    kind = ops.kind(draft.node)
    operands = [given.get("input"), given.get("other")] if kind in _ARITHMETIC else [given.get("input")]
    if "alpha" in given or given.get("rounding_mode") is not None:
        raise Unplanned
    program: list[tuple[Any, ...]] = []
    views = []
    for operand in operands:
        if isinstance(operand, View):
            views.append(operand)
        elif isinstance(operand, bool) or not isinstance(operand, (int, float)):
            raise Unplanned
        program.append((steps.LOAD, operand, None))
    if not views or any(view.meta.dtype != torch.float32 or view.meta.numel() == 0 for view in views):
        raise Unplanned
    if kind in _ARITHMETIC:
        program.append((_ARITHMETIC[kind], 0, 1))
    else:
        program.append((steps.ACTIVATE, 0, *_activation_alone(kind, given)))
    shape = broadcast(*(view.meta.shape for view in views))
    largest = max(views, key=lambda view: view.meta.numel())
    result = draft.new(shape, torch.float32, images=side_by_side(largest.meta))
    chain(draft, result, None, program)
    return result


def add(draft: Draft, module: Int8Add, left: View, right: View) -> View:
    """A sum of two 8-bit tensors."""
    program: list[tuple[Any, ...]] = [
        (steps.LOAD, left, module.left), (steps.LOAD, right, module.right), (steps.ADD, 0, 1),
    ]  # fmt: skip
    return _stored(draft, program, module.output, (left, right), relu=module.relu)


def multiply(draft: Draft, module: Int8Mul, left: View, right: View) -> View:
    """A product of two 8-bit tensors, number by number."""
    program: list[tuple[Any, ...]] = [
        (steps.LOAD, left, module.left), (steps.LOAD, right, module.right), (steps.MULTIPLY, 0, 1),
    ]  # fmt: skip
    return _stored(draft, program, module.output, (left, right), relu=module.relu)


def _stored(draft: Draft, program: list[tuple[Any, ...]], grid: Grid, views: Sequence[View], relu: bool) -> View:
    shape = broadcast(*(view.meta.shape for view in views))
    largest = max(views, key=lambda view: view.meta.numel())
    result = draft.made(shape, torch.uint8, images=side_by_side(largest.meta))
    low = max(grid.quant_min, grid.zero_point) if relu else grid.quant_min
    chain(draft, result, Grid(grid.scale, grid.zero_point, grid.quant_min, grid.quant_max), program, low)
    return result


def chain(
    draft: Draft, result: View, grid: Grid | None, program: Sequence[tuple[Any, ...]], low: int | None = None
) -> None:
    """Emit a chain of elementwise operations, of which the last is stored.

    program: (LOAD, view or number, grid or None), (ACTIVATE, index, number, argument, argument) or
    (operation, index, index); indices are those of earlier operations.
    """
    if result.meta.numel() == 0:
        raise Unplanned
    strides = result.meta.stride()
    order = sorted(range(result.meta.ndim), key=lambda i: -strides[i])
    order = [i for i in order if result.meta.shape[i] > 1] or [0]
    sizes = [result.meta.shape[i] for i in order]
    images, channels = (sizes[0] if len(sizes) > 2 else 1), sizes[-1]
    step = steps.Pointwise(
        images=images, pixels=result.meta.numel() // images // channels, channels=channels,
        operations=len(program), kind=steps.FLOAT if grid is None else steps.BYTES, inverse=1.0, high=255,
        result=_walk(result, order, result.meta.shape)[0],
    )  # fmt: skip
    if grid is not None:
        step.inverse, step.zero, step.high = inverse(grid.scale), grid.zero_point, grid.quant_max
        step.low = grid.quant_min if low is None else low
    program = [_walkable(draft, one, order, result.meta.shape) for one in program]
    views = [result]
    for index, (code, *rest) in enumerate(program):
        operation = step.operation[index]
        operation.code = code
        if code == steps.LOAD:
            operation.first = step.operands
            step.operand[step.operands] = _operand(draft, rest[0], rest[1], order, result.meta.shape)
            step.operands += 1
            if isinstance(rest[0], View):
                views.append(rest[0])
        else:
            operation.first, operation.second = rest[0], rest[1]
            if code == steps.ACTIVATE:
                operation.argument0, operation.argument1 = rest[2], rest[3]
    draft.emit(step, *views)


def _walkable(draft: Draft, operation: tuple[Any, ...], order: list[int], shape: torch.Size) -> tuple[Any, ...]:
    """The same operation, on a copy of its operand if that cannot be read in constant steps."""
    code, value, *rest = operation
    if code != steps.LOAD or not isinstance(value, View):
        return operation
    try:
        _walk(value, order, shape)
    except Unplanned:
        strides = [0] * len(shape)
        step = 1
        for i in reversed(order):
            strides[i], step = step, step * shape[i]
        meta = meta_tensor(shape, value.meta.dtype, strides)
        copy = View(draft.buffer("arena", step * meta.element_size()), meta)
        draft.copy(value.other(value.meta.expand(shape)), copy)
        return code, copy, *rest
    return operation


def _operand(draft: Draft, value: Any, grid: Grid | None, order: list[int], shape: torch.Size) -> steps.Operand:
    if not isinstance(value, View):
        return steps.Operand(shape=steps.WHOLE, shift=float(value))
    place, kind = _walk(value, order, shape)
    operand = steps.Operand(shape=kind, kind=steps.FLOAT, place=place)
    if value.meta.dtype == torch.uint8:
        if grid is None:
            raise Unplanned
        operand.kind, operand.scale, operand.shift = steps.BYTES, grid.scale, -grid.scale * grid.zero_point
    elif value.meta.dtype != torch.float32:
        raise Unplanned
    return operand


def _walk(view: View, order: list[int], shape: torch.Size) -> tuple[steps.Place, int]:
    """How a value is read along the dimensions of a result in their order in memory: place, and what it has one for.

    Raises:
        Unplanned: no constant steps lead from image to image, pixel to pixel and channel to channel.
    """
    size = view.meta.element_size()
    strides = [stride * size for stride in view.meta.expand(shape).stride()]
    ordered = [strides[i] for i in order]
    sizes = [shape[i] for i in order]
    image = ordered[0] if len(order) > 2 else 0
    middle = ordered[1:-1] if len(order) > 2 else ordered[:-1]
    counts = sizes[1:-1] if len(order) > 2 else sizes[:-1]
    for i in range(len(middle) - 1):
        if middle[i] != middle[i + 1] * counts[i + 1]:
            raise Unplanned
    pixel = middle[-1] if middle else ordered[-1] * sizes[-1]
    if ordered[-1] != size:
        raise Unplanned
    kind = steps.IMAGE_CHANNEL if middle and pixel == 0 else steps.ELEMENT
    return steps.Place(view.buffer.index, view.offset, pixel, image), kind


def _activation_alone(kind: str, given: dict[str, Any]) -> tuple[int, float, float]:
    """The number of an activation that stands by itself, and its arguments."""
    found = activation_of(kind, given)
    if found is None:
        if kind not in ("sigmoid", "hardsigmoid"):  # the others have arguments that are not in `given` as numbers
            raise Unplanned
        return activation(kind, ())
    if found[0] == "clamp":
        low, high = found[1:]
        return steps.ACTIVATIONS["clamp"], -LARGEST if low is None else low, LARGEST if high is None else high
    return activation(found[0], found[1:])


def activation(word: str, arguments: Sequence[Any]) -> tuple[int, float, float]:
    """Return an activation's number and its two arguments, by the word that lowered layers have for it."""
    if word == "gelu":
        return steps.ACTIVATIONS["gelu_tanh" if arguments and arguments[0] == "tanh" else "gelu"], 0.0, 0.0
    if word not in steps.ACTIVATIONS:
        raise Unplanned
    numbers = [float(one) for one in arguments] + [0.0, 0.0]
    return steps.ACTIVATIONS[word], numbers[0], numbers[1]
