"""benchmarks/accuracy.py goes on where it was stopped, and says truthfully what holds."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accuracy
from fxcompress.recipes import runs
from fxcompress.recipes.catalogue import RECIPES, Recipe
from fxcompress.recipes.figures import Summary
from fxcompress.recipes.networks import NETWORKS
from fxcompress.recipes.runs import Row, Study

pytestmark = pytest.mark.xdist_group("recipes")


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *recipes: str) -> list[dict[str, Any]]:
    """Run the benchmark on few digits; return the rows of its file."""
    options = ["--data", "mnist", "--epochs", "1", "--samples", "64", "--seeds", "0", "--networks", "baby-cnn"]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *options, "--json", str(path), "--recipes", *recipes])
    accuracy.main()
    rows: list[dict[str, Any]] = json.loads(path.read_text())["results"]["rows"]
    return rows


def test_a_benchmark_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(runs, "median_seconds", lambda call, seconds: 1.0)
    monkeypatch.setitem(NETWORKS, "baby-cnn", dataclasses.replace(NETWORKS["baby-cnn"], width=4, student=2))
    ran: list[str] = []
    compress = Study.compress

    def counted(self: Study, recipe: Recipe) -> Any:
        ran.append(recipe.name)
        return compress(self, recipe)

    monkeypatch.setattr(Study, "compress", counted)
    path = tmp_path / "accuracy.json"
    first = run(monkeypatch, path, "float", "ptq")
    assert [row["recipe"] for row in first] == ["float", "ptq"]
    assert path.with_suffix(".png").exists()
    assert "baby-cnn, mnist (64 images), seed 0, ptq:" in capsys.readouterr().out
    second = run(monkeypatch, path, "float", "ptq", "unstructured-l1")
    assert second[:2] == first
    assert ran == ["ptq", "unstructured-l1"]
    changed = dataclasses.replace(RECIPES["ptq"], passes="fuse, quantize{weight_bits=4}")
    monkeypatch.setitem(RECIPES, "ptq", changed)
    third = run(monkeypatch, path, "float", "ptq")
    assert [row["recipe"] for row in third] == ["float", "unstructured-l1", "ptq"], "what has changed is run again"
    assert third[2]["file_bytes"] < first[1]["file_bytes"]
    assert len(list((tmp_path / "accuracy-networks").iterdir())) == 1


def test_mistakes_are_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    with pytest.raises(SystemExit, match="no recipe 'ptqq'; did you mean 'ptq'"):
        run(monkeypatch, path, "ptqq")
    with pytest.raises(SystemExit, match="a number of processes, such as 2, not 'two'"):
        run(monkeypatch, path, "several-processes:two")
    path.write_text("{}")
    with pytest.raises(SystemExit, match="is no file of this benchmark"):
        run(monkeypatch, path, "ptq")


def test_a_recipe_runs_with_another_number_of_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "median_seconds", lambda call, seconds: 1.0)
    monkeypatch.setitem(NETWORKS, "baby-cnn", dataclasses.replace(NETWORKS["baby-cnn"], width=12, student=7))
    started: list[str] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: started.append(" ".join(command)))
    path = tmp_path / "accuracy.json"
    [row] = run(monkeypatch, path, "several-processes:1")
    assert (row["recipe"], row["processes"], started) == ("several-processes:1", 1, [])
    assert run(monkeypatch, path, "several-processes", "several-processes:2", "several-processes:1") == [row]
    [four, two] = started
    assert "--nproc_per_node 4 " in four
    assert "--recipes several-processes --networks" in four
    assert "--nproc_per_node 2 " in two
    assert "--recipes several-processes:2 --networks" in two


def summary(recipe: str, share: float, lost: float | None = None, network: str = "baby-cnn") -> Summary:
    low, high = (share - 0.001, share + 0.001) if recipe == "several-processes:1" else (share, share)
    return Summary(recipe, network, "fashion-mnist", 3, share, low, high, lost, 1, 0, 1, 100, 1, 1)


def test_claims_hold_or_fail() -> None:
    found = [
        summary("float", 0.92, 0.0), summary("ptq", 0.9165, 0.0035), summary("qat", 0.9195, 0.0005),
        summary("iterative", 0.91, 0.01), summary("one-shot", 0.909, 0.011), summary("student-alone", 0.91, 0.01),
        summary("distillation", 0.912, 0.008), summary("prune-qat-distill", 0.915, 0.005),
        summary("several-processes", 0.9115), summary("several-processes:2", 0.9145),
        summary("several-processes:1", 0.912),
        summary("half-macs", 0.93, None, "resnet-20"), summary("torch-pruning", 0.929, None, "resnet-20"),
    ]  # fmt: skip
    holds = {claim.text: claim.holds for claim in accuracy.claims(found)}
    assert holds == {
        "float: at least 91 %": True,
        "ptq: points lost": False,
        "qat: points lost": True,
        "prune-qat-distill: points lost": True,
        "iterative: at least 0.0 points above one-shot": True,
        "distillation: at least 0.3 points above student-alone": False,
        "prune-qat-distill: share of the bytes": False,
        "several-processes: points away from one process, whose seeds are as far from each other": True,
        "several-processes:2: points away from one process, whose seeds are as far from each other": False,
        "resnet-20, half-macs: not below torch-pruning": True,
    }


def test_torch_pruning_gets_no_less_to_work_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def macs_left(ratio: float) -> int:
        return round(100 * (1 - ratio)) * 10

    monkeypatch.setattr(accuracy, "pruned", lambda study, together, ratio: ratio)
    monkeypatch.setattr(accuracy, "macs_of", lambda study, network: macs_left(network))
    nearest: Any = accuracy.nearest
    ratio, network = nearest(None, True, 500)
    assert ratio == network == pytest.approx(0.505, abs=0.001)
    assert macs_left(ratio) == 500


def test_peers_run_again_when_our_recipe_has_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "median_seconds", lambda call, seconds: 1.0)
    monkeypatch.setitem(NETWORKS, "baby-cnn", dataclasses.replace(NETWORKS["baby-cnn"], width=12, student=7))
    monkeypatch.setattr(accuracy, "nearest", lambda study, together, macs: (0.3, study.model))
    path = tmp_path / "accuracy.json"

    def both() -> tuple[dict[str, Any], dict[str, Any]]:
        own, other = run(monkeypatch, path, "half-macs", "torch-pruning")
        return own, other

    own, other = both()
    assert f"pruning_ratio=0.3000) to {own['macs']} MACs, distill{{" in other["passes"]
    assert "prune-channels" not in other["passes"]
    assert both() == (own, other)
    recipe = RECIPES["half-macs"]
    for old, new in (("macs:0.5", "macs:0.6"), ("alpha=0.9", "alpha=0.8")):
        recipe = dataclasses.replace(recipe, passes=recipe.passes.replace(old, new))
        monkeypatch.setitem(RECIPES, "half-macs", recipe)
        before, (own, other) = other, both()
        assert f" to {own['macs']} MACs, " in other["passes"]
        assert other["passes"] != before["passes"]
    with pytest.raises(SystemExit, match="is compared with 'half-macs', which has not run: name both"):
        run(monkeypatch, tmp_path / "new.json", "torch-pruning")


def test_rows_of_the_file_are_read_back(tmp_path: Path) -> None:
    row = Row("ptq", "baby-cnn", "mnist", 0, 0.9, 10, 0.0, 20, 30, 1.0, 2.0, 3.0, "fuse", 2)
    accuracy.write_rows(tmp_path / "rows.json", [row])
    assert accuracy.read_rows(tmp_path / "rows.json") == [row]
    assert accuracy.read_rows(tmp_path / "none.json") == []
