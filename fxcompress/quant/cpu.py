"""What the CPU at hand can do in 8-bit arithmetic.

`FXCOMPRESS_CPU` overrides what is found, for tests and for compiling on one machine for another:
`vnni` (full range), `avx2` (kernels, but reduced range), `plain` (no kernels at all).
"""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from fxcompress.errors import OptionError

VARIABLE = "FXCOMPRESS_CPU"

#: Instruction sets that oneDNN can be limited to, by its own environment variable, and that have no VNNI.
_WITHOUT_VNNI = frozenset({"SSE41", "AVX", "AVX2", "AVX512_CORE"})

#: The operators that the int8 modules call.
_OPERATORS = (
    "qconv_prepack", "qconv1d_pointwise", "qconv2d_pointwise", "qconv3d_pointwise", "qlinear_prepack",
    "qlinear_pointwise", "qadd",
)  # fmt: skip


@dataclass(frozen=True)
class CpuFeatures:
    """What 8-bit arithmetic can count on.

    kernels: whether PyTorch brings oneDNN's 8-bit operators.
    vnni: whether products of 8-bit numbers are summed without saturation. If not, weights must stay within
        `spec.REDUCED_WEIGHT_LIMIT`.
    """

    kernels: bool
    vnni: bool


_FORCED = {"vnni": CpuFeatures(True, True), "avx2": CpuFeatures(True, False), "plain": CpuFeatures(False, False)}


def cpu_features() -> CpuFeatures:
    """Return the features of this machine, or those that `FXCOMPRESS_CPU` asks for.

    Raises:
        OptionError: the variable has an unknown value.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in _FORCED:
        raise OptionError(f"{VARIABLE} must be one of {', '.join(_FORCED)}, not {wanted!r}")
    found = CpuFeatures(_has_kernels(), _has_vnni())
    if not wanted:
        return found
    forced = _FORCED[wanted]
    return CpuFeatures(forced.kernels and found.kernels, forced.vnni)


@functools.cache
def processor() -> str:
    """Return the name of the processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _has_kernels() -> bool:
    intel_like = platform.machine().lower() in ("x86_64", "amd64")
    return (
        intel_like
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.onednn, name) for name in _OPERATORS)
    )


def _has_vnni() -> bool:
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    if limit.upper() in _WITHOUT_VNNI:
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))
