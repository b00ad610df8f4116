"""Lowered modules in the hands of torch's own compilers and exporters."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.emit.compact_module import CompactModule
from fxcompress.errors import UnsupportedError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["auto", "graph"])
def compact(request: pytest.FixtureRequest) -> CompactModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)).eval()
    return fxc.compile(model, "int8", X, calibration=[X], executor=request.param)


@pytest.mark.filterwarnings("ignore")  # torch's remarks about itself
def test_torch_compile_runs_the_kernels_as_they_are(compact: CompactModule) -> None:
    expected = compact(X)
    torch.compiler.reset()
    for whole in (compact, nn.Sequential(compact, nn.Identity())):
        assert torch.equal(torch.compile(whole)(X), expected)
    fresh = fxc.compile(nn.Conv2d(3, 4, 3).eval(), "int8", X, calibration=[X])
    assert torch.equal(torch.compile(fresh)(X), fresh(X))  # whose kernels are not made yet


@pytest.mark.filterwarnings("ignore")
def test_torch_export_writes_the_same_function(compact: CompactModule) -> None:
    file = io.BytesIO()
    torch.export.save(torch.export.export(compact, (X,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(X), compact(X), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_exporters_that_cannot_follow_kernels_are_told_what_to_do(compact: CompactModule) -> None:
    with pytest.raises(UnsupportedError, match=r"Keep the module with save\(path\)"):
        torch.jit.trace(compact, (X,))
    with pytest.raises(Exception, match=r"call export_onnx\(path\)"):
        torch.onnx.export(compact, (X,), dynamo=True, verbose=False)
    with pytest.raises(UnsupportedError, match="before lowering"):
        compact.export_onnx("never written")
