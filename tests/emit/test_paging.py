"""Weights that are kept in a file: the same tensor to everybody, but for the memory that it takes."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.emit.native.paging import page_out
from tests.kernels import NEEDED


def test_a_tensor_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    weight = torch.randint(-127, 128, (64, 64, 5, 5), dtype=torch.int8)
    kept, address = weight.clone(), weight.data_ptr()
    page_out(weight)
    assert weight.data_ptr() != address
    assert torch.equal(weight, kept)
    assert list(tmp_path.iterdir()) == []  # the file has no name any more
    assert torch.equal(copy.deepcopy(weight), kept)
    assert torch.equal(pickle.loads(pickle.dumps(weight)), kept)
    weight[0] = 1
    assert torch.equal(weight[1:], kept[1:])
    assert (weight[0] == 1).all()


def test_it_stays_an_ordinary_tensor() -> None:
    weight = torch.zeros(1 << 17, dtype=torch.int8)
    with torch.inference_mode():
        page_out(weight)
    assert not weight.is_inference()


def test_changes_are_those_of_one_process() -> None:
    weight = torch.zeros(1 << 17, dtype=torch.int8)
    page_out(weight)
    child = os.fork()
    if not child:
        weight.fill_(1)
        os._exit(int(weight.sum()) != 1 << 17)
    assert os.waitpid(child, 0)[1] == 0
    assert not weight.any()


@pytest.mark.parametrize("case", ["small", "turned", "no folder"])
def test_what_cannot_be_moved_stays(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(256, 8 if case == "small" else 512, dtype=torch.int8)
    tensor = tensor.T if case == "turned" else tensor
    if case == "no folder":
        monkeypatch.setattr("tempfile.tempdir", "/dev/null/nowhere")
    address = tensor.data_ptr()
    page_out(tensor)
    assert tensor.data_ptr() == address


MEASURED = """
import sys
import torch
import fxcompress as fxc
from fxcompress.emit.native import library, paging
def resident():
    paging.give_back()
    return int(open("/proc/self/statm").read().split()[1]) * 4096
library.library()
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
before = resident()
open("/proc/self/clear_refs", "w").write("5")
compact = fxc.load(sys.argv[1])
x = torch.randn(1, 512, 7, 7)
with torch.inference_mode():
    for _ in range(3):
        compact(x)
print(compact._native.made is not None, resident() - before, peak() - before)
"""


@NEEDED
def test_weights_are_in_memory_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(512, 512, 3, padding=1) for _ in range(8))).eval()
    x = torch.randn(1, 512, 7, 7)
    compact = fxc.compile(model, "fuse, quantize", x, calibration=[x])
    expected = compact(x)
    compact.save(tmp_path / "wide.fxc")
    weights = sum(buffer.numel() for buffer in compact.buffers() if buffer.dtype == torch.int8)
    assert weights == 18 << 20
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "wide.fxc")], capture_output=True, text=True, check=True
    )
    ran, grown, peak = done.stdout.split()
    assert ran == "True"
    assert int(grown) < weights + (12 << 20)  # once, and what Python needs for the rest
    assert int(peak) < weights + (17 << 20)  # at no time twice: neither while the file is read, nor while it is packed
    assert torch.equal(compact(x), expected)
    compact.executor = "graph"  # reads them again
    torch.testing.assert_close(compact(x), expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    compact.save(tmp_path / "again.fxc")
    assert torch.equal(fxc.load(tmp_path / "again.fxc")(x), expected)
