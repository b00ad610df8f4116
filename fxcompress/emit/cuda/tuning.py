"""Choosing by measuring: which of several ways to compute the same thing is the fastest on this device.

Choices are kept in a file in the user's cache (`$XDG_CACHE_HOME/fxcompress`), one for each kind of GPU and each pair of
versions of PyTorch and Triton, so that a shape is measured once. Where there is nothing to measure on, the first way is
taken. `FXCOMPRESS_CUDA_TUNE=off` asks for that everywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxcompress.emit.cuda import launch

VARIABLE = "FXCOMPRESS_CUDA_TUNE"

#: Choices kept in a file; the oldest go first.
LIMIT = 20_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Way:
    """One way to compute something.

    name: stable, for the file. run: computes it. prepare: what can be done beforehand by another thread, or None.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Choice:
    """The way that was chosen, its time in microseconds (None: not measured), and the time of each way measured."""

    name: str
    microseconds: float | None = None
    times: tuple[tuple[str, float], ...] = ()


class Choices:
    """What has been chosen, by key, in memory and in a file.

    Args:
        path: the file; None: choices are forgotten with the process.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, Choice] = {}
        self._fresh: dict[str, Choice] = {}
        self._lock = threading.RLock()
        if path is not None:
            self.known.update(_read(path))

    def find(self, key: str, ways: Callable[[], Sequence[Way]], measure: bool) -> Choice:
        """Return the choice for a key, made now if there is none.

        Args:
            key: says everything that the times depend on.
            ways: returns the ways, the default first; called only if they are needed.
            measure: whether ways can be timed here; if not, the first is returned and nothing is remembered.
        """
        with self._lock:
            found = self.known.get(key)
        if found is not None:
            return found
        listed = ways()
        if not measure or len(listed) == 1:
            return Choice(listed[0].name)
        found = fastest(listed)
        with self._lock:
            self.known[key] = self._fresh[key] = found
        return found

    def save(self) -> None:
        """Write what is new to the file, beside what others have written in the meantime."""
        with self._lock:
            fresh, self._fresh = self._fresh, {}
        if self.path is None or not fresh:
            return
        merged = {**_read(self.path), **fresh}
        kept = dict(list(merged.items())[-LIMIT:])
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                json.dump({key: [one.name, one.microseconds, one.times] for key, one in kept.items()}, file)
            os.replace(file.name, self.path)


def _read(path: Path) -> dict[str, Choice]:
    """Return what a file holds; nothing if it is not there, or not what it should be."""
    try:
        held = json.loads(path.read_text())
        return {str(key): _choice(*described) for key, described in held.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _choice(name: Any, time: Any, times: Any) -> Choice:
    return Choice(str(name), None if time is None else float(time), tuple((str(a), float(b)) for a, b in times))


def fastest(ways: Sequence[Way]) -> Choice:
    """Time all ways, and return the fastest. A way that fails is passed over.

    Raises:
        RuntimeError: all of them fail; the first reason is chained.
    """
    _prepare(ways)
    times: list[tuple[str, float]] = []
    failure: Exception | None = None
    for way in ways:
        try:
            times.append((way.name, device_microseconds(way.run)))
        except Exception as error:  # no room for the tile, or a library without a kernel for the shape
            _log.debug("%s failed: %s", way.name, error)
            failure = failure or error
    if not times:
        raise RuntimeError(f"no way to compute this works: {failure}") from failure
    times.sort(key=lambda item: item[1])
    return Choice(*times[0], tuple(times))


def _prepare(ways: Sequence[Way]) -> None:
    """Compile kernels side by side: most of the time of a compilation is spent outside of Python."""
    tasks = [way.prepare for way in ways if way.prepare is not None]
    threads = min(8, os.cpu_count() or 1, len(tasks))
    if threads < 2:
        return
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(task) for task in tasks]:
            try:
                future.result()
            except Exception as error:  # it fails again, and is passed over, when it is timed
                _log.debug("a kernel did not compile: %s", error)


def device_microseconds(run: Callable[[], Any], rounds: int = 5) -> float:
    """Return the time of a computation on the GPU, in microseconds: the median of a few rounds.

    What is short is recorded several times in a CUDA graph, so that Python is not measured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        once = begin.elapsed_time(end)  # ms, with the time that Python takes
        calls = 2 if once > _LONG else 10
        again = run if once > _LONG else _recorded(run, calls)
        again()
        durations: list[float] = []
        for _ in range(rounds):
            begin.record(stream)
            for _ in range(calls if once > _LONG else 1):
                again()
            end.record(stream)
            end.synchronize()
            durations.append(begin.elapsed_time(end))
    torch.cuda.current_stream().wait_stream(stream)
    return float(1e3 * statistics.median(durations) / calls)


#: Milliseconds from which a computation is timed without a graph.
_LONG = 0.4


def _recorded(run: Callable[[], Any], calls: int) -> Callable[[], None]:
    """Record a computation several times, on the current stream."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        for _ in range(calls):
            run()
    finally:
        graph.capture_end()
    return graph.replay


def measures(x: torch.Tensor) -> bool:
    """Whether ways to compute something with a tensor can be timed: on a GPU, unless a graph is recorded just now."""
    if x.device.type != "cuda" or os.environ.get(VARIABLE) == "off":
        return False
    return not torch.cuda.is_current_stream_capturing()


_open: dict[str, Choices] = {}


def choices(x: torch.Tensor) -> Choices:
    """Return what has been chosen for the device of a tensor."""
    name = torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else "cpu"
    if name not in _open:
        path = None
        if x.device.type == "cuda":
            ingredients = (name, torch.__version__, _triton_version(), launch.REVISION)
            digest = hashlib.sha256("\n".join(ingredients).encode()).hexdigest()[:16]
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxcompress"
            path = folder / f"cuda-{digest}.json"
        _open[name] = Choices(path)
    return _open[name]


def save() -> None:
    """Write what has been chosen to the files."""
    for held in _open.values():
        held.save()


def _triton_version() -> str:
    import triton

    return str(triton.__version__)
