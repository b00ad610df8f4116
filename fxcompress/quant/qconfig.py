"""Which observers a layer gets: this project's options, or a `QConfig` / `QConfigMapping` of `torch.ao`.

`torch.ao` is not imported: its objects are read by their attributes, so that its deprecation is no concern here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxcompress.errors import OptionError
from fxcompress.quant.normed_layers import PLAIN
from fxcompress.quant.observers import make_observer
from fxcompress.quant.spec import ACTIVATION, DYNAMIC, REDUCED_WEIGHT, STATIC, WEIGHT, WEIGHT_ONLY, QuantSpec

#: Attributes that tell a QConfigMapping.
_MAPPING_ATTRIBUTES = ("global_qconfig", "object_type_qconfigs", "module_name_qconfigs")


@dataclass(frozen=True)
class ObserverChoice:
    """The observers of one layer.

    activation: what `observers.make_observer` takes, for values; likewise weight, for the layer's weight.
    weight_spec, activation_spec: the format of the weight and of values, where the observer does not bring its own.
    mode: how the layer gets its input, one of `quant.spec.MODES`.
    """

    activation: Any
    weight: Any
    weight_spec: QuantSpec
    activation_spec: QuantSpec = ACTIVATION
    mode: str = STATIC

    def activation_observer(self) -> nn.Module:
        """Return a new observer for a value."""
        return make_observer(self.activation, self.activation_spec)

    def weight_observer(self) -> nn.Module:
        """Return a new observer for the weight."""
        return make_observer(self.weight, self.weight_spec)

    def in_mode(self, mode: str) -> ObserverChoice:
        """Return the choice for a layer that gets its input in a certain way.

        Coarse scales (`QuantSpec`) make sums exact in float32. Where values are float, or have scales that are not
        coarse, they would cost accuracy for nothing. Nor do weights that are multiplied as real numbers saturate.
        """
        spec = WEIGHT if mode == WEIGHT_ONLY and self.weight_spec == REDUCED_WEIGHT else self.weight_spec
        return replace(self, mode=mode, weight_spec=spec if mode == STATIC else replace(spec, significands=()))


#: From a layer's path and module to its observers; None leaves the layer in float.
Chooser = Callable[[str, nn.Module], ObserverChoice | None]


def chooser(qconfig: object, default: ObserverChoice) -> Chooser:
    """Return the function that chooses the observers of each layer.

    Args:
        qconfig: None for `default` everywhere; a `QConfig` (an object with `activation` and `weight`); a
            `QConfigMapping`, or a dict in the form of its `to_dict()`.
        default: the choice where `qconfig` is None.

    Raises:
        OptionError: it is none of these.
    """
    if qconfig is None:
        return lambda path, module: default
    if _is_qconfig(qconfig):
        choice = _choice(qconfig, default)
        return lambda path, module: choice
    rules = _rules(qconfig)
    return lambda path, module: _optional(rules.find(path, module), default)


def _is_qconfig(candidate: object) -> bool:
    return hasattr(candidate, "activation") and hasattr(candidate, "weight")


def _choice(qconfig: Any, default: ObserverChoice) -> ObserverChoice:
    mode = _mode(qconfig.activation)
    return replace(default, activation=qconfig.activation, weight=qconfig.weight, mode=mode)


def _mode(activation: Any) -> str:
    """The mode that an observer of values from `torch.ao` stands for: some observe nothing."""
    made = activation() if callable(activation) else activation
    if getattr(made, "is_dynamic", False):
        return DYNAMIC
    return WEIGHT_ONLY if getattr(made, "dtype", None) == torch.float32 else STATIC


def _optional(qconfig: object, default: ObserverChoice) -> ObserverChoice | None:
    return None if qconfig is None else _choice(qconfig, default)


@dataclass(frozen=True)
class _Rules:
    """The parts of a QConfigMapping, in the order in which they take effect."""

    by_name: dict[str, Any]
    by_pattern: dict[str, Any]
    by_type: dict[Any, Any]
    everywhere: Any

    def find(self, path: str, module: nn.Module) -> Any:
        """Return the QConfig of a layer: the rule for its path or a parent's, then patterns, types, the global one."""
        parts = path.split(".")
        for length in range(len(parts), 0, -1):
            parent = ".".join(parts[:length])
            if parent in self.by_name:
                return self.by_name[parent]
        for pattern, qconfig in self.by_pattern.items():
            if re.match(pattern, path):
                return qconfig
        return self.by_type.get(PLAIN.get(type(module), type(module)), self.everywhere)


def _rules(mapping: Any) -> _Rules:
    if isinstance(mapping, dict):
        return _Rules(
            dict(mapping.get("module_name", ())),
            dict(mapping.get("module_name_regex", ())),
            dict(mapping.get("object_type", ())),
            mapping.get("", None),
        )
    if all(hasattr(mapping, name) for name in _MAPPING_ATTRIBUTES):
        return _Rules(
            dict(mapping.module_name_qconfigs),
            dict(getattr(mapping, "module_name_regex_qconfigs", {})),
            dict(mapping.object_type_qconfigs),
            mapping.global_qconfig,
        )
    raise OptionError(
        f"qconfig must be a QConfig (with .activation and .weight), a QConfigMapping or a dict, "
        f"not {type(mapping).__name__}"
    )
