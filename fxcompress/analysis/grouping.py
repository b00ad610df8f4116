"""From ties between atoms to groups of atoms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

#: How deep parts may have parts of their own: heads, positions within a head, halves of positions, ...
_DEPTH = 4


@dataclass(frozen=True)
class Grouping:
    """Which atoms live and die together.

    group: atom -> group, shape (atoms,). count: number of groups.
    parts: group -> the groups that all have to live for it to live, shape (groups, m), -1 where there are fewer. A
        group without parts is its own part; None if no group has parts.
    kind: group -> 0, or what it is a part of: 1 for a whole (a head), 2 for a position (within a head).
    tangled: groups whose parts contradict each other: they have to live.
    """

    group: Integers
    count: int
    parts: Integers | None
    kind: Integers
    tangled: Integers


def solve(
    atoms: int, edges: Sequence[tuple[Integers, Integers]], definitions: Sequence[tuple[Integers, Integers]]
) -> Grouping:
    """Find the connected components of atoms, and the parts of those that were cut into parts.

    Args:
        atoms: number of atoms.
        edges: pairs of atoms that are tied.
        definitions: pairs (atoms of shape (n,), their parts of shape (n, m)). Atoms that are tied have tied parts.
    """
    links = list(edges)
    while True:
        group, count = _components(atoms, links)
        added = [edge for width in _by_width(definitions).values() for edge in _tie_parts(group, *width)]
        if not added:
            break
        links += added
    kind = np.zeros(count, dtype=np.int64)
    for _, parts in definitions:
        kind[group[parts[:, :-1]]] = 1
    for _, parts in definitions:
        kind[group[parts[:, -1]]] = 2
    table, tangled = _part_table(group, count, definitions)
    return Grouping(group, count, table, kind, tangled)


def _components(atoms: int, edges: Sequence[tuple[Integers, Integers]]) -> tuple[Integers, int]:
    if not atoms:
        return np.zeros(0, dtype=np.int64), 0
    empty = np.zeros(0, dtype=np.int64)
    left = np.concatenate([edge[0] for edge in edges] or [empty])
    right = np.concatenate([edge[1] for edge in edges] or [empty])
    matrix = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(atoms, atoms))
    count, labels = connected_components(matrix, directed=False)
    return labels.astype(np.int64), int(count)


def _by_width(definitions: Sequence[tuple[Integers, Integers]]) -> dict[int, tuple[Integers, Integers]]:
    """Join definitions with equal numbers of parts."""
    widths = {parts.shape[1] for _, parts in definitions}
    return {
        width: (
            np.concatenate([atoms for atoms, parts in definitions if parts.shape[1] == width]),
            np.concatenate([parts for _, parts in definitions if parts.shape[1] == width]),
        )
        for width in sorted(widths)
    }


def _tie_parts(group: Integers, atoms: Integers, parts: Integers) -> list[tuple[Integers, Integers]]:
    """Ties between the parts of atoms of one group that are not tied yet."""
    owners = group[atoms]
    order = np.argsort(owners, kind="stable")
    same = np.flatnonzero(owners[order][1:] == owners[order][:-1])
    left, right = parts[order[same]].ravel(), parts[order[same + 1]].ravel()
    apart = group[left] != group[right]
    return [(left[apart], right[apart])] if apart.any() else []


def _part_table(
    group: Integers, count: int, definitions: Sequence[tuple[Integers, Integers]]
) -> tuple[Integers | None, Integers]:
    """Return the parts of every group, parts of parts included, and the groups where they contradict each other."""
    if not definitions:
        return None, np.zeros(0, dtype=np.int64)
    width = max(parts.shape[1] for _, parts in definitions)
    table = np.full((count, width), -1, dtype=np.int64)
    table[:, 0] = np.arange(count)
    cut = np.zeros(count, dtype=np.int64)
    tangled: list[Integers] = []
    for parts_wide, (atoms, parts) in _by_width(definitions).items():
        owners, first = np.unique(group[atoms], return_index=True)
        clash = (cut[owners] != 0) & (cut[owners] != parts_wide)
        tangled += [group[parts[first[clash]]].ravel(), table[owners[clash]].ravel()]
        cut[owners] = parts_wide
        table[owners] = -1
        table[owners, :parts_wide] = group[parts[first]]
    for _ in range(_DEPTH):
        nested = (table >= 0) & (cut[table] > 0) & (table != np.arange(count)[:, None])
        if not nested.any():
            break
        columns = [np.where(table[:, [i]] >= 0, table[table[:, i]], -1) for i in range(table.shape[1])]
        table = np.concatenate(columns, axis=1)
        table = table[:, (table >= 0).any(axis=0)]
    else:
        tangled.append(table[nested.any(axis=1)].ravel())
    found = np.unique(np.concatenate(tangled)) if tangled else np.zeros(0, dtype=np.int64)
    return table, found[found >= 0]
