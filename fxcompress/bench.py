"""Timing: engines against each other, each in a process of its own, in alternating rounds.

Idle threads of one engine's pool slow the next one down by up to a factor of two, so engines never share a process.
They are measured in turn, round after round, and compared round by round: whatever slows the machine for a while slows
all of them. Figures are medians.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxcompress.emit.compact_module import CompactModule
from fxcompress.errors import FxCompressError, OptionError
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import info
from fxcompress.quant.cpu import processor
from fxcompress.sources import Source, find_model

#: build(model, inputs) -> what is timed, called without arguments. A function at the top of a module, so that another
#: process can find it; `functools.partial` of one carries options.
Builder = Callable[[nn.Module, ExampleInputs], Callable[[], Any]]


@dataclass(frozen=True)
class Workload:
    """What every engine runs: a model as the command line names it, input shapes, batch sizes, threads."""

    model: str
    shapes: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1,)
    threads: int = 0  #: 0: as many as torch chooses
    seed: int = 0


@dataclass
class Timing:
    """One engine at one batch size: seconds of each round, their median, and how well its output fits the first engine.

    ratio: median over the rounds of (seconds of the first engine) / (seconds of this one): above 1 is faster.
    sqnr_db: signal to noise of the output against the first engine's, in dB; None if it is not comparable.
    """

    engine: str
    batch: int
    rounds: list[float] = field(default_factory=list)
    median: float | None = None
    ratio: float | None = None
    sqnr_db: float | None = None
    error: str | None = None


def compare(
    workload: Workload,
    engines: Mapping[str, Builder],
    rounds: int = 5,
    seconds: float = 1.0,
    progress: Callable[[str, int, int | None], None] = lambda description, done, total: None,
) -> list[Timing]:
    """Time engines on one model.

    Args:
        workload: the model and what it is given.
        engines: name -> builder; the first one is what the others are compared with.
        rounds: how often each engine has its turn.
        seconds: how long a turn lasts at each batch size.
        progress: called as progress(description, done, total).

    Returns:
        One timing for each engine and batch size. An engine that fails has its reason in `error`, and no figures.
    """
    if rounds < 1 or not engines:
        raise OptionError("compare needs at least one engine and one round")
    total = len(engines) * (1 + rounds)
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(name, build, workload)) for name, build in engines.items()]
        timings: list[Timing] = []
        outputs: list[list[torch.Tensor | None]] = []
        for index, worker in enumerate(workers):  # one at a time: building is timed by nobody, but takes all cores
            progress(f"preparing {worker.name}", index, total)
            prepared = worker.ask("prepare")
            error = prepared if isinstance(prepared, str) else None
            timings += [Timing(worker.name, batch, error=error) for batch in workload.batches]
            outputs.append([None] * len(workload.batches) if error else prepared)
        for turn in range(rounds):
            for index, worker in enumerate(workers):
                progress(f"timing {worker.name}", len(workers) * (turn + 1) + index, total)
                _take_turn(worker, timings[index * len(workload.batches) :][: len(workload.batches)], seconds)
    _summarise(timings, len(workload.batches), outputs)
    return timings


def _take_turn(worker: _Worker, timings: Sequence[Timing], seconds: float) -> None:
    for timing in timings:
        if timing.error is None:
            found = worker.ask("measure", timing.batch, seconds)
            if isinstance(found, str):
                timing.error = found
            else:
                timing.rounds.append(found)


def _summarise(timings: list[Timing], batches: int, outputs: list[list[torch.Tensor | None]]) -> None:
    for index, timing in enumerate(timings):
        first = timings[index % batches]
        if timing.error is not None or not timing.rounds:
            continue
        timing.median = statistics.median(timing.rounds)
        if first.rounds and len(first.rounds) == len(timing.rounds):
            pairs = zip(first.rounds, timing.rounds, strict=True)
            timing.ratio = statistics.median(reference / own for reference, own in pairs)
        timing.sqnr_db = _sqnr(outputs[0][index % batches], outputs[index // batches][index % batches])


def _sqnr(reference: torch.Tensor | None, output: torch.Tensor | None) -> float | None:
    if reference is None or output is None or reference.shape != output.shape:
        return None
    noise = (reference.double() - output.double()).square().sum()
    decibels = 10 * torch.log10(reference.double().square().sum() / noise)
    return round(decibels.item(), 2) if bool(torch.isfinite(decibels)) else None


# Processes


@dataclass
class _Worker:
    """One engine in its process, asked over a pipe."""

    name: str
    connection: Connection

    def ask(self, *question: Any) -> Any:
        """Return the answer; a text is an error."""
        try:
            self.connection.send(question)
            return self.connection.recv()
        except (EOFError, OSError):
            return "the process of this engine died"


@contextmanager
def _worker(name: str, build: Builder, workload: Workload) -> Iterator[_Worker]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, build, workload), daemon=True)
    process.start()
    there.close()
    try:
        yield _Worker(name, here)
    finally:
        here.close()
        process.join(timeout=5)
        process.terminate()


def _serve(connection: Connection, build: Builder, workload: Workload) -> None:
    """What runs in the process of an engine: prepare, then measure as often as asked."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # engines draw progress bars between our tables
    if workload.threads:
        torch.set_num_threads(workload.threads)
    calls: dict[int, Callable[[], Any]] = {}
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        try:
            if question[0] == "prepare":
                calls.update(_prepare(build, workload))
                connection.send([_first_tensor(call()) for call in calls.values()])
            else:
                connection.send(median_seconds(calls[question[1]], question[2]))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = (str(error).strip().split("\n")[0])[:200]
            connection.send(f"{type(error).__name__}: {reason} (in {Path(where.filename).name}:{where.lineno})")


