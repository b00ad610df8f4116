"""The timing engine: turns, ratios and failures. No test depends on how fast anything is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress import bench
from fxcompress.errors import OptionError
from fxcompress.graph.inputs import ExampleInputs

pytestmark = pytest.mark.xdist_group("bench")  # the fixtures of this file are made once

MODEL_FILE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), torch.randn(1, 1, 8, 8)
"""


def failing(model: nn.Module, inputs: ExampleInputs) -> Callable[[], Any]:
    raise ValueError("this engine has no such operator")


def noisy(model: nn.Module, inputs: ExampleInputs) -> Callable[[], Any]:
    """Outputs with a tenth of their size as noise: 20 dB."""
    return lambda: inputs.call(model) * 1.1


@pytest.fixture(scope="module")
def timings(tmp_path_factory: pytest.TempPathFactory) -> list[bench.Timing]:
    path = tmp_path_factory.mktemp("bench") / "small.py"
    path.write_text(MODEL_FILE)
    workload = bench.Workload(f"{path}:net", (), (1, 3), threads=1)
    engines = {"float": bench.eager, "failing": failing, "noisy": noisy}
    return bench.compare(workload, engines, rounds=3, seconds=0.005)


def test_every_engine_has_its_turns(timings: list[bench.Timing]) -> None:
    assert [(timing.engine, timing.batch) for timing in timings] == [
        (engine, batch) for engine in ("float", "failing", "noisy") for batch in (1, 3)
    ]
    for timing in timings:
        if timing.engine != "failing":
            assert len(timing.rounds) == 3
            assert min(timing.rounds) > 0
            assert timing.median == sorted(timing.rounds)[1]
            assert timing.error is None


def test_ratios_are_taken_round_by_round(timings: list[bench.Timing]) -> None:
    reference, other = timings[0], timings[4]
    ratios = sorted(a / b for a, b in zip(reference.rounds, other.rounds, strict=True))
    assert other.ratio == ratios[1]
    assert reference.ratio == 1.0


def test_outputs_are_compared_with_those_of_the_first_engine(timings: list[bench.Timing]) -> None:
    assert timings[0].sqnr_db is None, "no noise at all"
    assert timings[4].sqnr_db == pytest.approx(20, abs=0.01)


def test_an_engine_that_fails_says_why_and_stops_nobody(timings: list[bench.Timing]) -> None:
    for timing in timings[2:4]:
        assert timing.median is None
        assert timing.error is not None
        assert timing.error.startswith("ValueError: this engine has no such operator (in test_bench.py:")


def test_times_of_layers_follow_the_layers_of_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(1, 1, 8, 8)
    seconds = bench.layer_seconds(fxc.compile(model, [], x), x, rounds=2)
    assert list(seconds) == ["0", "1", "2"]
    assert all(value > 0 for value in seconds.values())


def test_the_median_needs_its_calls() -> None:
    calls: list[int] = []
    assert bench.median_seconds(lambda: calls.append(1), seconds=0.0, least=7) >= 0
    assert len(calls) == 3 + 7


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(OptionError):
        bench.compare(bench.Workload("resnet18"), {}, rounds=1)


def test_results_carry_command_machine_and_versions(tmp_path: Path, timings: list[bench.Timing]) -> None:
    path = tmp_path / "new" / "folder" / "results.json"
    bench.write_json(path, [bench.result(bench.Workload("resnet18"), timings)])
    written = json.loads(path.read_text())
    assert set(written) == {"command", "machine", "versions", "results"}
    assert written["versions"]["torch"] == torch.__version__
    assert written["machine"]["processor"]
    assert str(tmp_path) not in written["command"]
    assert written["results"][0]["timings"][0]["rounds"] == timings[0].rounds
