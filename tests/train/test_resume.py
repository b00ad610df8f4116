"""Checkpoints: a training that is killed ends, started again, with the weights that it would have had."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.errors import CheckpointError
from fxcompress.train import random_state
from tests.train.resumed_program import main
from tests.train.test_train import BATCHES, Endless, X, Y, full_net, linear_net, loader, metrics, noisy, same, train

PROGRAM = Path(__file__).with_name("resumed_program.py")
ROOT = Path(__file__).parents[2]


def kill(folder: Path, workers: int, at: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(folder), str(workers), str(at)]
    log = folder.with_suffix(".log")
    with log.open("w") as file:  # no pipe: workers that lost their parent would keep it open
        process = subprocess.Popen(command, env=environment, stderr=file, start_new_session=True)
        code = process.wait(timeout=300)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # these workers
    assert code == -signal.SIGKILL, log.read_text()


def test_a_killed_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Two trainings of 30 steps in one pipeline: the first is killed in its second epoch, then the second one."""
    weights, batches = main(str(tmp_path / "whole"), workers=0)
    assert batches == 60
    for at in (18, 27):  # the last checkpoints before: step 15 of the first training, 10 of the second
        kill(tmp_path / "killed", 0, at)
    found, left = main(str(tmp_path / "killed"), workers=0)
    assert found == weights
    assert left == 20, "what was done is not done again"
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["train-1.checkpoint", "train-2.checkpoint"]
    assert main(str(tmp_path / "killed"), workers=0) == (weights, 0)


def test_the_draws_of_workers_are_the_same_again(tmp_path: Path) -> None:
    kill(tmp_path / "killed", 1, 18)
    found, left = main(str(tmp_path / "killed"), workers=1)
    assert left == 45
    assert found == main(str(tmp_path / "whole"), workers=1)[0]


class Stop(Exception):
    """Ends a training from inside, as Ctrl+C would."""


def interrupted(model: nn.Module, data: Any, at: int, folder: Path, **options: Any) -> fxc.CompactModule:
    """Train until batch `at`, stop, and train again from the checkpoint."""
    calls = 0

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Stop
        return nn.functional.cross_entropy(output, target)

    with pytest.raises(fxc.errors.PassError, match="Stop"):
        train(model, data, loss_function=loss, checkpoint=str(folder), checkpoint_every=1, **options)
    calls = -1000
    return train(model, data, loss_function=loss, checkpoint=str(folder), checkpoint_every=1, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"optimiser": "sgd"},
        {"optimiser": "adamw", "schedule": "cosine", "warmup": 0.2},
        {"accumulate": 4},
        {"schedule_factory": lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=n + 1)},
        {"schedule_factory": lambda o, n: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, eps=0.0)},
        {"precision": "bf16"},
        {"validation": noisy()},
    ],
)
@pytest.mark.parametrize("at", [3, 10])
def test_every_kind_of_state_is_kept(tmp_path: Path, options: dict[str, Any], at: int) -> None:
    options = {"epochs": 3, "validation": BATCHES, "metric": "accuracy"} | options
    whole = train(full_net(), loader(), **options)
    parts = interrupted(full_net(), loader(), at, tmp_path, **options)
    assert same(whole, parts)
    for figure in ("loss", "learning_rate", "validation", "best_epoch"):
        assert metrics(whole)[figure] == metrics(parts)[figure]


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("at", [4, 14])
def test_quantisers_go_on_where_they_were(tmp_path: Path, learned: bool, at: int) -> None:
    """Their grids, their frozen batch norms and what they have seen are state as well."""

    def trained(stop: int = 0, **options: Any) -> fxc.CompactModule:
        calls = 0

        def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise Stop
            return nn.functional.cross_entropy(output, target)

        train = P.Train(BATCHES, epochs=3, loss_function=loss, **options)
        return fxc.compile(full_net(), [P.QAT(train, learn_steps=learned)], X[:4], calibration=[X])

    kept: dict[str, Any] = {"checkpoint": str(tmp_path), "checkpoint_every": 2}
    with pytest.raises(fxc.errors.PassError, match="Stop"):
        trained(at, **kept)
    assert same(trained(**kept), trained())


class Shuffling:
    """Batches whose order comes from a generator of their own."""

    def __init__(self, kind: str) -> None:
        self.generator: Any = {
            "torch": torch.Generator().manual_seed(3),
            "numpy": numpy.random.default_rng(3),
            "legacy": numpy.random.RandomState(3),
        }[kind]

    def __iter__(self) -> Any:
        if isinstance(self.generator, torch.Generator):
            order = torch.randperm(96, generator=self.generator)
        else:
            order = torch.from_numpy(self.generator.permutation(96))
        yield from zip(X[order].split(16), Y[order].split(16), strict=True)


