"""Shells: modules of the user's class whose forward is a graph.

Code that stays Python may call other methods of a module than its forward (a detector asks its head for the loss) or
look at its class. So a region stands inside a module of the same class, which has everything that the module had but
its parameters.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import fx, nn

#: The name under which a shell holds its graph.
GRAPH = "graph"


class Shell(nn.Module):
    """Base of all shells, put before the user's class. `python` holds the children and buffers that methods may ask."""

    python: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph."""
        return self._modules[GRAPH](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("python", ()):
            return self.__dict__["python"][name]
        return super().__getattr__(name)

    def __reduce__(self) -> Any:
        return _new, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _shell_class(original: type[nn.Module]) -> type[Shell]:
    return type(original.__name__, (Shell, original), {"__module__": original.__module__})


def _new(original: type[nn.Module]) -> Shell:
    made = _shell_class(original)  # type: ignore[arg-type]
    return made.__new__(made)


def shell_of(module: nn.Module, graph_module: fx.GraphModule) -> Shell:
    """Return a module of the same class, without parameters, that computes what the graph does."""
    made = _new(type(module))
    made.__dict__.update(vars(module))
    children = {name: _without_parameters(child) for name, child in module.named_children()}
    made.__dict__.update(
        python={**module._buffers, **children}, _parameters={}, _buffers={}, _modules={GRAPH: graph_module}
    )
    return made


def _without_parameters(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares everything but the parameters, which it lacks."""
    twin = copy.copy(module)
    children = {name: child and _without_parameters(child) for name, child in module._modules.items()}
    twin.__dict__.update(_parameters={}, _buffers=dict(module._buffers), _modules=children)
    return twin
