"""How a user says which layers are meant: by path, by pattern, by type, or by the module itself."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxcompress.errors import OptionError, did_you_mean
from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import graph_info


@dataclass(frozen=True)
class InPython:
    """An option that has no form in pipeline text: a function, a module or a type. Prints as its name in <>."""

    value: Any

    def __str__(self) -> str:
        name = getattr(self.value, "__name__", None) or type(self.value).__name__
        return f"<{name}>"


@dataclass(frozen=True)
class LayerRatio:
    """The share of channels that the layers matching a pattern lose. Prints as "features.*:0.3"."""

    pattern: str
    ratio: float

    def __str__(self) -> str:
        text = f"{self.pattern}:{self.ratio!r}"
        return text if re.fullmatch(r"[A-Za-z_][\w.\-:*/]*", text) else repr(text)


def read_layers(given: Any) -> tuple[str | InPython, ...]:
    """Read what a user gives as `ignore`: a pattern, a module, a type, or several of them.

    Raises:
        OptionError: it is none of these.
    """
    items = [given] if isinstance(given, (str, nn.Module, type, InPython)) else given
    if not isinstance(items, Iterable):
        raise OptionError(f"ignore takes patterns, modules or types, not {given!r}")
    found: list[str | InPython] = []
    for item in items:
        if isinstance(item, (nn.Module, type)):
            found.append(InPython(item))
        elif isinstance(item, (str, InPython)):
            found.append(item)
        else:
            raise OptionError(f"ignore takes patterns, modules or types, not {item!r}")
    return tuple(found)


def read_ratios(given: Any) -> tuple[LayerRatio, ...]:
    """Read what a user gives as `ratios`: {"features.0": 0.3}, or texts such as "features.0:0.3".

    Raises:
        OptionError: it is none of these, or a ratio is not at least 0 and below 1.
    """
    items: Iterable[Any] = given.items() if isinstance(given, Mapping) else given
    items = [given] if isinstance(given, (str, LayerRatio)) else items
    if not isinstance(items, Iterable):
        raise OptionError(f"ratios takes a dict from patterns to ratios, not {given!r}")
    return tuple(map(_read_ratio, items))


def _read_ratio(item: Any) -> LayerRatio:
    if isinstance(item, LayerRatio):
        return item
    pattern, ratio = item if isinstance(item, tuple) and len(item) == 2 else str(item).rpartition(":")[::2]
    try:
        number = float(ratio)
    except (TypeError, ValueError):
        raise OptionError(f"ratios are written as {{'features.0': 0.3}} or 'features.0:0.3', not {item!r}") from None
    if not isinstance(pattern, str) or not pattern:
        raise OptionError(f"ratios are given by the path or pattern of a layer, not {pattern!r}")
    if not 0 <= number < 1:
        raise OptionError(f"ratios: {pattern!r} must be at least 0 and below 1, not {ratio!r}")
    return LayerRatio(pattern, number)


def matching_layers(
    graph_module: fx.GraphModule,
    wanted: str | Sequence[str | InPython],
    model: nn.Module | None = None,
    option: str = "ignore",
) -> set[str]:
    """Return the layers that one of the patterns, modules or types means.

    Args:
        wanted: patterns match the paths of the caller's model; a path also means all layers inside it.
        model: the caller's model, to which modules and types refer; without it they refer to the graph's own modules.
        option: the name of the option, for messages.

    Raises:
        OptionError: one of them matches no layer of a model without regions; the nearest one is suggested.
    """
    known = graph_info(graph_module)
    prefix = f"{known.layer}." if known.layer else ""
    in_pieces = bool(known.layer or known.regions)  # the pattern may be meant for another piece of the model
    layers = {
        f"{prefix}{node.target}": str(node.target)
        for node in graph_module.graph.nodes
        if ops.kind(node) in (*ops.ANCHOR_KINDS, "embedding")
    }
    found: set[str] = set()
    for item in (wanted,) if isinstance(wanted, str) else wanted:
        if isinstance(item, str):
            hits = {full for full in layers if fnmatch.fnmatchcase(full, item) or full.startswith(f"{item}.")}
        else:
            hits = _of_object(graph_module, item.value, layers, prefix, model)
        if not hits and not in_pieces:
            hint = did_you_mean(item, layers) if isinstance(item, str) else ""
            raise OptionError(f"{option}={item if isinstance(item, InPython) else repr(item)} matches no layer{hint}")
        found |= {layers[full] for full in hits}
    return found


def _of_object(
    graph_module: fx.GraphModule, value: Any, layers: Mapping[str, str], prefix: str, model: nn.Module | None
) -> set[str]:
    """The layers that are, or are inside, a module or modules of a type."""

    def is_meant(module: nn.Module) -> bool:
        return isinstance(module, value) if isinstance(value, type) else module is value

    hits = {full for full, path in layers.items() if is_meant(edit.attribute(graph_module, path))}
    named = graph_module.named_modules() if model is None else model.named_modules()
    paths = [name if model is not None else f"{prefix}{name}" for name, module in named if is_meant(module)]
    return hits | {full for full in layers for path in paths if not path or f"{full}.".startswith(f"{path}.")}


def ratios_of_layers(
    graph_module: fx.GraphModule, ratios: Iterable[LayerRatio], model: nn.Module | None = None
) -> dict[str, float]:
    """Return the ratio of every layer that one of the patterns matches; the last one that matches counts.

    Raises:
        OptionError: a pattern matches no layer.
    """
    found: dict[str, float] = {}
    for item in ratios:
        for layer in sorted(matching_layers(graph_module, [item.pattern], model, "ratios")):
            found.pop(layer, None)
            found[layer] = item.ratio
    return found
