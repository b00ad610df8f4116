"""Recording and replaying of graphs: with a recorder that only pretends, and with CUDA graphs where there is a GPU."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

import fxcompress as fxc
from fxcompress.emit.compact_module import CompactModule
from fxcompress.emit.cuda import device
from fxcompress.emit.cuda.graphs import CudaRecorder, Replays
from fxcompress.emit.cuda.pointwise import CudaAdd, CudaEnter

HOME = "cuda" if torch.cuda.is_available() else "cpu"


class Pretender:
    """Does again what it was told, and writes the result where the first one lies, as a CUDA graph does."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        result = run()

        def again() -> None:
            self.replayed += 1
            for old, new in zip(tree_leaves(result), tree_leaves(run()), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return again, result

    def before(self) -> None:
        pass

    def after(self) -> None:
        pass


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers by PyTorch's operators: what they compute is no concern here."""
    if HOME == "cpu":
        monkeypatch.setenv(device.VARIABLE, "off")


class Branching(nn.Module):
    """Looks at a number: no recording can hold that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if float(x.sum()) > 0 else x - 1


def module(*middle: nn.Module) -> tuple[CompactModule, Pretender]:
    """A graph that adds two inputs in fp16 and returns their sum twice, in a dict, with a number."""
    graph = fx.Graph()
    left, right = graph.placeholder("left"), graph.placeholder("right")
    node = graph.call_module("add", (graph.call_module("enter", (left,)), graph.call_module("enter", (right,))))
    for index in range(len(middle)):
        node = graph.call_module(f"middle{index}", (node,))
    graph.output({"sum": node, "again": (node, 3)})
    root = nn.Module()
    root.enter, root.add = CudaEnter(), CudaAdd(None, None, None)
    root.register_buffer("kept", torch.zeros(1))
    for index, one in enumerate(middle):
        root.add_module(f"middle{index}", one)
    compact = CompactModule(root, graph).eval().to(HOME)
    pretender = Pretender()
    if HOME == "cpu":
        compact._replays = Replays(pretender)
    else:
        record = compact._replays.recorder.record

        def counted(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            pretender.recorded += 1
            again, result = record(run)

            def counting() -> None:
                pretender.replayed += 1
                again()

            return counting, result

        compact._replays.recorder.record = counted  # type: ignore[method-assign]
    return compact, pretender


def inputs(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(rows, 3, device=HOME), torch.randn(rows, 3, device=HOME)


def expected(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.half() + right.half()


def test_the_second_call_records_and_later_ones_replay() -> None:
    compact, recorder = module()
    for turn in range(5):
        given = inputs(2, turn)
        found = compact(*given)
        assert torch.equal(found["sum"], expected(*given))
        assert found["again"][1] == 3
        assert (recorder.recorded, recorder.replayed) == (min(turn, 1), turn)


def test_results_and_inputs_are_not_overwritten() -> None:
    compact, _ = module()
    given = [inputs(2, turn) for turn in range(5)]
    before = [(left.clone(), right.clone()) for left, right in given]
    found = [compact(*pair) for pair in given]
    for pair, kept, result in zip(given, before, found, strict=True):
        assert torch.equal(pair[0], kept[0])
        assert torch.equal(result["sum"], expected(*kept))


def test_every_combination_of_shapes_has_a_recording_of_its_own() -> None:
    compact, recorder = module()
    for turn in range(3):
        for rows in (1, 2, 5):
            given = inputs(rows, turn)
            assert torch.equal(compact(*given)["sum"], expected(*given))
            turned = (given[0].t().contiguous().t(), given[1])  # the same shape in another layout
            assert torch.equal(compact(*turned)["sum"], expected(*given))
    assert recorder.recorded == 5  # a single row has one layout


def test_recordings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replays, "limit", 3)
    compact, recorder = module()
    for rows in (1, 2, 3, 4, 5, 1):
        for turn in range(2):
            given = inputs(rows, turn)
            assert torch.equal(compact(*given)["sum"], expected(*given))
    assert len(compact._replays.recordings) == 3
    assert recorder.recorded == 6  # the first one had to go, and came again


@pytest.mark.skipif(HOME == "cpu", reason="only a GPU refuses")
def test_a_gpu_refuses_to_record_what_looks_at_numbers() -> None:
    compact, _ = module(Branching())
    for turn in range(4):
        given = inputs(2, turn)
        total = expected(*given)
        assert torch.equal(compact(*given)["sum"], total + 1 if total.sum() > 0 else total - 1)
    assert compact._replays.refused


def test_what_cannot_be_recorded_runs_node_by_node_ever_after(monkeypatch: pytest.MonkeyPatch) -> None:
    compact, recorder = module()
    attempts = []

    def refuse(run: Callable[[], Any]) -> Any:
        attempts.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(compact._replays.recorder, "record", refuse)
    for turn in range(4):
        given = inputs(2, turn)
        assert torch.equal(compact(*given)["sum"], expected(*given))
    assert len(attempts) == 1
    assert recorder.replayed == 0
    assert "not permitted" in next(iter(compact._replays.refused.values()))


@pytest.mark.parametrize("how", ["executor", "training", "hook", "gradient", "list"])
def test_nothing_is_recorded_where_somebody_looks_on(how: str) -> None:
    compact, recorder = module()
    seen: list[Any] = []
    if how == "executor":
        compact.executor = "graph"
    elif how == "training":
        held = compact._replays
        compact.train()
        compact._replays = held
    elif how == "hook":
        compact.get_submodule("add").register_forward_hook(lambda *given: seen.append(1))
    for turn in range(3):
        left, right = inputs(2, turn)
        if how == "gradient":
            left.requires_grad_()
        found = compact(left, right=right) if how != "list" else compact(left.clone().as_subclass(Special), right)
        assert torch.equal(found["sum"].as_subclass(torch.Tensor), expected(left, right).detach())
    assert recorder.recorded == 0
    assert len(seen) == (3 if how == "hook" else 0)


class Special(torch.Tensor):
    """A tensor of another class, which may do anything."""


def test_threads_get_results_of_their_own() -> None:
    compact, _ = module()
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(30):
            given = (torch.full((2, 3), float(number), device=HOME), torch.full((2, 3), float(turn), device=HOME))
            if not torch.equal(compact(*given)["sum"], expected(*given)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_copies_and_changes_start_anew() -> None:
    compact, recorder = module()
    for turn in range(3):
        compact(*inputs(2, turn))
    for twin in (copy.deepcopy(compact), pickle.loads(pickle.dumps(compact)), copy.copy(compact)):
        assert twin._replays is not compact._replays
        assert not twin._replays.recordings
        assert torch.equal(twin(*inputs(2))["sum"], expected(*inputs(2)))
    for change in (
        lambda: compact.repack(),
        lambda: compact.to(HOME),
        lambda: compact.load_state_dict({}, strict=False),
    ):
        compact._replays = Replays(recorder)
        compact(*inputs(2))
        change()
        assert not compact._replays.recordings


def test_inference_mode_may_come_and_go() -> None:
    compact, recorder = module()
    for turn in range(6):
        given = inputs(2, turn)
        with torch.inference_mode(turn % 2 == 1):
            assert torch.equal(compact(*given)["sum"], expected(*given))
    assert recorder.replayed == 5


@pytest.mark.skipif(HOME == "cpu", reason="there is one device only")
def test_inputs_on_the_cpu_are_copied_to_the_gpu() -> None:
    compact, _ = module()
    for turn in range(3):
        left, right = inputs(2, turn)
        found = compact(left.cpu(), right)
        assert found["sum"].device.type == "cuda"
        assert torch.equal(found["sum"], expected(left, right))
    assert isinstance(fxc.emit.cuda.graphs.CudaRecorder(), CudaRecorder)