def _prepare(build: Builder, workload: Workload) -> dict[int, Callable[[], Any]]:
    made = zip(workload.batches, batches_of(workload), strict=True)
    return {batch: build(source.model, source.example_inputs) for batch, source in made}


def batches_of(workload: Workload) -> Iterator[Source]:
    """Yield the model anew for each batch size, with inputs of that size: the same numbers in every process."""
    for batch in workload.batches:
        source = find_model(workload.model, workload.shapes, seed=workload.seed)
        generator = torch.Generator().manual_seed(workload.seed)
        yield replace(source, example_inputs=_with_batch(source.example_inputs, batch, generator))


def _with_batch(inputs: ExampleInputs, batch: int, generator: torch.Generator) -> ExampleInputs:
    """Return inputs of another batch size, the same numbers in every process."""

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dtype.is_floating_point:
            return tensor[:1].expand(batch, *tensor.shape[1:]).contiguous()
        return torch.randn((batch, *tensor.shape[1:]), dtype=tensor.dtype, generator=generator)

    return inputs.map(resize)


#: Samples that engines are calibrated with.
_SAMPLES = 4

#: Of their numbers, so that they are others than those of the inputs that are timed.
_CALIBRATION_SEED = 20_000


def calibration_of(inputs: ExampleInputs) -> list[ExampleInputs]:
    """Return what engines are calibrated with: a few samples, each by itself.

    They are the same for every engine and whatever batch is timed: random numbers for real inputs, the first sample's
    for others.
    """
    generator = torch.Generator().manual_seed(_CALIBRATION_SEED)
    return [_with_batch(inputs, 1, generator) for _ in range(_SAMPLES)]


