"""Kernels compile for GPUs that are not there: no registers spilled for the first choices, memory within limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("cuda_compile_program.py")


def compiled(capability: int) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("capability", "memory"), [(90, 232_448), (80, 166_912)])
def test_first_choices_compile_without_spills(capability: int, memory: int) -> None:
    lines = compiled(capability)
    assert len(lines) >= 23
    for line in lines:
        assert "error" not in line, line
        assert line["stack"] == line["local"] == 0, line
        assert line["shared"] <= memory, line
    matrices = {line["name"].split(":")[0] for line in lines if line["matrix"]}
    assert {"first", "3x3", "1x1 with a sum", "linear", "grouped", "3x3 in fp16"} <= matrices
