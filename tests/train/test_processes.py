"""Several processes: they decide what one would decide, agree bit for bit, and survive the death of one of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn

import fxcompress as fxc
from fxcompress import processes
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.merging import can_merge
from fxcompress.quant.observers import ChannelMean, ExternalObserver, Histogram, MovingAverageMinMax, make_observer
from fxcompress.quant.spec import ACTIVATION, WEIGHT
from fxcompress.train.data import Feed, pairs
from tests.train.parallel_program import decisions, sampled, split, training
from tests.train.test_train import BATCHES, X

pytestmark = pytest.mark.xdist_group("processes")  # the fixtures of this file are made once

PROGRAM = Path(__file__).with_name("parallel_program.py")
ROOT = Path(__file__).parents[2]


def launch(folder: Path, what: str = "all", victim: int = -1, at: int = 0) -> list[subprocess.CompletedProcess[str]]:
    """Run the program in two processes, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder.mkdir(exist_ok=True)
    started = []
    for rank in range(2):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
        command = [sys.executable, str(PROGRAM), str(folder), what, str(victim), str(at)]
        started.append(
            subprocess.Popen(command, env={**os.environ, **variables}, stdout=-1, stderr=subprocess.PIPE, text=True)
        )
    try:
        ended = [(process, *process.communicate(timeout=300)) for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess("", process.returncode, out, err) for process, out, err in ended]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("one"))
    return training(folder) | decisions() | sampled() | {"split": split(folder)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    for process in launch(folder):
        assert process.returncode == 0, process.stderr
        assert "Warning" not in process.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.fxc", "norm", "parts", "plain", "rank0.json", "rank1.json", "whole",
    ]  # fmt: skip
    assert (folder / "norm" / "train-1.checkpoint").exists()
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_all_processes_have_the_same_bits(two: list[dict[str, Any]]) -> None:
    first, second = two
    for figure in ("channels", "scales", "plain", "norm", "qat True", "qat False"):
        assert first[figure] == second[figure], figure


