"""Replays: a lowered graph is recorded once for each combination of input shapes, and replayed without Python.

The first call with a combination runs node by node, and lets layers choose how they compute; the second one records a
CUDA graph. What cannot be recorded (code that looks at numbers, for example) runs node by node ever after. Inputs are
copied into memory of the recording, results are copied out of it, so that neither is overwritten by the next call.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fxcompress.emit.cpu_numbers import Kernel
from fxcompress.emit.cuda import tuning
from fxcompress.emit.cuda.launch import has_no_gaps, kept

_log = logging.getLogger(__name__)

#: How kernels of CPUs and GPUs are told apart.
_PLACE = "fxcompress.emit.cuda"


class Recorder(Protocol):
    """Records what a device is told to do."""

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Call `run`, and return what does the same again, and the result whose memory is written each time."""

    def before(self) -> Any:
        """Wait, on the device, for the replay before this one, which may have been on another stream."""

    def after(self) -> None:
        """Note the end of a replay."""


class CudaRecorder:
    """Records CUDA graphs, which share their memory: they run one at a time."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.end: torch.cuda.Event | None = None
        self.stream: Any = None

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record a CUDA graph.

        Raises:
            RuntimeError: something in it cannot be recorded.
        """
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result

    def before(self) -> None:
        """Let the current stream wait for the last replay, if that was on another one."""
        if self.end is not None and self.stream != torch.cuda.current_stream():
            torch.cuda.current_stream().wait_event(self.end)

    def after(self) -> None:
        """Note the end of a replay on the current stream."""
        self.stream = torch.cuda.current_stream()
        self.end = torch.cuda.Event()
        self.end.record(self.stream)


class Replays:
    """The recordings of one graph module; never copied and never pickled.

    Args:
        recorder: what records; None: CUDA graphs.
    """

    #: Recordings kept, for the latest combinations of shapes.
    limit = 16

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder: Recorder = recorder or CudaRecorder()
        self.recordings: dict[Any, Recording | None] = {}  # None: seen once
        self.refused: dict[Any, str] = {}  # combinations that cannot be recorded, with the reason
        self.known: bool | None = None  # whether there are kernels for GPUs
        self.layers: list[nn.Module] = []
        self.lock = threading.Lock()

    def run(
        self, graph_module: Any, run_graph: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        """Run a graph module on its device, replaying where that is possible.

        Args:
            graph_module: a graph that was lowered for a GPU. run_graph: runs it node by node.
            arguments, keywords: inputs, which may be on another device.
        """
        leaves, structure = tree_flatten((arguments, keywords))
        home = self.home(graph_module)
        if not self._replayable(graph_module, leaves, home):
            arguments, keywords = tree_unflatten([_placed(leaf, home) for leaf in leaves], structure)
            return run_graph(graph_module, *arguments, **keywords)
        key = (structure, home, *map(_signature, leaves))
        with self.lock, torch.no_grad():
            recording = self.recordings.get(key)
            if recording is None and key in self.recordings:
                recording = self._record(key, graph_module, run_graph, leaves, structure, home)
            if recording is not None:
                return recording.replay(leaves)
            if key not in self.refused:
                self._make_room()
                self.recordings[key] = None
        arguments, keywords = tree_unflatten([_placed(leaf, home) for leaf in leaves], structure)
        result = run_graph(graph_module, *arguments, **keywords)
        tuning.save()
        return result

    def takes(self, graph_module: fx.GraphModule) -> bool:
        """Whether a graph has kernels for GPUs."""
        if self.known is None:
            self.known = any(is_for_gpus(module) for module in graph_module.modules())
            self.layers = [module for name, module in graph_module.named_modules() if name]
        return self.known

    def home(self, graph_module: fx.GraphModule) -> torch.device:
        """Return the device that a graph's tensors are on."""
        for tensor in itertools.chain(graph_module.buffers(), graph_module.parameters()):
            return tensor.device
        return torch.device("cpu")

    def _replayable(self, graph_module: Any, leaves: list[Any], home: torch.device) -> bool:
        if graph_module.executor != "auto" or graph_module.training or not self._on_device(home):
            return False
        for leaf in leaves:
            if isinstance(leaf, fx.Proxy) or not (leaf is None or isinstance(leaf, (torch.Tensor, int, float, str))):
                return False
            if isinstance(leaf, torch.Tensor) and (
                type(leaf) is not torch.Tensor or leaf.requires_grad or leaf.layout != torch.strided
            ):
                return False
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return False
        return not any(layer._forward_hooks or layer._forward_pre_hooks for layer in self.layers)

    def _on_device(self, home: torch.device) -> bool:
        if not isinstance(self.recorder, CudaRecorder):
            return True
        return home.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    def _record(
        self, key: Any, graph_module: Any, run_graph: Callable[..., Any], leaves: list[Any], structure: Any,
        home: torch.device,
    ) -> Recording | None:  # fmt: skip
        try:
            recording = Recording(self.recorder, graph_module, run_graph, leaves, structure, home)
        except Exception as error:  # whatever a recording meets: the graph itself still runs
            self.recordings.pop(key, None)
            if len(self.refused) < 1000:
                self.refused[key] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            _log.info("the graph is run node by node for these shapes: %s", error)
            return None
        self.recordings[key] = recording
        return recording

    def _make_room(self) -> None:
        while len(self.recordings) >= self.limit:
            oldest = self.recordings.pop(next(iter(self.recordings)))
            if oldest is not None and torch.cuda.is_available():
                torch.cuda.synchronize()  # it may be running

    def __deepcopy__(self, memo: dict[int, Any]) -> Replays:
        return Replays()

    def __reduce__(self) -> tuple[Any, ...]:
        return Replays, ()


class Recording:
    """A graph for inputs of some shapes, with memory for its inputs and results."""

    def __init__(
        self, recorder: Recorder, graph_module: Any, run_graph: Callable[..., Any], leaves: list[Any], structure: Any,
        home: torch.device,
    ) -> None:  # fmt: skip
        self.recorder = recorder
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [_own_memory(leaf, home) for leaf in leaves]
            arguments, keywords = tree_unflatten(self.inputs, structure)
            with kept() as self.held:
                self.again, self.result = recorder.record(lambda: run_graph(graph_module, *arguments, **keywords))

    def replay(self, leaves: list[Any]) -> Any:
        """Return a copy of the result for inputs of the same shapes."""
        self.recorder.before()
        for own, given in zip(self.inputs, leaves, strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(given)
        self.again()
        result = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, self.result)
        self.recorder.after()
        return result


def is_for_gpus(module: nn.Module) -> bool:
    """Whether a module is a kernel for GPUs."""
    return isinstance(module, Kernel) and type(module).__module__.startswith(_PLACE)


def _own_memory(leaf: Any, home: torch.device) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    memory = torch.empty(leaf.shape, dtype=leaf.dtype, device=home)
    if has_no_gaps(leaf):
        memory = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=home)
    return memory.copy_(leaf)


def _placed(leaf: Any, home: torch.device) -> Any:
    """An input on the device of the module."""
    if isinstance(leaf, torch.Tensor) and type(leaf) is torch.Tensor and leaf.device != home and home.type == "cuda":
        return leaf.to(home)
    return leaf


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return type(value), value