def in_batches(samples: Sequence[ExampleInputs], batch: int) -> list[ExampleInputs]:
    """Return samples side by side, for engines that are calibrated as they are timed.

    Args:
        samples: of batch size 1. batch: the size of all batches returned; the first samples fill the last one up.
    """
    count = -(-len(samples) // batch)
    chosen = [[samples[(first * batch + index) % len(samples)] for index in range(batch)] for first in range(count)]
    return [ExampleInputs(*tree_map(_joined, *((one.args, one.kwargs) for one in group))) for group in chosen]


def _joined(*leaves: Any) -> Any:
    return torch.cat(leaves) if isinstance(leaves[0], torch.Tensor) else leaves[0]


def batch_size(inputs: ExampleInputs) -> int:
    """Return the size of the first dimension of the first tensor that has one."""
    return next((int(tensor.shape[0]) for tensor in inputs.tensors() if tensor.ndim), 1)


def _first_tensor(output: Any) -> torch.Tensor | None:
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    return tensors[0].detach().clone() if tensors else None


def median_seconds(call: Callable[[], Any], seconds: float = 1.0, least: int = 5) -> float:
    """Return the median time of a call, measured for `seconds` and at least `least` calls, after a warm-up."""
    durations: list[float] = []
    with torch.inference_mode():
        for _ in range(3):
            call()
        end = time.perf_counter() + seconds
        while len(durations) < least or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def layer_seconds(graph_module: fx.GraphModule, *inputs: torch.Tensor, rounds: int = 30) -> dict[str, float]:
    """Return the median seconds of each layer of the caller's model, run node by node.

    Nodes that belong to no layer stand under their own names. Running node by node costs a few microseconds a node,
    which are part of the figures.
    """
    found: dict[str, float] = {}
    for node, seconds in node_seconds(graph_module, inputs, rounds).items():
        layer = info(node).layer or node.name
        found[layer] = found.get(layer, 0.0) + seconds
    return found


def node_seconds(graph_module: fx.GraphModule, inputs: Sequence[Any], rounds: int = 30) -> dict[fx.Node, float]:
    """Return the median seconds of each node of a graph that computes something, run one by one."""
    clock = _Clock(graph_module)
    with torch.inference_mode():
        for _ in range(rounds + 3):
            clock.run(*inputs)
    return {node: statistics.median(durations[3:]) for node, durations in clock.durations.items()}


class _Clock(fx.Interpreter):
    """Runs a graph and keeps the time that each node took."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.durations: dict[fx.Node, list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        output = super().run_node(n)
        if n.op not in ("placeholder", "output", "get_attr"):
            self.durations.setdefault(n, []).append(time.perf_counter() - start)
        return output


# Engines of our own


def eager(model: nn.Module, inputs: ExampleInputs) -> Callable[[], Any]:
    """The model as it is, in the memory format that convolutions like."""
    model, inputs = model.eval().to(memory_format=torch.channels_last), inputs.map(channels_last)
    return functools.partial(inputs.call, model)


def compiled(model: nn.Module, inputs: ExampleInputs, passes: str) -> Callable[[], Any]:
    """The model compiled by fxcompress; calibrated, where it is asked for, as all engines are."""
    compact = compact_of(Source("", model, inputs), passes)
    return functools.partial(inputs.map(channels_last).call, compact)


def compact_of(source: Source, passes: str | None) -> CompactModule:
    """Return a model compiled with these passes, calibrated as all engines are; None for one that is compiled."""
    from fxcompress.api import compile as compile_model

    model, inputs = source.model, source.example_inputs
    if passes is None:
        assert isinstance(model, CompactModule)  # for the type checker
        return model
    data = [sample.kwargs or sample.args for sample in calibration_of(inputs)]
    return compile_model(model, passes, inputs, verify=False, calibration=data)


def with_torch_compile(
    model: nn.Module, inputs: ExampleInputs, dtype: torch.dtype = torch.float32
) -> Callable[[], Any]:
    """The model compiled by torch.compile, with all real numbers of a type."""
    model = model.eval().to(dtype).to(memory_format=torch.channels_last)
    inputs = inputs.map(lambda tensor: channels_last(tensor.to(dtype) if tensor.is_floating_point() else tensor))
    return functools.partial(inputs.call, torch.compile(model))


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """Return images in channels-last memory, other tensors as they are."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


# Results


def result(workload: Workload, timings: Sequence[Timing]) -> dict[str, Any]:
    """Return one model's timings as plain data."""
    return {"workload": asdict(workload), "timings": [asdict(timing) for timing in timings]}


def document(results: Any) -> dict[str, Any]:
    """Return results with what made them: the command, the machine and the versions."""
    return {"command": command(), "machine": machine(), "versions": versions(), "results": results}


def command() -> str:
    """Return the command line that runs now, as it would be typed in the folder where it runs."""
    program = Path(sys.argv[0]).resolve()
    inside = program.is_relative_to(Path.cwd())
    name = f"python {program.relative_to(Path.cwd())}" if inside and program.suffix == ".py" else program.name
    if program.name == "__main__.py":
        name = "fxcompress"
    return shlex.join([*name.split(), *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """Return what is known of this machine: processor, cores, what its vector units can do, memory."""
    return {
        "processor": processor(),
        "cores": multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what took part."""
    import fxcompress

    return {"python": platform.python_version(), "torch": torch.__version__, "fxcompress": fxcompress.__version__}


def write_json(path: Path, results: Any) -> None:
    """Write results as JSON, with the command, the machine and the versions."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document(results), indent=1) + "\n")
    except OSError as error:
        raise FxCompressError(f"cannot write {str(path)!r}: {error}") from error
