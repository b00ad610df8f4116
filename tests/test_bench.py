"""The timing engine: turns, ratios and failures. No test depends on how fast anything is."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import fxcompress as fxc
from fxcompress import bench, bench_layers, bench_views, peers
from fxcompress.bench_layers import time_layers
from fxcompress.bench_views import layer_table
from fxcompress.emit.native.executor import BoundPlan
from fxcompress.emit.native.library import library
from fxcompress.errors import MissingExtraError, OptionError
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import info

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


# Other engines


def timing(engine: str, *rounds: float, batch: int = 1, error: str | None = None) -> bench.Timing:
    return bench.Timing(engine, batch, list(rounds), sorted(rounds)[len(rounds) // 2], error=error)


def test_the_best_other_engine_is_found_round_by_round() -> None:
    timings = [
        timing("float", 9.0, 9.0, 9.0), timing("a", 1.0, 4.0, 2.0), timing("b", 2.0, 2.0, 8.0),
        timing("broken", 0.1, error="it broke"), timing("ours", 2.0, 1.0, 1.0), timing("ours", 1.0, batch=16),
    ]  # fmt: skip
    assert peers.against_best(timings, "ours", ["a", "b", "broken"]) == {1: 0.5}  # of 2 / 1, 1 / 2 and 1 / 2
    assert peers.against_best(timings, "ours", []) == {}


def test_engines_are_named_and_need_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [peer.title for peer in peers.find_peers(["torch-ao", "torch-ao"])] == ["torch.ao int8"]
    with pytest.raises(OptionError, match="no engine 'openvin' to compare with; did you mean 'openvino'"):
        peers.find_peers(["openvin"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"OpenVINO int8 needs .*fxcompress\[bench\]"):
        peers.find_peers(["openvino"])
    assert peers.find_peers(["all"]) == [peers.PEERS["torch-ao"]]


def test_a_table_and_a_plot_show_every_engine(timings: list[bench.Timing], tmp_path: Path) -> None:
    console = Console(width=140, file=io.StringIO())
    console.print(bench_views.timing_table(timings, "small"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in text for word in ("noisy", "20.0", "failed: ValueError"))
    bench_views.plot(timings, tmp_path / "new" / "plot.png", "small")
    assert (tmp_path / "new" / "plot.png").stat().st_size > 1000
    with pytest.raises(OptionError, match="nothing to plot"):
        bench_views.plot(timings[2:4], tmp_path / "empty.png", "small")
    with pytest.raises(OptionError, match="cannot write the plot"):
        bench_views.plot(timings, tmp_path / "plot.nothing", "small")


# Layers


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.deep = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.deep(self.first(x).relu())
        return self.last(x.mean((2, 3))).softmax(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("executor", ["auto", "graph"])
def test_layers_are_measured_and_have_their_floor(executor: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    compact = fxc.compile(Small().eval(), "int8", x[:1], calibration=[x], executor=executor)
    before = compact(x)
    times = time_layers(compact, ExampleInputs.of(x), threads=1, rounds=2, peak=1e9)
    assert times.by_kernels == (executor == "auto" and library() is not None)
    assert (times.batch, times.peak) == (2, 1e9)
    found = {layer.layer: layer.macs for layer in times.layers if layer.macs}
    assert found == {"first": 2 * 36 * 8 * 27, "deep": 2 * 16 * 8 * 9, "last": 2 * 8 * 5}
    assert all(layer.seconds > 0 and layer.floor == layer.macs / 1e9 for layer in times.layers)
    assert times.call > 0
    assert times.seconds == sum(layer.seconds for layer in times.layers)
    assert json.loads(json.dumps(times.to_dict()))["layers"][0]["kind"] == "Quantize"
    assert torch.equal(compact(x), before)
    assert info(next(iter(compact.graph.nodes))).value.shape[0] == 1  # what the module knows of its example stays
    console = Console(width=140, file=io.StringIO())
    console.print(layer_table(times, "small"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in text for word in ("first", "Int8Linear", "a whole call", "peak 1 GMAC/s"))


@pytest.mark.skipif(library() is None, reason="no kernels")
@pytest.mark.parametrize("batch", [1, 16])  # 16: each thread has images of its own
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_what_calls_spend_outside_kernels_is_seen(where: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(batch, 3, 8, 8)
    compact = fxc.compile(Small().eval(), "int8", x[:1], calibration=[x])

    def slow(function: Any) -> Any:
        def slowed(*arguments: Any) -> Any:
            time.sleep(0.02)
            return function(*arguments)

        return slowed

    kernels = library()
    if where == "inside":
        for name in ("run", "run_each"):
            monkeypatch.setattr(kernels, name, slow(getattr(kernels, name)))
    else:
        monkeypatch.setattr(BoundPlan, "__call__", slow(BoundPlan.__call__))
    times = time_layers(compact, ExampleInputs.of(x), threads=1, rounds=2, peak=1e9)
    assert times.inside is not None
    assert times.outside == 1 - times.inside
    assert {"inside": times.inside, "outside": times.outside}[
        where
    ] > 0.5  # 20 ms of a call that takes a fraction of one
    assert times.to_dict()["outside"] == times.outside
    console = Console(width=140, file=io.StringIO())
    console.print(layer_table(times, "small"))
    assert f"{times.outside:.1%}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_engines_are_calibrated_on_the_same_samples_whatever_is_timed() -> None:
    single, several = (ExampleInputs((torch.ones(n, 3, 2),), {"mask": torch.arange(5).expand(n, 5)}) for n in (1, 6))
    samples = bench.calibration_of(several)
    assert [one.describe() for one in samples] == ["(1, 3, 2) float32 on cpu, (1, 5) int64 on cpu"] * 4
    for one, other in zip(samples, bench.calibration_of(single), strict=True):
        assert torch.equal(one.args[0], other.args[0])
        assert torch.equal(one.kwargs["mask"], torch.arange(5)[None])
    assert len({float(one.args[0].sum()) for one in samples}) == 4
    timed = bench._with_batch(single, 4, torch.Generator().manual_seed(0)).args[0]
    assert not any(torch.equal(one.args[0][0], image) for one in samples for image in timed)


@pytest.mark.parametrize(
    ("batch", "found"), [(1, [[0], [1], [2], [3]]), (3, [[0, 1, 2], [3, 0, 1]]), (6, [[0, 1, 2, 3, 0, 1]])]
)
def test_samples_are_put_side_by_side(batch: int, found: list[list[int]]) -> None:
    samples = [
        ExampleInputs((torch.full((1, 2), index), "word"), {"y": [torch.full((1,), index)]}) for index in range(4)
    ]
    made = bench.in_batches(samples, batch)
    assert [one.args[0][:, 1].tolist() for one in made] == found
    assert [one.kwargs["y"][0].tolist() for one in made] == found
    assert {one.args[1] for one in made} == {"word"}
    assert {bench.batch_size(one) for one in made} == {batch}


ENGINES = {"fxcompress": functools.partial(bench.compiled, passes="int8")} | {
    name: peer.build
    for name, peer in peers.PEERS.items()
    if name != "torchao"  # which builds C++ for a minute
}


@pytest.mark.filterwarnings("ignore")  # of other projects
@pytest.mark.parametrize("engine", list(ENGINES))
def test_an_engine_has_the_same_numbers_at_every_batch_size(engine: str) -> None:
    if engine in peers.PEERS and peers.PEERS[engine].missing:
        pytest.skip(f"{peers.PEERS[engine].missing} is not installed")
    torch.manual_seed(0)
    x = 3 * torch.randn(6, 3, 8, 8)
    with torch.inference_mode(mode=engine != "openvino"):
        alone, together = (ENGINES[engine](Small().eval(), ExampleInputs.of(part))() for part in (x[:1], x))
    assert together.shape == (6, 5)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-6)  # other scales would move it by 1e-3


@pytest.mark.filterwarnings("ignore")
def test_torchao_takes_a_layer_that_is_called_twice() -> None:
    if peers.PEERS["torchao"].missing:
        pytest.skip("torchao is not installed")
    from torchvision.models.resnet import BasicBlock

    inputs = ExampleInputs.of(torch.randn(1, 8, 8, 8))
    quantized = peers.quantized_torchao(BasicBlock(8, 8).eval(), inputs)
    assert sum("quantize_per_tensor" in str(node.target) for node in quantized.graph.nodes) >= 4


def test_float_graphs_and_keywords_are_measured_too() -> None:
    x = torch.randn(2, 3, 8, 8)
    compact = fxc.compile(Small().eval(), "fuse", {"x": x})
    times = time_layers(compact, ExampleInputs((), {"x": x}), rounds=1, peak=1e9)
    assert not times.by_kernels
    assert (times.inside, times.outside) == (None, None)
    assert {layer.layer for layer in times.layers} >= {"first", "deep", "last"}


def test_the_peak_is_that_of_large_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_layers, "_LARGE", ((64, 64, 64),))
    with torch.inference_mode():
        assert 1e6 < bench_layers.int8_peak(seconds=0.01) < 1e15
