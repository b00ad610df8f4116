"""Artefacts of lowered graphs: portable numbers in the file, kernels made where the file is read."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress as fxc
from fxcompress.errors import ArtifactError
from fxcompress.graph.metadata import Stage, graph_info
from fxcompress.quant.cpu import VARIABLE

pytestmark = pytest.mark.xdist_group("artifact_lowered")  # the fixtures of this file are made once


class Net(nn.Module):
    """Convolutions with residual add and activation, pooling in 8 bits, a multiplication, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.gate, self.fc = nn.Conv2d(16, 16, 1), nn.Linear(16 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.conv1(x))
        y = F.relu(self.conv2(y) + y)
        y = y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        y = F.adaptive_avg_pool2d(F.max_pool2d(y, 2), 4)
        logits: torch.Tensor = self.fc(torch.flatten(y, 1))
        return logits


@pytest.fixture(scope="module")
def compact() -> fxc.CompactModule:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    return fxc.compile(Net(), "fuse, quantize", x, calibration=[x])


@pytest.fixture
def saved(compact: fxc.CompactModule, tmp_path: Path) -> Path:
    compact.save(tmp_path / "int8.fxc")
    return tmp_path / "int8.fxc"


def _x(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))


def test_outputs_are_identical_at_every_batch_size(compact: fxc.CompactModule, saved: Path) -> None:
    loaded = fxc.load(saved)
    assert graph_info(loaded).stage is Stage.LOWERED
    assert loaded.code == compact.code
    for batch in (1, 3, 8):
        assert torch.equal(loaded(_x(batch)), compact(_x(batch)))


def test_the_file_holds_bytes_and_no_packed_weights(saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved)
    weights = {name: tensor.dtype for name, tensor in tensors.items() if name.endswith(".weight")}
    assert weights
    assert set(weights.values()) == {torch.int8}
    assert saved.stat().st_size < 60_000


@pytest.mark.parametrize("cpu", ["avx2", "plain"])
def test_a_file_loads_on_a_machine_with_other_kernels(
    compact: fxc.CompactModule, saved: Path, cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compact(_x(3))
    monkeypatch.setenv(VARIABLE, cpu)
    found = fxc.load(saved)(_x(3))
    noise = (found - expected).square().sum() / expected.square().sum()
    assert noise < 1e-3, "rounding in another order moves a few numbers by one step"


def test_a_used_module_is_saved_copied_and_pickled_like_a_new_one(compact: fxc.CompactModule, tmp_path: Path) -> None:
    used = copy.deepcopy(compact)
    used(_x(2))  # packs its weights
    used.save(tmp_path / "used.fxc")
    compact.save(tmp_path / "new.fxc")
    assert (tmp_path / "used.fxc").read_bytes() == (tmp_path / "new.fxc").read_bytes()
    for twin in (copy.deepcopy(used), pickle.loads(pickle.dumps(used))):
        assert torch.equal(twin(_x(2)), used(_x(2)))


@pytest.mark.parametrize("name", ["stride", "dilation", "groups"])
def test_sizes_that_would_kill_the_process_are_refused(saved: Path, name: str) -> None:
    with safetensors.safe_open(saved, framework="pt") as file:
        document: dict[str, Any] = json.loads(file.metadata()["fxcompress"])
    config = dict(document["modules"]["conv1"]["config"]["dict"])
    config[name] = 0 if name == "groups" else [0, 0]
    document["modules"]["conv1"]["config"]["dict"] = [list(pair) for pair in config.items()]
    document["sha256"] = "0" * 64
    tensors = safetensors.torch.load_file(saved)
    safetensors.torch.save_file(tensors, saved, metadata={"fxcompress": json.dumps(document)})
    content = saved.read_bytes()
    saved.write_bytes(content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1))
    with pytest.raises(ArtifactError, match=f"layer 'conv1' has {name}="):
        fxc.load(saved)
