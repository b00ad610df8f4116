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


def compiled(capability: int, *which: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), str(capability), *which]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(lines: list[dict[str, Any]], memory: int) -> None:
    for line in lines:
        assert "error" not in line, line
        assert line["stack"] == line["local"] == 0, line
        assert line["shared"] <= memory, line


def test_first_choices_compile_for_hopper_without_spills() -> None:
    lines = compiled(90)
    assert len(lines) == 24
    check(lines, 232_448)
    matrices = {line["name"].split(":")[0] for line in lines if line["matrix"]}
    assert {"first", "3x3", "1x1 with a sum", "linear", "grouped", "3x3 in fp16", "linear in fp8"} <= matrices


def test_first_choices_compile_for_ampere_without_spills() -> None:
    lines = compiled(80, "3x3", "1x1 with a sum", "depthwise", "norm")
    assert len(lines) == 4
    check(lines, 166_912)
