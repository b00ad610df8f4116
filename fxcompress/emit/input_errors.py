"""What is wrong with the inputs that a lowered module failed on, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from fxcompress.emit.cpu_numbers import has_kernels
from fxcompress.errors import InputError
from fxcompress.graph.metadata import TensorInfo, info

#: What Python, torch and libraries of kernels raise when inputs do not fit; other exceptions mean something else.
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, InputError)


def explain(
    graph_module: fx.GraphModule, arguments: Sequence[Any], keywords: Mapping[str, Any], error: Exception
) -> InputError | None:
    """Return the error that says how the inputs of a failed call differ from those that the graph was made for.

    Args:
        graph_module: the graph. Only one with kernels is looked at: others fail as the caller's own model does.
        arguments, keywords: of the call.
        error: what the call raised.

    Returns:
        None, if nothing about the inputs explains it. Another batch size, the same for all inputs, does not.
    """
    if not has_kernels(graph_module):
        return None
    placeholders = {str(node.target): node for node in graph_module.graph.find_nodes(op="placeholder")}
    problems, advice = list(_misnamed(placeholders, arguments, keywords)), ""
    if not problems:
        given = {**dict(zip(placeholders, arguments, strict=False)), **keywords}
        problems = list(_misfits({name: info(placeholders[name]).value for name in given}, given))
        advice = (
            ". Only the batch size may be another one, and other sizes where all layers allow it; for other inputs "
            "compile the model with such example_inputs"
        )
    if not problems:
        return None
    cause = next(iter(str(error).strip().splitlines()), "no message")
    return InputError(
        f"{type(graph_module).__name__} does not take these inputs: {'; '.join(problems)}{advice} "
        f"({type(error).__name__}: {cause})"
    )


def _misnamed(
    placeholders: Mapping[str, fx.Node], arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> Iterator[str]:
    """Inputs that are missing, or more than there are."""
    names = list(placeholders)
    if len(arguments) > len(names):
        yield f"{len(arguments)} were given, and it takes {len(names)} ({', '.join(names)})"
    unknown = [name for name in keywords if name not in placeholders]
    if unknown:
        yield f"there is no input {', '.join(map(repr, unknown))}, but {', '.join(map(repr, names))}"
    twice = [name for name in names[: len(arguments)] if name in keywords]
    if twice:
        yield f"{', '.join(map(repr, twice))} is given twice"
    missing = [name for name in names[len(arguments) :] if name not in keywords and not placeholders[name].args]
    if missing:
        yield f"{', '.join(map(repr, missing))} is missing"


def _misfits(expected: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """Inputs whose form is another one than that of the example inputs."""
    batches: dict[str, tuple[int, int]] = {}  # of every tensor: the one expected, the one given
    for name, value in expected.items():
        if value is None:
            continue
        wanted, form = tree_flatten(value)
        found, found_form = ([given[name]], form) if isinstance(value, TensorInfo) else tree_flatten(given[name])
        if form != found_form:
            yield f"{name!r} is put together in another way than in the example inputs"
            continue
        for index, (one, leaf) in enumerate(zip(wanted, found, strict=True)):
            label = repr(name) if len(wanted) == 1 else f"tensor {index} of {name!r}"
            problem = _misfit(one, leaf) if isinstance(one, TensorInfo) else ""
            if problem:
                yield f"{label} {problem}"
            elif isinstance(one, TensorInfo) and one.shape:
                batches[label] = (one.shape[0], leaf.shape[0])
    factors = {found * 1.0 / max(wanted, 1) for wanted, found in batches.values()}
    if len(factors) > 1:
        sizes = ", ".join(
            f"{label} of {found} where the example had {wanted}" for label, (wanted, found) in batches.items()
        )
        yield f"the first dimensions do not fit each other ({sizes})"


def _misfit(wanted: TensorInfo, given: Any) -> str:
    """How something differs from a tensor of the example, its batch size aside."""
    words = f"{_dtype(wanted.dtype)} {wanted.shape}"
    if not isinstance(given, torch.Tensor):
        return f"must be a tensor ({words}), not {type(given).__name__}"
    same_kind = given.dtype == wanted.dtype or (given.is_floating_point() and wanted.dtype.is_floating_point)
    if not same_kind or tuple(given.shape[1:]) != wanted.shape[1:] or given.ndim != len(wanted.shape):
        return f"is {_dtype(given.dtype)} {tuple(given.shape)}, where the example was {words}"
    return "" if given.device == wanted.device else f"is on {given.device}, where the example was on {wanted.device}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
