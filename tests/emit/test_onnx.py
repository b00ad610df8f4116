"""Export to ONNX: the same function in another tool, at any batch size."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import fxcompress as fxc
from fxcompress.errors import InputError, MissingExtraError, UnsupportedError
from fxcompress.graph.metadata import Stage, graph_info


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        y: torch.Tensor = self.fc(x.reshape(x.size(0), -1))
        return y


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _outputs(path: Path, x: torch.Tensor) -> numpy.ndarray[Any, Any]:
    model = onnx.load(str(path))
    outputs: Any = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    return numpy.asarray(outputs[0])


def test_a_float_graph_runs_elsewhere_at_other_batch_sizes(tmp_path: Path) -> None:
    compact = fxc.compile(Small(), "fuse", X)
    compact.export_onnx(tmp_path / "m.onnx")
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            numpy.testing.assert_allclose(_outputs(tmp_path / "m.onnx", x), compact(x).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduced", [False, True])
def test_pairs_become_the_operators_of_onnx(tmp_path: Path, reduced: bool) -> None:
    passes = ["fuse", f"insert-observers{{reduced_range={reduced}}}", "calibrate", "convert-observed"]
    compact = fxc.compile(Small(), ", ".join(passes), X, calibration=[X])
    compact.export_onnx(tmp_path / "m.onnx", X)
    operators = [node.op_type for node in onnx.load(str(tmp_path / "m.onnx")).graph.node]
    assert operators.count("QuantizeLinear") == operators.count("DequantizeLinear") >= 4
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected = compact(x).numpy()
    step = numpy.abs(expected).max() / 100  # float sums that round to another step may differ by one
    numpy.testing.assert_allclose(_outputs(tmp_path / "m.onnx", x), expected, atol=step)


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compact = fxc.compile(Small(), "fuse", X)
    graph_info(compact).stage = Stage.LOWERED
    with pytest.raises(UnsupportedError, match=r"stage LOWERED cannot become ONNX.*convert-observed"):
        compact.export_onnx(tmp_path / "m.onnx")
    graph_info(compact).stage = Stage.FLOAT
    by_hand = fxc.CompactModule(torch.fx.symbolic_trace(Small()), torch.fx.symbolic_trace(Small()).graph)
    with pytest.raises(InputError, match="needs example_inputs"):
        by_hand.export_onnx(tmp_path / "m.onnx")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(MissingExtraError, match=r"fxcompress\[onnx\]"):
        compact.export_onnx(tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_rows_measured_at_run_time_run_elsewhere(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5))
    passes = "fuse, insert-observers{mode=dynamic}, calibrate, convert-observed"
    compact = fxc.compile(model, passes, torch.randn(2, 6))
    compact.export_onnx(tmp_path / "m.onnx")
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = compact(x).numpy()
    step = numpy.abs(expected).max() / 100
    numpy.testing.assert_allclose(_outputs(tmp_path / "m.onnx", x), expected, rtol=0, atol=step)
