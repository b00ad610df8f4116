"""Weights of up to 4 bits take half a byte in a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.emit import nibbles

X = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))


@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**16))
def test_packing_and_unpacking_round_trip(rows: int, columns: int, seed: int) -> None:
    tensor = torch.randint(-8, 8, (rows, columns, 1), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = nibbles.pack(tensor)
    assert packed.numel() == (tensor.numel() + 1) // 2
    assert torch.equal(nibbles.unpack(packed, tensor.shape), tensor)
    with pytest.raises(ValueError, match="integers of 4 bits"):
        nibbles.unpack(packed, (rows, columns, 3))


def test_only_small_integers_of_weights_are_packed() -> None:
    assert nibbles.fits(torch.tensor([[-8, 7]], dtype=torch.int8))
    assert not nibbles.fits(torch.tensor([[-9, 7]], dtype=torch.int8))
    assert not nibbles.fits(torch.tensor([[0, 8]], dtype=torch.int8))
    assert not nibbles.fits(torch.tensor([[0, 7]], dtype=torch.uint8))
    assert not nibbles.fits(torch.tensor([[0.0, 7.0]]))


def saved(path: Path, bits: int) -> fxc.CompactModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Conv2d(64, 63, 3), nn.Flatten(), nn.Linear(1008, 15))
    compact = fxc.compile(model.eval(), ["fuse", P.Quantize([X], weight_bits=bits)], X)
    compact.save(path)
    return compact


def test_files_of_4_bits_are_about_half_as_large_and_give_the_same_numbers(tmp_path: Path) -> None:
    four, eight = saved(tmp_path / "four.fxc", 4), saved(tmp_path / "eight.fxc", 8)
    weights = sum(buffer.numel() for buffer in four.buffers() if buffer.dtype == torch.int8)
    spared = (tmp_path / "eight.fxc").stat().st_size - (tmp_path / "four.fxc").stat().st_size
    assert spared == pytest.approx(weights / 2, rel=0.02)
    for name, compact in (("four", four), ("eight", eight)):
        loaded = fxc.load(tmp_path / f"{name}.fxc")
        assert torch.equal(loaded(X), compact(X))
        state = compact.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("shape", [[64, 16, 3, 4], [64, 16, 3], "much", [-64, -16, 3, 3], [1 << 40, 1 << 40]])
def test_shapes_that_do_not_fit_are_refused(tmp_path: Path, shape: object, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "four.fxc"
    saved(path, 4)
    with safetensors.safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["fxcompress"])
    [name] = [name for name, record in document["tensors"].items() if record.get("nibbles") == [64, 16, 3, 3]]
    document["tensors"][name]["nibbles"] = shape
    monkeypatch.setattr("fxcompress.emit.artifact._read_document", lambda *given: document)
    with pytest.raises(fxc.errors.ArtifactError, match=r"does not fit|a shape that is none|has shape"):
        fxc.load(path)
