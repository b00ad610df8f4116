"""When tracing fails: which function or submodule to keep whole, so that everything around it can still be traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, TracebackType
from typing import Any

from torch import nn

from fxcompress.graph.examples import DataDependentError
from fxcompress.graph.specialise import Place, is_own_code
from fxcompress.graph.tracer import Kept, UnregisteredModuleError

#: After so many failures in modules of one class, all modules of the class are kept: they share their code.
_FAILURES_PER_CLASS = 2


def keep_culprit(error: Exception, root: nn.Module, kept: Kept) -> bool:
    """Add to `kept` the innermost function or submodule around the line that stopped the tracer.

    A function at the top level of a file is kept as a call of that function; otherwise the submodule whose method it
    was. A module that looks at its mode and was not given all of its inputs does something else in training, when it
    gets them: such a module is kept around whatever fails in it. Returns False when the line is in the forward of the
    root itself, or in nothing that is not kept already.
    """
    paths = {id(module): path for path, module in root.named_modules()}
    reason = reason_of(error)
    frames = [frame for frame, _ in _frames(error.__traceback__)]
    for frame in frames:
        path = paths.get(id(_module_of(frame)))
        if path is not None and _decides_by_mode(frame):
            if path:
                _keep_modules(root, path, kept, reason)
            return bool(path)
    for frame in reversed(frames):
        path = paths.get(id(_module_of(frame)), "")
        if path:
            if path not in kept.modules:
                _keep_modules(root, path, kept, reason)
                return True
        elif is_own_code(frame.f_code.co_filename) and _keep_function(frame, frames, kept, reason):
            return True
    return False


def reason_of(error: BaseException) -> str:
    """Return why tracing stopped, with file and line."""
    place = place_of_error(error)
    where = f"at {place}" if place else "(no line of the model's own code is involved)"
    if isinstance(error, DataDependentError):
        return f"control flow {where}"
    if isinstance(error, UnregisteredModuleError):
        return f"{error}, {where}"
    return f"{type(error).__name__} {where}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def place_of_error(error: BaseException) -> Place | None:
    """Return the innermost line of the model's own code in a traceback."""
    own = [
        Place(frame.f_code.co_filename, line)
        for frame, line in _frames(error.__traceback__)
        if is_own_code(frame.f_code.co_filename)
    ]
    return own[-1] if own else None


def _frames(trace: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _module_of(frame: FrameType) -> nn.Module | None:
    """Return the module whose method a frame runs."""
    names = frame.f_code.co_varnames
    first = frame.f_locals.get(names[0]) if frame.f_code.co_argcount else None
    return first if isinstance(first, nn.Module) else None


def _decides_by_mode(frame: FrameType) -> bool:
    """Whether a frame is a forward that reads `self.training` and has an input that was left out (None)."""
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return "training" in code.co_names and any(frame.f_locals.get(name, frame) is None for name in names)


def _keep_modules(root: nn.Module, path: str, kept: Kept, reason: str) -> None:
    kept.modules[path] = reason
    kind = type(root.get_submodule(path))
    same = [other for other, module in root.named_modules() if type(module) is kind and other]
    if sum(other in kept.modules for other in same) >= _FAILURES_PER_CLASS:
        for other in same:
            kept.modules.setdefault(other, f"as {path}: {reason}")


def _keep_function(frame: FrameType, frames: list[FrameType], kept: Kept, reason: str) -> bool:
    function = _top_level_function(frame)
    if function is None or kept.reason(function) is not None:
        return False
    arguments = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
    if any(isinstance(frame.f_locals.get(name), nn.Module) for name in arguments):
        return False  # its parameters would be out of sight
    for names in {id(each.f_globals): each.f_globals for each in frames}.values():
        for name in [name for name, value in names.items() if value is function]:
            kept.functions[id(names), name] = (names, function, reason)
    return True


def _top_level_function(frame: FrameType) -> Callable[..., Any] | None:
    """Return the function that a frame runs, if it can be found under its name in its file, decorated or not."""
    found = frame.f_globals.get(frame.f_code.co_name)
    return found if inspect.isfunction(found) and _code(found) is frame.f_code else None


def _code(function: Callable[..., Any]) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None)