def test_channels_are_those_that_one_process_chooses(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert two[0]["channels"] == one["channels"]
    assert len(set(one["channels"].values())) > 1, "the criteria choose different ones"


@pytest.mark.parametrize("observer", ["histogram", "minmax", "percentile", "moving-average"])
def test_scales_are_those_of_one_process(observer: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert two[0]["scales"][observer] == one["scales"][observer]


def test_training_is_that_of_one_process_up_to_rounding(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """Batches of 8 and a last one of 6, in two parts each, two batches a step; no statistics of a batch."""
    for mine, theirs in zip(one["plain"]["weights"], two[0]["plain"]["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(mine), rtol=1e-3, atol=1e-5)
    for figure in ("loss", "validation", "learning_rate"):
        assert two[0]["plain"]["metrics"][figure] == pytest.approx(one["plain"]["metrics"][figure], rel=1e-4)
    assert one["plain"]["metrics"]["loss"][-1] < one["plain"]["metrics"]["loss"][0]


def test_data_that_is_shared_already_is_not_shared_again(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """Two processes with batches of 4 of a DistributedSampler, against one with batches of 8."""
    assert two[0]["sampled"] == two[1]["sampled"]
    for mine, theirs in zip(one["sampled"], two[0]["sampled"], strict=True):
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(mine), rtol=1e-3, atol=1e-5)


def test_split_weights_train_as_whole_ones_do(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """The last batch has one sample, so that one process has none of it."""
    first, second, alone = (found["split"] for found in (*two, one))
    assert first == second
    assert first["masked"] == alone["masked"] > 100
    assert (first["types"], first["class"]) == (["Parameter"], "GraphModule")
    for mine, theirs in zip(alone["weights"], first["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(mine), rtol=1e-3, atol=1e-4)
    for figure in ("loss", "validation"):
        assert first["metrics"][figure] == pytest.approx(alone["metrics"][figure], rel=1e-3)


def test_split_weights_resume_exactly(two: list[dict[str, Any]]) -> None:
    assert two[0]["split in two"] == two[0]["split"]


def test_statistics_of_batch_norms_are_near(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    losses = [found["norm"]["metrics"]["loss"] for found in (one, two[0])]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_the_death_of_a_process_is_told_and_training_goes_on_exactly(tmp_path: Path, two: list[dict[str, Any]]) -> None:
    survivor, victim = launch(tmp_path / "killed", "training", victim=1, at=32)
    assert victim.returncode == -signal.SIGKILL
    assert survivor.returncode == 1
    last = survivor.stderr.strip().splitlines()[-1]
    assert "ProcessError" in last
    assert "process 0 of 2 lost the others while adding up gradients" in last
    assert "goes on from its last checkpoint" in last
    for process in launch(tmp_path / "killed", "training"):
        assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "killed" / "rank1.json").read_text())
    assert (found["plain"]["digest"], found["norm"]["digest"]) == (two[0]["plain"]["digest"], two[0]["norm"]["digest"])
    assert found["batches"] < two[0]["batches"] / 2


# Parts of it, without processes


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def test_the_launcher_says_who_is_who(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (processes.count(), processes.rank(), processes.is_main()) == (1, 0, True)
    compact = fxc.compile(nn.Linear(8, 4), [], X[:2])
    pretend(monkeypatch, 2, 3)
    assert (processes.count(), processes.rank(), processes.is_main()) == (3, 2, False)
    assert list(processes.shared("abcdefgh")) == ["c", "f"]
    compact.save(tmp_path / "model.fxc")
    assert compact.report is not None
    compact.report.to_html(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == [], "only the first process writes"
    with processes.alone():
        assert processes.count() == 1
        compact.save(tmp_path / "model.fxc")
        assert processes.gather(5) == [5]
    assert (tmp_path / "model.fxc").exists()
    assert processes.count() == 3
    monkeypatch.delenv("MASTER_ADDR")
    assert processes.count() == 1, "numbers alone are no group"


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_parts_of_a_batch_are_the_batch(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    data = [*BATCHES[:1], (X[:4], [{"box": X[i]} for i in range(4)]), (X[:1], torch.tensor([3]))]
    parts: list[list[Any]] = [[], [], []]
    for rank in range(count):
        pretend(monkeypatch, rank, count)
        feed = Feed(data, pairs(ExampleInputs.of(X[:4]), "training"), torch.device("cpu"), 0)
        feed.start_epoch(0)
        for index, batch in enumerate(feed.batches()):
            assert batch.size == (16, 4, 1)[index]
            assert batch.inputs is not None
            assert len(batch.inputs.args[0]) == len(batch.target) == batch.here
            parts[index].append(batch)
    assert torch.equal(torch.cat([batch.inputs.args[0] for batch in parts[0]]), BATCHES[0][0])
    assert torch.equal(torch.cat([batch.target for batch in parts[0]]), BATCHES[0][1])
    assert [id(target["box"]) for batch in parts[1] for target in batch.target] != []
    assert sum(batch.here for batch in parts[2]) == 1


def recorded(observer: Any, *batches: torch.Tensor) -> Any:
    observer.recording = True
    for batch in batches:
        observer(batch)
    return observer


@pytest.mark.parametrize("name", ["minmax", "histogram", "percentile", "per-channel"])
@pytest.mark.parametrize("parts", [(1, 3), (0, 4), (4, 0), (2, 2)])
def test_merged_observers_have_seen_everything(name: str, parts: tuple[int, int]) -> None:
    torch.manual_seed(0)
    spec = WEIGHT.along(1) if name == "per-channel" else ACTIVATION
    batches = [torch.randn(5, 3) * 10**index for index in range(4)]
    whole = recorded(make_observer(name, spec), *batches)
    merged = recorded(make_observer(name, spec), *batches[: parts[0]])
    merged.merge(recorded(make_observer(name, spec), *batches[4 - parts[1] :]))
    assert int(merged.count) == int(whole.count)
    for mine, theirs in zip(merged.calculate_qparams(), whole.calculate_qparams(), strict=True):
        assert torch.equal(mine, theirs)


def test_means_merge_and_what_depends_on_the_order_does_not() -> None:
    x = torch.randn(6, 3)
    whole, first, second = (recorded(ChannelMean(3, -1), *part) for part in ([x], [x[:2]], [x[2:]]))
    first.merge(second)
    torch.testing.assert_close(first.mean(), whole.mean())
    elsewhere = ExternalObserver(quantization.MinMaxObserver(dtype=torch.quint8))
    histogram, moving = (make_observer(name, ACTIVATION) for name in ("histogram", "moving-average"))
    assert can_merge({"a": histogram, "b": first, "c": FakeQuantize(Histogram())})
    for other in (elsewhere, moving, FakeQuantize(MovingAverageMinMax())):
        assert not can_merge({"a": histogram, "b": other})
