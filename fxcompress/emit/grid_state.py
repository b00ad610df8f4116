"""Grids in a `state_dict`: without them, weights would be loaded into a module that reads their integers otherwise.

Grids are plain Python numbers, in layers and in graphs, so that kernels find them without reading tensors. In a state
they are tensors of float64, like everything else there: `safetensors`, `torch.save` and `.cpu()` take them as they are.
Files written by `CompactModule.save` hold grids with the layers, not as tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxcompress.errors import OptionError
from fxcompress.graph import ops
from fxcompress.quant.spec import Grid

#: Names of the arguments of graph nodes that come from grids, by the kind of the node.
_NUMBERS: dict[str, tuple[str, ...]] = {
    "fake_quantize": ("scale", "zero_point", "quant_min", "quant_max"),
    "fake_quantize_channel": ("quant_min", "quant_max"),  # the others are buffers
    "pad": ("value",),
}


class NumbersInState(nn.Module):
    """A module whose state holds plain numbers as well, under names that no parameter or buffer has."""

    def state_numbers(self) -> dict[str, list[float]]:
        """Return the numbers that belong to the state, by name."""
        raise NotImplementedError

    def take_state_numbers(self, numbers: dict[str, list[float]]) -> None:
        """Put numbers in the places of those that `state_numbers` returns: the same names, as many of each.

        Raises:
            OptionError: they make no sense.
        """
        raise NotImplementedError

    def repack(self) -> None:
        """Forget what was derived from tensors and numbers."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, numbers in self.state_numbers().items():
            destination[prefix + name] = torch.tensor(numbers, dtype=torch.float64)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        found: dict[str, list[float]] = {}
        for name, own in self.state_numbers().items():
            key = prefix + name
            if key in unexpected_keys:  # nn.Module knows tensors only
                unexpected_keys.remove(key)
            if key not in state_dict:
                if strict:
                    missing_keys.append(key)
            elif state_dict[key].numel() != len(own):
                error_msgs.append(f"{key} holds {state_dict[key].numel()} numbers, where {len(own)} belong")
            else:
                found[name] = state_dict[key].tolist()
        try:
            self.take_state_numbers(found)
        except OptionError as error:
            error_msgs.append(f"the numbers of {prefix or 'the graph'} make no sense: {error}")
        self.repack()


def grids_of(module: nn.Module) -> dict[str, list[float]]:
    """Return the grids among the attributes of a module: scale, zero point and limits of `input` as `input_grid`."""
    return {_name_of(attribute): value.config() for attribute, value in vars(module).items() if isinstance(value, Grid)}


def take_grids(module: nn.Module, numbers: dict[str, list[float]]) -> None:
    """Put grids in the places of those that `grids_of` returns."""
    for attribute, value in list(vars(module).items()):
        if isinstance(value, Grid) and _name_of(attribute) in numbers:
            setattr(module, attribute, Grid.from_config(numbers[_name_of(attribute)]))


def _name_of(attribute: str) -> str:
    return attribute if attribute == "grid" else f"{attribute}_grid"


def numbers_of_graph(graph_module: fx.GraphModule) -> dict[str, list[float]]:
    """Return the numbers of grids that are written in a graph, by `<node>.numbers`.

    These are those of quantise-dequantise pairs, and what is padded with in graphs of 8-bit layers.
    """
    found = {}
    for node, names in _nodes_with_numbers(graph_module):
        given = ops.arguments(node)
        found[f"{node.name}.numbers"] = [float(given[name]) for name in names]
    return found


def take_numbers_of_graph(graph_module: fx.GraphModule, numbers: dict[str, list[float]]) -> bool:
    """Put numbers in the places of those that `numbers_of_graph` returns, and say whether any is another one."""
    changed = False
    for node, names in _nodes_with_numbers(graph_module):
        given = ops.arguments(node)
        taken = numbers.get(f"{node.name}.numbers")
        if taken is None or taken == [float(given[name]) for name in names]:
            continue
        for name, number in zip(names, taken, strict=True):
            given[name] = number if isinstance(given[name], float) else int(number)
        node.args, node.kwargs = ops.canonical_arguments(ops.BY_FUNCTION[node.target], given)  # type: ignore[index]
        changed = True
    return changed


def _nodes_with_numbers(graph_module: fx.GraphModule) -> list[tuple[fx.Node, tuple[str, ...]]]:
    """The nodes with arguments that come from grids, and the names of these."""
    found = []
    quantised = any(isinstance(module, NumbersInState) for module in list(graph_module.modules())[1:])
    for node in graph_module.graph.nodes:
        kind = ops.kind(node) if node.op == "call_function" else ""
        if kind == "pad" and not quantised:
            continue
        given = ops.arguments(node) if kind in _NUMBERS else {}
        names = tuple(name for name in _NUMBERS.get(kind, ()) if isinstance(given.get(name), (int, float)))
        if names:
            found.append((node, names))
    return found
