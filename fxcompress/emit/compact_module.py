"""`CompactModule`: what the compiler returns, a `torch.fx.GraphModule` that carries its report and can be saved."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._compile import _disable_dynamo

from fxcompress.emit.cpu_numbers import Kernel, has_kernels
from fxcompress.emit.cuda.graphs import Replays
from fxcompress.emit.grid_state import NumbersInState, numbers_of_graph, take_numbers_of_graph
from fxcompress.emit.input_errors import FAILURES, explain
from fxcompress.emit.native.executor import Cache, Unplannable
from fxcompress.errors import OptionError
from fxcompress.graph import ops
from fxcompress.graph.metadata import NodeInfo, info, set_info

if TYPE_CHECKING:
    from fxcompress.report import Report

EXECUTORS = ("auto", "graph")


class CompactModule(NumbersInState, fx.GraphModule):
    """A compiled model. It is called as the model was, trains and moves like any module, and its code can be read.

    A lowered graph is run by our own kernels where there are some (see `emit.native`), without Python between them; one
    for GPUs is recorded and replayed (see `emit.cuda.graphs`). The graph stays what it is, to be read, saved and run
    node by node.

    Attributes:
        report: what every pass did, and what was left alone and why; None for a module made by hand.
        executor: "auto", or "graph" to have the graph run node by node. Tensors that are changed in place afterwards,
            other than by `load_state_dict`, need `repack()`.

    Args:
        root: a module that holds the layers, parameters and buffers that the graph names.
        graph: the graph to run.
        report: the compiler's report.
        class_name: shown when the module is printed.
    """

    report: Report | None
    _executor = "auto"

    def __init__(
        self, root: nn.Module, graph: fx.Graph, report: Report | None = None, class_name: str = "CompactModule"
    ) -> None:
        super().__init__(root, graph, class_name)
        self.report = report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
            InputError: the graph is a lowered one, and failed on inputs unlike those that it was compiled with.
        """
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting() and has_kernels(self):
            return self._call_uncompiled(*args, **kwargs)
        try:
            return super().__call__(*args, **kwargs)
        except FAILURES as error:
            reason = explain(self, args, kwargs, error)
            if reason is None:
                raise
            raise reason from error

    @_disable_dynamo  # torch.compiler.disable would load the compiler for everybody
    def _call_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        """Run 8-bit kernels as they are: torch.compile has nothing to add to them, and cannot follow them."""
        return self(*args, **kwargs)

    @property
    def executor(self) -> str:
        """How a lowered graph is run: "auto" or "graph"."""
        return self._executor

    @executor.setter
    def executor(self, value: str) -> None:
        check_executor(value)
        self._executor = value

    def recompile(self) -> Any:
        """Generate the code anew, and put the kernels in front of it."""
        code = super().recompile()
        run_graph = type(self).forward
        self._forget_plans()

        @functools.wraps(run_graph)
        def forward(self: CompactModule, *arguments: Any, **keywords: Any) -> Any:
            if self._replays.takes(self):
                return self._replays.run(self, run_graph, arguments, keywords)
            native = self._native.executor(self, (*arguments, *keywords.values()))
            if native is not None:
                with contextlib.suppress(Unplannable):
                    return native(*arguments, **keywords)
            return run_graph(self, *arguments, **keywords)

        type(self).forward = forward  # fx gives every instance a class of its own
        return code

    def _forget_plans(self) -> None:
        self._native, self._replays = Cache(), Replays()

    def repack(self) -> None:
        """Forget what was derived from the tensors. To be called after changing them in place."""
        self._forget_plans()
        for module in self.modules():
            if isinstance(module, Kernel):
                module.repack()

    def train(self, mode: bool = True) -> CompactModule:
        """As in `nn.Module`."""
        self._forget_plans()
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._forget_plans()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in `nn.Module`."""
        self._forget_plans()
        return super().load_state_dict(*args, **kwargs)

    def state_numbers(self) -> dict[str, list[float]]:
        """Return the numbers of grids that are written in the graph; a float graph has none."""
        return numbers_of_graph(self)

    def take_state_numbers(self, numbers: dict[str, list[float]]) -> None:
        """Write other numbers into the graph."""
        if take_numbers_of_graph(self, numbers):
            self.recompile()

    @classmethod
    def of(cls, graph_module: fx.GraphModule, report: Report | None = None, executor: str = "auto") -> CompactModule:
        """Return `graph_module` as a `CompactModule`: the same layers and tensors, no copy of them.

        The class is named after the model: a compiled `ResNet` prints as `CompactResNet`. Type annotations of the
        model's forward are dropped from the generated code: fx writes them under names of its own.
        """
        name = report.model if report is not None else type(graph_module).__name__
        name = name.removeprefix("Compact").removesuffix("GraphModule")
        for node in graph_module.graph.nodes:
            node.type = None
        compact = cls(graph_module, graph_module.graph, report, f"Compact{name or 'Module'}")
        copy_modes(graph_module, compact)
        compact.meta = graph_module.meta
        compact.executor = executor
        return compact

    def save(
        self,
        path: str | Path,
        *,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        modules: Mapping[str, type[nn.Module]] | None = None,
    ) -> None:
        """Write the module to one file that `fxcompress.load` reads without the model's class.

        The file is replaced as a whole or not at all. Of several processes only the first one writes.

        Args:
            path: the file, usually named `*.fxc`.
            functions: functions of your own that the graph calls, by the name that the file shall use.
            modules: layer classes of your own, with `config()` and `from_config()`, by the name for the file.

        Raises:
            ArtifactError: the graph holds something that can be rebuilt only by running code, or writing failed.
        """
        from fxcompress.emit.artifact import save

        size = save(self, path, functions=functions, modules=modules)
        if self.report is not None and size:
            self.report = replace(self.report, file_bytes=size)

    def export_onnx(self, path: str | Path, example_inputs: object = None) -> None:
        """Write the module as an ONNX file, see `fxcompress.emit.onnx.export_onnx`."""
        from fxcompress.emit.onnx import export_onnx

        export_onnx(self, path, example_inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompactModule:
        duplicate = super().__deepcopy__(memo)
        assert isinstance(duplicate, CompactModule)  # for the type checker: torch makes it from type(self)
        type(duplicate).__name__ = type(self).__name__
        copy_modes(self, duplicate)
        duplicate._executor = self._executor
        duplicate.report = copy.deepcopy(self.report, memo)
        return duplicate

    def __copy__(self) -> CompactModule:
        duplicate = CompactModule(self, copy.deepcopy(self.graph), self.report, type(self).__name__)
        copy_modes(self, duplicate)
        duplicate.meta = self.meta
        duplicate._executor = self._executor
        return duplicate

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the graph itself; torch would pickle its source and trace that again, without names and metadata."""
        children = nn.Module()
        children.__dict__.update(
            {name: self.__dict__[name] for name in ("_modules", "_parameters", "_buffers", "training")},
            _non_persistent_buffers_set=self._non_persistent_buffers_set,
        )
        nodes = [_Record.of(node) for node in self.graph.nodes]
        return _unpickle, (children, nodes, self.meta, self.report, type(self).__name__, self._executor)


