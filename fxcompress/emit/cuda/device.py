"""What GPU there is, and whether kernels run.

`FXCOMPRESS_CUDA` overrides what is found: `off` (no kernels: everything by PyTorch's operators), `interpret` (kernels
on CPU tensors, by Triton's interpreter, which needs `TRITON_INTERPRET=1` in the environment before Triton is imported).
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from fxcompress.errors import OptionError, UnsupportedError

VARIABLE = "FXCOMPRESS_CUDA"

#: The oldest GPUs whose matrix units the kernels are written for: Ampere.
OLDEST = (8, 0)

#: The oldest GPUs with 8-bit floating point: Ada and Hopper.
OLDEST_FP8 = (8, 9)


def _wanted() -> str:
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "off", "interpret"):
        raise OptionError(f"{VARIABLE} must be 'off' or 'interpret', not {value!r}")
    return value


def unavailable() -> str | None:
    """Return why nothing can be compiled for a GPU on this machine; None if it can."""
    if _wanted() == "interpret":
        return None
    if not torch.backends.cuda.is_built():
        return "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU (torch.cuda.is_available() is False)"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch's CUDA wheels for Linux)"
    return None


def require() -> None:
    """Raise `UnsupportedError` where there is no GPU to compile for."""
    reason = unavailable()
    if reason is not None:
        raise UnsupportedError(
            f"target 'cuda' cannot be compiled for here: {reason}. Compile on the machine with the GPU, where kernels "
            f"are chosen by measuring, or use target='cpu'. A file that was compiled for 'cuda' can be loaded anywhere"
        )


def home() -> torch.device:
    """Return the device that modules are compiled for."""
    return torch.device("cpu") if _wanted() == "interpret" else torch.device("cuda", torch.cuda.current_device())


def runs_kernels(x: torch.Tensor) -> bool:
    """Whether kernels take a tensor: a real one on a GPU, or any on the CPU where the interpreter was asked for."""
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return False
    wanted = _wanted()
    if x.device.type == "cuda":
        return wanted != "off" and _supported(x.device.index or 0)
    return wanted == "interpret" and x.device.type == "cpu"


@functools.cache
def _supported(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= OLDEST and importlib.util.find_spec("triton") is not None


def has_fp8(x: torch.Tensor) -> bool:
    """Whether the device of a tensor multiplies 8-bit floating point numbers."""
    return x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= OLDEST_FP8


def processors(x: torch.Tensor) -> int:
    """Return the number of multiprocessors of a tensor's device."""
    return _processors(x.device.index or 0) if x.device.type == "cuda" else 132


def shared_memory(x: torch.Tensor) -> int:
    """Return how many bytes the programs of one multiprocessor can share, with some left for what compilers add."""
    return _shared_memory(x.device.index or 0) - 6_000 if x.device.type == "cuda" else 220_000


@functools.cache
def _shared_memory(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    return int(getattr(properties, "shared_memory_per_block_optin", 101_376))


@functools.cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
