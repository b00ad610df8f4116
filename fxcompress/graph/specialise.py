"""Where tracing took a value from the example inputs, and which sizes it was computed from."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import operator
import os
import pathlib
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx

from fxcompress.graph.examples import ExampleValues

_TORCH = f"{pathlib.Path(torch.__file__).parent}{os.sep}"
_HERE = f"{pathlib.Path(__file__).parent.parent}{os.sep}"

#: What does not vary between the inputs that one graph is for: reading it is no specialisation.
FIXED_PROPERTIES = frozenset({"dtype", "device", "ndim", "dim", "is_cuda", "layout", "is_floating_point", "is_complex"})


@dataclass(frozen=True)
class Place:
    """A line of the model's code."""

    file: str
    line: int

    def __str__(self) -> str:
        code = linecache.getline(self.file, self.line).strip()
        return f"{self.file}:{self.line}" + (f" (`{code}`)" if code else "")


@dataclass(frozen=True)
class Specialisation:
    """A value that tracing took from the example inputs.

    node: what produces it. value: what it was. place: the line that asked for it.
    branch: whether it was only asked whether it is true: nothing but the way through the code depends on it.
    """

    node: fx.Node
    value: Any
    place: Place
    branch: bool = False


def is_own_code(file: str) -> bool:
    """Whether a file is the model's, rather than torch's or this package's."""
    return not file.startswith((_TORCH, _HERE, "<"))


def is_check(frame: FrameType) -> bool:
    """Whether a frame stands at a line that only checks something: an assertion, a condition for an error or a warning.

    Whatever passes the check takes the same way, so that an answer given there decides nothing.
    """
    return frame.f_lineno in _checking_lines(frame.f_code)


@functools.lru_cache(maxsize=1024)
def _checking_lines(code: CodeType) -> frozenset[int]:
    """The lines of a function that hold conditions of checks."""
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, IndexError):  # typed in at a prompt, or a piece of an expression
        return frozenset()
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) or (
            isinstance(node, ast.If) and (_only_complains(node.body) or _only_complains(node.orelse))
        ):
            found.update(range(node.test.lineno, (node.test.end_lineno or node.test.lineno) + 1))
    return frozenset(line + max(first, 1) - 1 for line in found)


def _only_complains(body: list[ast.stmt]) -> bool:
    """Whether statements do nothing but raise or warn."""
    return bool(body) and all(
        isinstance(line, ast.Raise)
        or (
            isinstance(line, ast.Expr)
            and isinstance(line.value, ast.Call)
            and _name(line.value.func).startswith("warn")
        )
        for line in body
    )


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def place_of(frame: FrameType | None) -> Place:
    """Return the line of the innermost frame in the model's own code, else of the innermost frame."""
    innermost = frame
    while frame is not None and not is_own_code(frame.f_code.co_filename):
        frame = frame.f_back
    chosen = frame or innermost
    return Place(chosen.f_code.co_filename, chosen.f_lineno) if chosen else Place("", 0)


def sizes_read(values: ExampleValues, node: fx.Node) -> list[str]:
    """Return the sizes that a number was computed from, e.g. ["x.shape[2] = 224"]; none where they never vary."""
    found: dict[str, None] = {}
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        texts = _size_texts(values, current)
        if texts is not None:
            found.update(dict.fromkeys(texts))
            continue
        fresh = [source for source in current.all_input_nodes if source not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return sorted(found)


def _size_texts(values: ExampleValues, node: fx.Node) -> list[str] | None:
    """The sizes that a node reads, as text; nothing for what never varies; None to go on to the node's arguments."""
    if node.op == "get_attr":
        return [f"the value of {node.target}"]
    if node.op in ("placeholder", "call_module"):
        return []
    attribute = node.args[1] if node.target is getattr else node.target
    if isinstance(attribute, str) and attribute in FIXED_PROPERTIES:
        return []
    source, dimensions = _dimensions(values, node)
    if source is None:
        return None
    shape = values.of(source).shape
    return [f"{source}.shape[{index}] = {shape[index]}" for index in dimensions]


def _dimensions(values: ExampleValues, node: fx.Node) -> tuple[fx.Node | None, list[int]]:
    """Return the tensor whose sizes a node reads, and which ones: x.shape[-2:][0] reads dimension 2 of 4."""
    index: Any = slice(None)
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        source, known = _dimensions(values, node.args[0])
        index = node.args[1]
    elif (node.op == "call_method" and node.target == "size") or (node.target is getattr and node.args[1] == "shape"):
        source = node.args[0] if isinstance(node.args[0], fx.Node) else None
        known = list(range(len(values.of(source).shape))) if source is not None else []
        if node.op == "call_method" and len(node.args) > 1:
            index = node.args[1]
    else:
        return None, []
    if source is None or not isinstance(index, (int, slice)) or (isinstance(index, slice) and _has_nodes(index)):
        return None, []
    return source, known[index] if isinstance(index, slice) else [known[index]]


def _has_nodes(index: slice) -> bool:
    return any(isinstance(part, fx.Node) for part in (index.start, index.stop, index.step))


def notes(values: ExampleValues, specialisations: Iterable[Specialisation]) -> list[str]:
    """Return one line for every place where the example decided, with the sizes that were looked at there."""
    places: dict[tuple[Place, bool], dict[str, None]] = {}
    for item in specialisations:
        read = sizes_read(values, item.node)
        if read:
            places.setdefault((item.place, item.branch), {}).update(dict.fromkeys(read))
    lines = []
    for (place, branch), sizes in places.items():
        names = list(sizes)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        looked_at = f"{', '.join(names[:3])}{more} at {place}"
        lines.append(f"{'one branch for all inputs, that of' if branch else 'specialised on'} {looked_at}")
    return lines