@pytest.mark.parametrize("kind", ["torch", "numpy", "legacy"])
def test_generators_of_the_data_are_put_back(tmp_path: Path, kind: str) -> None:
    whole = train(linear_net(), Shuffling(kind), epochs=3)
    calls: list[int] = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 10:
            raise Stop
        return nn.functional.cross_entropy(output, target)

    options = {"epochs": 3, "checkpoint": str(tmp_path), "checkpoint_every": 2, "loss_function": loss}
    with pytest.raises(fxc.errors.PassError):
        train(linear_net(), Shuffling(kind), **options)
    assert same(train(linear_net(), Shuffling(kind), **options), whole)
    assert len(calls) < 22


def test_data_in_another_order_is_refused(tmp_path: Path) -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise Stop
        return nn.functional.cross_entropy(output, target)

    calls: list[int] = []
    options = {"checkpoint": str(tmp_path), "checkpoint_every": 1, "loss_function": loss}
    with pytest.raises(fxc.errors.PassError):
        train(linear_net(), BATCHES, **options)
    with pytest.raises(CheckpointError, match="batch 4 of the training data is another one than before"):
        train(linear_net(), BATCHES[::-1], **options)
    with pytest.raises(CheckpointError, match="has 1 random generators, the checkpoint is of data with 0"):
        train(linear_net(), loader(seed=1), **options)
    train(linear_net(), BATCHES, **options)


def test_checkpoints_of_another_run_are_refused_and_what_differs_is_named(tmp_path: Path) -> None:
    folder = {"checkpoint": str(tmp_path)}
    first = train(linear_net(), **folder)
    assert same(first, train(linear_net(), **folder)), "the same run is taken as it is"
    with pytest.raises(CheckpointError, match=r"its pass is 'train', here it is 'train\{learning_rate=0.1\}'"):
        train(linear_net(), learning_rate=0.1, **folder)
    with pytest.raises(CheckpointError, match=r"its pass is 'train', here it is 'train, loss_function: cross_entropy'"):
        train(linear_net(), loss_function=nn.functional.cross_entropy, **folder)
    with pytest.raises(CheckpointError, match=r"the graph differs \('.*Linear\(.*out_features=16.*out_features=12"):
        train(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), **folder)
    other = linear_net()
    with torch.no_grad():
        other.get_parameter("2.bias")[0] += 1e-6
    with pytest.raises(CheckpointError, match=r"it began with other values of 2\.bias"):
        train(other, **folder)
    with pytest.raises(CheckpointError, match="it had 6 batches in an epoch, here there are 3"):
        train(linear_net(), BATCHES[:3], **folder)
    assert same(first, train(linear_net(), **folder))


def test_damaged_files_and_folders_that_cannot_be_written(tmp_path: Path) -> None:
    train(linear_net(), checkpoint=str(tmp_path / "some"))
    path = tmp_path / "some" / "train-1.checkpoint"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
            train(linear_net(), checkpoint=str(tmp_path / "some"))
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        train(linear_net(), checkpoint=str(path / "below-a-file"))
    torch.save({"format": 99, "fingerprint": {}, "state": {}}, path)
    with pytest.raises(CheckpointError, match="has format 99"):
        train(linear_net(), checkpoint=str(tmp_path / "some"))


def test_files_never_hold_half_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(linear_net(), checkpoint=str(tmp_path))
    before = (tmp_path / "train-1.checkpoint").read_bytes()

    def half(content: object, file: Any) -> None:
        file.write(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(CheckpointError, match="no space left"):
        fxc.compile(linear_net(), [P.Train(Endless(), checkpoint=str(tmp_path / "new"))], X[:4])
    assert list((tmp_path / "new").iterdir()) == []
    assert same(train(linear_net(), checkpoint=str(tmp_path)), first)


def test_random_states_survive_a_file(tmp_path: Path) -> None:
    random_state.seed_everything(5)
    state = random_state.capture()
    torch.save(random_state.plain(state), tmp_path / "state")
    drawn = torch.rand(3), numpy.random.rand(3).tolist(), random.random()
    random_state.restore(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(torch.rand(3), drawn[0])
    assert (numpy.random.rand(3).tolist(), random.random()) == drawn[1:]
