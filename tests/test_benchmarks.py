"""What the programs in `benchmarks` count, tried out where it is known."""

from __future__ import annotations

import importlib.util
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    """One of the programs, as a module."""
    pytest.importorskip("torchvision")
    monkeypatch.syspath_prepend(str(FOLDER))
    specification = importlib.util.spec_from_file_location(f"benchmark_{request.param}", FOLDER / f"{request.param}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    sys.modules.pop("networks", None)


MAPS = """\
55d0-55d4 r-xp 00000000 fe:00 12 /usr/bin/python3
Rss:                 100 kB
7f00-7f08 r-xp 00000000 fe:00 13 /usr/lib/libtorch_cpu.so
Size:               9000 kB
Rss:                 500 kB
7f10-7f18 rw-p 00000000 00:00 0
Rss:                1000 kB
7f20-7f28 rw-p 00000000 fe:00 14 /usr/lib/libgomp.so.1
Rss:                 250 kB
7f30-7f38 r--p 00000000 fe:00 15 /tmp/model.solid
Rss:                 300 kB
"""


@pytest.mark.parametrize("program", ["memory"], indirect=True)
def test_code_is_what_libraries_have_in_memory(program: Any) -> None:
    assert program.code_in(MAPS) == pytest.approx(0.750 * 1.024)
    assert 1 < program.resident_code() < program.status("VmRSS")


@pytest.mark.parametrize("program", ["soak"], indirect=True)
def test_soaking_tells_growth_drift_and_calls_apart(program: Any) -> None:
    seen: list[int] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x + 1

    batches = [torch.zeros(1, 4), torch.zeros(3, 4)]
    found = program.soak(call, batches, 40)
    assert found["same_bits"]
    assert seen == [1, 3] * (1 + 2 + 20)  # the first of each, the warm-up, and 40 calls
    assert (found["calls"], found["batches"]) == (40, [1, 3])

    kept = []

    def growing(x: torch.Tensor) -> torch.Tensor:
        kept.append(mmap.mmap(-1, 1 << 20))  # a megabyte of the system, not of what was freed before
        kept[-1].write(bytes([1]) * (1 << 20))
        return x + (len(kept) > 30 and len(x) == 3)

    found = program.soak(growing, batches, 40)
    assert not found["same_bits"]
    assert 35 < found["megabytes"][1] - found["megabytes"][0] < 60
