"""What a reshape does to the indices of a tensor's dimensions."""

from __future__ import annotations

import math

import numpy as np

from fxcompress.analysis.channels import Axes, Axis, Floats, Walk
from fxcompress.analysis.grouping import Integers

Sizes = tuple[int, ...]


def regroup(walk: Walk, axes: Axes, old: Sizes, new: Sizes, every_part: bool = False) -> Axes:
    """Return the axes of a tensor of shape `old` after it was reshaped to `new`.

    The dimensions are cut into the smallest blocks of equal size on both sides. Within a block, several dimensions
    that merge into one give every index the atoms of all of them. One dimension that splits into several must stay
    rectangular: with `every_part` each of the new dimensions is a choice of its own (heads, and positions within a
    head), otherwise one of them keeps the atoms, tied across the others.
    """
    found: list[Axis | None] = []
    for sources, sizes in _blocks(axes, old, new):
        found.extend(_block(walk, sources, sizes, every_part))
    return tuple(found)


def _blocks(axes: Axes, old: Sizes, new: Sizes) -> list[tuple[list[tuple[Axis | None, int]], list[int]]]:
    """Cut both shapes into blocks with equal products."""
    if 0 in old or 0 in new:
        return [(list(zip(axes, old, strict=True)), list(new))]
    blocks = []
    i = j = 0
    while i < len(old) or j < len(new):
        sources: list[tuple[Axis | None, int]] = []
        sizes: list[int] = []
        left = right = 1
        while True:
            if left <= right and i < len(old) and (left < right or not sources):
                sources.append((axes[i], old[i]))
                left *= old[i]
                i += 1
            elif j < len(new) and (right < left or not sizes):
                sizes.append(new[j])
                right *= new[j]
                j += 1
            else:
                break
            if left == right and sources and sizes:
                break
        blocks.append((sources, sizes))
    return blocks


def _block(walk: Walk, sources: list[tuple[Axis | None, int]], sizes: list[int], every_part: bool) -> list[Axis | None]:
    axes = [axis for axis, _ in sources]
    if all(axis is None or size == 1 for axis, size in sources):
        walk.freeze_all(axes, "a single channel that a reshape drops")
        return [None] * len(sizes)
    old = [size for _, size in sources]
    wide_old = [size for size in old if size != 1]
    wide_new = [size for size in sizes if size != 1]
    for axis, size in sources:
        if size == 1:
            walk.freeze(axis, "a single channel that a reshape drops")
    if wide_old == wide_new:  # only dimensions of size 1 come and go
        kept = [axis for axis, size in sources if size != 1]
        return [kept.pop(0) if size != 1 else None for size in sizes]
    merged = _merge([axis if size != 1 else None for axis, size in sources], old)
    if len(wide_new) == 1:
        return [merged if size != 1 else None for size in sizes]
    undone = _unmerged(merged, sizes)
    if undone is not None:
        return undone
    if every_part and len(merged.atoms) == 1 and len(np.unique(merged.atoms)) == len(merged):
        return _into_parts(walk, merged, sizes)
    return _split(walk, merged, sizes)


def _unmerged(axis: Axis, sizes: list[int]) -> list[Axis | None] | None:
    """Undo a merge: every row of atoms goes to the dimension along which alone it differs. None if one does not."""
    if len(axis) != math.prod(sizes):
        return None
    rows: list[list[Integers]] = [[] for _ in sizes]
    for row in axis.atoms:
        position = next((i for i, size in enumerate(sizes) if size != 1 and _is_untied(row[None], sizes, i)), None)
        if position is None:
            return None
        rows[position].append(_lines(row[None], sizes, position)[0, 0])
    return [
        Axis(np.stack(found), _line_constants(axis, sizes, position)) if found else None
        for position, found in enumerate(rows)
    ]


def _into_parts(walk: Walk, axis: Axis, sizes: list[int]) -> list[Axis | None]:
    """Give every wide dimension fresh atoms; an index of the old dimension lives if all of its parts do."""
    parts = [walk.fresh(size) if size != 1 else None for size in sizes]
    grid = np.indices(sizes).reshape(len(sizes), -1)
    columns = [part.atoms[0, grid[position]] for position, part in enumerate(parts) if part is not None]
    walk.define(axis.atoms[0], np.stack(columns, axis=1))
    return [part and part.with_constant(_line_constants(axis, sizes, position)) for position, part in enumerate(parts)]


def _line_constants(axis: Axis, sizes: list[int], dimension: int) -> Floats:
    """The constant of every slice along one of the dimensions, where it holds one."""
    constants = np.moveaxis(axis.constant.reshape(sizes), dimension, -1).reshape(-1, sizes[dimension])
    return np.where((constants == constants[0]).all(axis=0), constants[0], np.nan)


def _merge(axes: list[Axis | None], sizes: list[int]) -> Axis:
    """Flatten several dimensions into one, in row-major order."""
    total = math.prod(sizes)
    rows: list[Integers] = []
    constant: Floats = np.full(total, np.nan)
    for position, axis in enumerate(axes):
        if axis is None:
            continue
        inner = math.prod(sizes[position + 1 :])
        indices = np.arange(total) // inner % sizes[position]
        rows.append(axis.atoms[:, indices])
        constant = np.where(np.isnan(constant), axis.constant[indices], constant)
    return Axis(np.concatenate(rows), constant)


def _split(walk: Walk, axis: Axis, sizes: list[int]) -> list[Axis | None]:
    """Cut one dimension into several; one of them keeps the atoms, tied across the others.

    It is the one along which the atoms differ, if that is one only (a flatten undone), else the largest.
    """
    if len(axis) != math.prod(sizes):
        walk.freeze(axis, "reshaped to an empty tensor")
        return [None] * len(sizes)
    candidates = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    keeper = next((i for i in candidates if _is_untied(axis.atoms, sizes, i)), candidates[0])
    lines = _lines(axis.atoms, sizes, keeper)
    walk.link(np.broadcast_to(lines[:, :1], lines.shape), lines)
    kept = Axis(lines[:, 0], _line_constants(axis, sizes, keeper))
    return [kept if position == keeper else None for position in range(len(sizes))]


def _lines(atoms: Integers, sizes: list[int], dimension: int) -> Integers:
    """Return the atoms as (k, positions in the other dimensions, indices along `dimension`)."""
    grid = np.moveaxis(atoms.reshape(-1, *sizes), dimension + 1, -1)
    return grid.reshape(len(grid), -1, sizes[dimension])


def _is_untied(atoms: Integers, sizes: list[int], dimension: int) -> bool:
    """Whether all lines along a dimension hold the same atoms, so that nothing has to be tied."""
    lines = _lines(atoms, sizes, dimension)
    return bool((lines == lines[:, :1]).all())
