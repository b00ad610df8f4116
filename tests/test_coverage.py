"""The benchmark that runs every architecture: one model's failure is one row, and rows of earlier runs stay."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from benchmarks import coverage
from fxcompress.bench import write_json

pytest.importorskip("torchvision")


def test_every_architecture_of_torchvision_and_many_of_timm_are_listed() -> None:
    names = coverage.architectures("torchvision")
    assert len(names) >= 109
    assert {"resnet18", "raft_large", "maskrcnn_resnet50_fpn", "swin3d_t", "vit_h_14"} <= set(names)
    assert len(set(coverage.TIMM)) == len(coverage.TIMM) >= 60
    assert len(coverage.selected(None, None, pytest.fail)) == len(names) + len(coverage.TIMM)
    assert coverage.selected(None, ["resnet18", "dla34"], pytest.fail) == [
        ("torchvision", "resnet18"),
        ("timm", "dla34"),
    ]


def test_a_model_gets_a_row_whatever_happens() -> None:
    rows = {
        name: coverage.measure("torchvision", name, limit, threads=1)
        for name, limit in (("squeezenet1_1", 60.0), ("no_such_model", 60.0), ("resnet50", 0.01))
    }
    row = rows["squeezenet1_1"]
    assert (row.status, row.stage, row.error, row.captured) == ("ok", "end", None, 1.0)
    assert row.left is not None
    assert row.left <= 0.40
    assert row.difference is not None
    assert row.difference <= coverage.ROUNDING
    assert rows["no_such_model"].status == "fails"
    assert rows["no_such_model"].stage == "build"
    assert "no_such_model" in str(rows["no_such_model"].error)
    assert rows["resnet50"].status == "too slow"


def test_rows_are_read_back(tmp_path: Path) -> None:
    row = coverage.Row("timm", "dla34", 10, 1.0, 0.25, 1e-7, 1.5, 2.5, 300, "ok", "end")
    assert coverage.read_rows(tmp_path / "none.json") == []
    write_json(tmp_path / "some.json", {"passes": "", "rows": [dataclasses.asdict(row)]})
    assert coverage.read_rows(tmp_path / "some.json") == [row]


class Unknown(nn.Module):
    """What no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Unknown) or super().is_leaf_module(m, module_qualified_name)


def test_what_is_inside_of_unknown_modules_is_not_captured_but_for_graphs_in_there() -> None:
    model = nn.Sequential(nn.Linear(4, 12, bias=False), Unknown())
    graph_module = fx.GraphModule(model, Tracer().trace(model))
    assert coverage.captured_share(graph_module) == 48 / 64
    inside = graph_module.get_submodule("1")
    inside.add_module("inner", fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4, bias=False))))
    assert coverage.captured_share(graph_module) == 1


def test_outputs_that_would_equal_any_others_are_refused() -> None:
    coverage.check_outputs({"a": torch.ones(2), "b": torch.zeros(0)})
    with pytest.raises(ValueError, match="zero"):
        coverage.check_outputs([torch.zeros(3)])
    with pytest.raises(ValueError, match="finite"):
        coverage.check_outputs([torch.ones(3), torch.tensor([float("nan")])])
