"""What the nodes of a graph under construction produce on the example inputs, computed only where it is asked for.

Values are fake tensors (shape, dtype and device, no data). Where a fake tensor does not do, because a number is read
out of it, the real one is computed, as long as it does not depend on the data of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves, tree_map

from fxcompress.graph import edit
from fxcompress.graph.metadata import info
from fxcompress.graph.shapes import evaluation, execute

#: What fake tensors raise where data would be needed.
_NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException)


class DataDependentError(Exception):
    """A value depends on the data in the model's inputs, so that it is known only when the model runs."""


class Unknown:
    """A plain Python value that an opaque node produced: it may be passed on, but not looked at."""


class ExampleValues:
    """Values of nodes on the example inputs.

    Args:
        root: the module that the graph's attributes and layers belong to.
        arguments: the value of every placeholder, by target.
        outside: makes the context in which nodes are executed; a tracer takes its patches off there.
    """

    def __init__(
        self,
        root: nn.Module,
        arguments: dict[str, Any],
        outside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.root = root
        self.arguments = arguments
        self.outside = outside
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._fakes: dict[fx.Node, Any] = {}
        self._constants: dict[fx.Node, Any] = {}
        self._examples: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """Return what a node produces, with fake tensors. Every node is computed once.

        Raises:
            DataDependentError: a node before it looks at data.
        """
        for pending in _unknown(node, self._fakes):
            self._fakes[pending] = self._fake(pending)
        return self._fakes[node]

    def concrete(self, node: fx.Node) -> Any:
        """Return what a node produces, with real tensors that do not depend on the data of the inputs.

        Raises:
            DataDependentError: they do.
        """
        value = self.of(node)
        return self._real(node, self._constants) if _has_tensor(value) else value

    def example(self, node: fx.Node) -> Any:
        """Return what a node produces when everything before it is really run on the example inputs."""
        return self._real(node, self._examples)

    def _fake(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if str(node.target) not in self.arguments:
                raise DataDependentError(f"the example inputs hold no value for {node.target!r}")
            return self._as_fake(self.arguments[str(node.target)])
        if node.op == "get_attr":
            return self._as_fake(self._attribute(node))
        if info(node).opaque is not None:
            return self._as_fake(tree_map(_hide, self.example(node)))
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: self._fakes[n])
        if any(isinstance(leaf, Unknown) for leaf in tree_leaves(arguments)):
            return tree_map(_hide, self._as_fake(self.example(node)))
        try:
            with self._running(node), self.mode:
                return execute(self.root, node, *arguments)
        except Exception as error:
            try:
                return self._as_fake(self._real(node, self._constants))
            except DataDependentError as reason:
                if isinstance(error, _NEEDS_DATA):
                    raise reason from error
                raise error from None

    def _real(self, node: fx.Node, cache: dict[fx.Node, Any]) -> Any:
        """Run what a node needs. With the cache of constants, inputs must not be read beyond their sizes."""
        for pending in _unknown(node, cache, self._stop if cache is self._constants else None):
            cache[pending] = self._real_node(pending, cache)
        return cache[node]

    def _stop(self, node: fx.Node) -> bool:
        """Whether the fake value of a node says everything."""
        return node in self._fakes and not _has_tensor(self._fakes[node])

    def _real_node(self, node: fx.Node, cache: dict[fx.Node, Any]) -> Any:
        constant = cache is self._constants
        if constant and self._stop(node):
            return self._fakes[node]
        if node.op == "placeholder":
            if constant:
                raise DataDependentError(f"the value depends on the data in the input {str(node.target)!r}")
            return self.arguments[str(node.target)]
        if node.op == "get_attr":
            return self._attribute(node)
        if constant and info(node).opaque is not None:
            raise DataDependentError(f"the value depends on what {node.name!r} computes, which is not traced")
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: cache[n])
        with self._running(node), torch.random.fork_rng(devices=[]):
            return execute(self.root, node, *tree_map(_copied, arguments))

    @contextmanager
    def _running(self, node: fx.Node) -> Iterator[None]:
        module = edit.attribute(self.root, str(node.target)) if node.op == "call_module" else nn.Identity()
        with self.outside(), evaluation(module), torch.no_grad():
            yield

    def _attribute(self, node: fx.Node) -> Any:
        with self.outside():
            return edit.attribute(self.root, str(node.target))

    def _as_fake(self, value: Any) -> Any:
        def convert(leaf: Any) -> Any:
            if isinstance(leaf, fx.Proxy):  # before anything that takes it for a tensor
                raise DataDependentError("the model keeps a value of its forward for later")
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
                return self.mode.from_tensor(leaf.detach())
            return leaf

        return tree_map(convert, value)


def _unknown(node: fx.Node, known: dict[fx.Node, Any], stop: Callable[[fx.Node], bool] | None = None) -> list[fx.Node]:
    """Return the nodes that must be computed for `node`, in order. Nodes where `stop` holds need nothing before them.

    Without recursion: graphs are deeper than Python's stack.
    """
    order: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [(node, False)]
    while stack:
        current, ready = stack.pop()
        if ready:
            order.append(current)
        elif current not in known and current not in seen:
            seen.add(current)
            stack.append((current, True))
            if stop is None or not stop(current):
                stack.extend((source, False) for source in current.all_input_nodes)
    return order


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, (torch.Tensor, Unknown)) for leaf in tree_leaves(value))


def _hide(leaf: Any) -> Any:
    return leaf if isinstance(leaf, torch.Tensor) or leaf is None else Unknown()


def _copied(leaf: Any) -> Any:
    """Nodes may write in place; what the example holds stays as it is."""
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter) else leaf
