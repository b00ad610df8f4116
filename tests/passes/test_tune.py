"""Tune: what measures faster is taken, nothing else changes, and choices stay on their machine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.analysis.latency import Pair
from fxcompress.emit import artifact
from fxcompress.emit.compact_module import CompactModule
from fxcompress.emit.native import executor, library, tuning
from fxcompress.emit.native.plan import PythonCall
from fxcompress.errors import ArtifactError, PassOrderError
from fxcompress.graph.metadata import KernelChoices, graph_info, info
from fxcompress.testing import check_pass
from tests.kernels import NEEDED
from tests.strategies import Program, example, programs

pytestmark = [
    NEEDED,
    pytest.mark.xdist_group("native"),
]

BATCH = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.three = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.two(torch.relu(self.one(x))))
        out: torch.Tensor = self.head(torch.relu(self.three(x)).mean((2, 3)))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def tuned(monkeypatch: pytest.MonkeyPatch, *model: float, **layers: float) -> CompactModule:
    """Compile while the clock says these ratios, of the model, one after the other, and of layers; 1 otherwise."""
    left = list(model)
    monkeypatch.setattr(tuning, "in_turns", lambda *_: Pair(1.0, left.pop(0) if left else 1.0))
    monkeypatch.setattr(tuning, "_time_layer", lambda node, *_: Pair(1.0, layers.get(info(node).layer, 1.0)))
    return fxc.compile(net(), "int8", BATCH, calibration=[BATCH], tune=True)


def choices(compact: CompactModule) -> KernelChoices:
    found = graph_info(compact).kernels
    assert found is not None
    return found


def python_calls(compact: CompactModule) -> list[str]:
    compact(BATCH)
    made = compact._native.made
    assert made is not None
    (bound,) = [plan for plan in made.plans.values() if plan is not None]
    return [item.name for item in bound.plan.items if isinstance(item, PythonCall)]


def cut_of(compact: CompactModule) -> int | None:
    """How many steps are taken image by image."""
    compact(BATCH)
    made = compact._native.made
    assert made is not None
    (bound,) = [plan for plan in made.plans.values() if plan is not None]
    return None if bound.single is None else bound.single.cut


def notes(compact: CompactModule, layer: str) -> list[str]:
    assert compact.report is not None
    return [text for line in compact.report.layers if line.layer == layer for text in line.notes]


def test_nothing_is_chosen_that_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    compact = tuned(monkeypatch)
    assert choices(compact) == KernelChoices(executor.machine())
    assert any("kernels: ours (1000 us by ours, 1000 us by PyTorch's)" in text for text in notes(compact, "two"))
    assert all("not taken" in text for text in notes(compact, "tune"))
    assert not python_calls(compact)


def test_layers_that_pytorch_computes_faster_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    compact = tuned(monkeypatch, 0.9, 0.85, two=0.5)
    (name,) = choices(compact).calls
    assert python_calls(compact) == [name]
    assert any("kernels: PyTorch's (1000 us by ours, 500 us by PyTorch's)" in text for text in notes(compact, "two"))
    assert any("1 layers by PyTorch's kernels: 0.90 of the time, taken" in text for text in notes(compact, "tune"))
    plain = fxc.compile(net(), "int8", BATCH, calibration=[BATCH])
    assert not python_calls(plain)
    torch.testing.assert_close(compact(BATCH), plain(BATCH), rtol=0, atol=0.05)


def test_a_faster_layer_in_a_slower_model_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    compact = tuned(monkeypatch, 0.99, two=0.5)
    assert not choices(compact).calls
    assert not python_calls(compact)


def test_what_is_faster_by_chance_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    compact = tuned(monkeypatch, 0.9, 0.99, two=0.5)
    assert not choices(compact).calls


def test_batches_are_cut_where_it_is_fastest_and_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fxc.compile(net(), "int8", BATCH, calibration=[BATCH])
    expected = plain(BATCH)
    assert cut_of(plain) is not None  # of these images, each is taken by itself
    together = tuned(monkeypatch, 0.5, 0.5)
    assert choices(together).cuts == {"4x3x12x12": 0}
    assert cut_of(together) is None
    torch.testing.assert_close(together(BATCH), expected, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_cut_gives_the_same_numbers(threads: int) -> None:
    compact = fxc.compile(net(), "int8", BATCH, calibration=[BATCH])
    expected = compact(BATCH)
    kernels = library.library()
    assert kernels is not None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen = set()
        for cut in range(20):
            run = executor.Executor(compact, kernels, KernelChoices("", cuts={"4x3x12x12": cut}))
            torch.testing.assert_close(run(BATCH), expected, rtol=0, atol=0)
            (bound,) = run.plans.values()
            assert bound is not None
            seen.add(bound.single and bound.single.cut)
            items = len(bound.plan.items)
        assert seen == {None, *range(1, items + 1)}
    finally:
        torch.set_num_threads(before)


def test_choices_are_saved_and_forgotten_on_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cut = tuned(monkeypatch, 0.5, 0.5)
    cut.save(tmp_path / "cut.fxc")
    assert choices(fxc.load(tmp_path / "cut.fxc")) == choices(cut)
    assert cut_of(fxc.load(tmp_path / "cut.fxc")) is None
    compact = tuned(monkeypatch, 0.9, 0.85, two=0.5)
    compact.save(tmp_path / "model.fxc")
    loaded = fxc.load(tmp_path / "model.fxc")
    assert choices(loaded) == choices(compact)
    assert python_calls(loaded) == python_calls(compact) != []
    monkeypatch.setattr(executor, "machine", lambda: "another one")
    assert not python_calls(fxc.load(tmp_path / "model.fxc"))


@pytest.mark.parametrize(
    "kernels",
    [{"machine": 3, "calls": [], "cuts": {}}, {"machine": "", "calls": [1], "cuts": {}}, [],
     {"machine": "", "calls": "conv", "cuts": {"4": -1}}, {"machine": "", "calls": []}],
)  # fmt: skip
def test_damaged_choices_are_refused(kernels: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compact = fxc.compile(net(), "int8", BATCH, calibration=[BATCH])
    monkeypatch.setattr(artifact, "_describe_kernels", lambda _: kernels)
    with pytest.raises(ArtifactError, match="is not understood where it says"):
        compact.save(tmp_path / "model.fxc")


def test_without_kernels_the_report_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXCOMPRESS_NATIVE", "off")
    compact = fxc.compile(net(), "int8", BATCH, calibration=[BATCH], tune=True)
    assert notes(compact, "tune") == ["nothing to choose: FXCOMPRESS_NATIVE=off"]


def test_a_graph_whose_shapes_depend_on_numbers_runs_node_by_node() -> None:
    class Chosen(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.one(x))
            return x[x > 0.5]

    compact = fxc.compile(Chosen().eval(), "int8", BATCH, calibration=[BATCH], tune=True)
    (note,) = notes(compact, "tune")
    assert "depends on more than the shapes" in note
    assert graph_info(compact).kernels is None


def test_a_graph_that_is_not_lowered_has_nothing_to_tune() -> None:
    with pytest.raises(PassOrderError, match="tune"):
        fxc.compile(net(), [P.Fuse()], BATCH, tune=True)


def test_real_clocks_choose_something_that_computes_the_same() -> None:
    model = net()
    plain = fxc.compile(model, "int8", BATCH, calibration=[BATCH])
    before = torch.get_rng_state()
    compact = fxc.compile(model, "int8", BATCH, calibration=[BATCH], tune=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(compact(BATCH), plain(BATCH), rtol=0, atol=0.05)
    assert any("us by ours" in text for text in notes(compact, "head"))
    check_pass(P.Tune(), plain, BATCH)


@given(programs(max_steps=8), st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_whatever_the_clock_says_the_model_computes_the_same(model: Program, seed: int) -> None:
    data = example(4).float()
    plain = fxc.compile(model.float(), "int8", data, calibration=[data], verify=False)
    expected = plain(data).detach()
    assume(1e-3 < float(expected.abs().max()) < 1e4)
    clock = random.Random(seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuning, "in_turns", lambda *calls: [call() for call in calls[:2]] and Pair(1.0, clock.random()))
        compact = fxc.compile(model.float(), "int8", data, calibration=[data], verify=False, tune=True)
    noise = (compact(data).detach() - expected).double().square().mean()
    assert noise == 0 or 10 * torch.log10(expected.double().square().mean() / noise) >= 35
