"""The kernels' library: built from `kernels.cpp` by the machine's C++ compiler at the first use, and kept.

The file lies in the user's cache (`$XDG_CACHE_HOME/fxcompress`), under a name made of the source, the compiler and the
processor, so that it is built once for each of them; where the cache cannot be written, once for each process. Without
a compiler, or on a processor without AVX-512 VNNI, there is no library, and lowered graphs run node by node.
`FXCOMPRESS_NATIVE=off` asks for that; `CXX` names a compiler.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from fxcompress.emit.native import steps
from fxcompress.quant.cpu import VARIABLE as CPU_VARIABLE

VARIABLE = "FXCOMPRESS_NATIVE"

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared")
_NEEDED = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni")


class Library:
    """The loaded kernels."""

    def __init__(self, path: str) -> None:
        functions = ctypes.CDLL(path)
        functions.fxc_size.restype = ctypes.c_int64
        functions.fxc_size.argtypes = (ctypes.c_int64,)
        for kind in steps.KINDS:
            if functions.fxc_size(kind.number) != ctypes.sizeof(kind):
                raise OSError(f"{path} has another layout of {kind.__name__}")
        self.path = path
        self.run = functions.fxc_run
        self.run.restype = None
        self.run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
        self.run_each = functions.fxc_run_each
        self.run_each.restype = None
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        self.run_each.argtypes = (pointer, number, pointer, number, number, pointer, pointer, pointer, number)


def library() -> Library | None:
    """Return the kernels, built if need be, or None where they cannot be had; `unavailable` says why."""
    return None if _unwanted() else _built()[0]


def unavailable() -> str | None:
    """Return why there are no kernels; None if there are."""
    return _unwanted() or _built()[1]


def _unwanted() -> str | None:
    if os.environ.get(VARIABLE) == "off":
        return f"{VARIABLE}=off"
    forced = os.environ.get(CPU_VARIABLE, "")
    return f"{CPU_VARIABLE}={forced}" if forced not in ("", "vnni") else None


@functools.cache
def _built() -> tuple[Library | None, str | None]:
    capabilities = torch.cpu.get_capabilities()
    missing = [name for name in _NEEDED if not capabilities.get(name)]
    if missing:
        return None, f"the processor lacks {', '.join(missing)}"
    compiler = _compiler()
    if compiler is None:
        return None, "no C++ compiler was found (c++, g++ or clang++; or set CXX)"
    try:
        return Library(str(_file(compiler))), None
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", "") or str(error)
        return None, f"{compiler[0]} could not build them: {output.strip().splitlines()[-1] if output else error}"


def _compiler() -> list[str] | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((shlex.split(name) for name in names if shutil.which(shlex.split(name)[0])), None)


def _file(compiler: list[str]) -> Path:
    """Return the library's file, built where there is none."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    ingredients = (_SOURCE.read_text(), version, " ".join(_FLAGS), repr(sorted(torch.cpu.get_capabilities().items())))
    digest = hashlib.sha256("\n".join(ingredients).encode()).hexdigest()[:20]
    with contextlib.suppress(OSError):
        return _in_folder(_cache(), compiler, digest)
    folder = tempfile.mkdtemp(prefix="fxcompress-")  # of this process alone: nobody else can put a library there
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return _in_folder(Path(folder), compiler, digest)


def _in_folder(folder: Path, compiler: list[str], digest: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"kernels-{digest}.so"
    if not path.exists():
        _build(compiler, path)
    return path


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxcompress"


def _build(compiler: list[str], path: Path) -> None:
    """Build under a name of its own, then rename: processes that build at the same time do not disturb each other."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as file:
        made = Path(file.name)
    try:
        command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(made)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