def check_executor(value: str) -> None:
    """Raise `OptionError` unless `value` is one of the ways to run a lowered graph."""
    if value not in EXECUTORS:
        raise OptionError(f"executor must be one of {', '.join(map(repr, EXECUTORS))}, not {value!r}")


def copy_modes(source: nn.Module, destination: nn.Module) -> None:
    """Put every module of `destination` into the train or eval mode of the one at the same path of `source`."""
    modes = {path: module.training for path, module in source.named_modules(remove_duplicate=False)}
    for path, module in destination.named_modules(remove_duplicate=False):
        module.training = modes.get(path, module.training)


@dataclass(frozen=True)
class _Reference:
    """Stands for a node, or a function of the operator table, in a pickle."""

    name: str


@dataclass(frozen=True)
class _Record:
    """One node in a pickle."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    type: Any
    info: NodeInfo

    @classmethod
    def of(cls, node: fx.Node) -> _Record:
        target: Any = node.target
        if callable(target) and target in ops.BY_FUNCTION:  # not all of torch's own functions can be pickled
            target = _Reference(ops.function_name(target))
        refer: Any = lambda other: _Reference(other.name)  # noqa: E731 - the stub of map_arg knows nodes only
        args, kwargs = fx.map_arg((node.args, node.kwargs), refer)
        return cls(node.op, node.name, target, args, kwargs, node.type, info(node))


def _unpickle(
    children: nn.Module,
    records: list[_Record],
    meta: dict[str, Any],
    report: Report | None,
    class_name: str,
    executor: str,
) -> CompactModule:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        if isinstance(value, _Reference):
            return nodes[value.name]
        if isinstance(value, tuple):
            return type(value)(*map(resolve, value)) if hasattr(value, "_fields") else tuple(map(resolve, value))
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if isinstance(value, dict):
            return {name: resolve(item) for name, item in value.items()}
        if isinstance(value, slice):
            return slice(resolve(value.start), resolve(value.stop), resolve(value.step))
        return value

    for record in records:
        target = record.target
        if isinstance(target, _Reference):
            target = ops.known_functions()[target.name]
        args, kwargs = resolve(record.args), resolve(record.kwargs)
        node = graph.create_node(record.op, target, args, kwargs, name=record.name, type_expr=record.type)
        set_info(node, **{field.name: getattr(record.info, field.name) for field in fields(NodeInfo)})
        nodes[record.name] = node
    compact = CompactModule(children, graph, report, class_name)
    copy_modes(children, compact)
    compact.meta = meta
    compact.executor = executor
    return compact
