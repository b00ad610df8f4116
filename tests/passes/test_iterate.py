"""Pruning in steps: what every step aims at, what it reaches, and back to earlier values."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils.data import DataLoader, Dataset

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.analysis.budget import Budget, read_budget
from fxcompress.analysis.cost import cost
from fxcompress.analysis.schedule import SCHEDULES, Way
from fxcompress.errors import BudgetError, OptionError, PassError, PassOrderError, UnsupportedError
from fxcompress.graph.compare import run
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import graph_info
from fxcompress.pipeline.text import parse, print_pipeline

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LOADER = [(X, torch.arange(16) % 4), (X.flip(0), torch.arange(16).flip(0) % 4)]


class Net(nn.Module):
    """Residual, with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        self.conv3, self.bn3 = nn.Conv2d(48, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x))))))
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def compiled(passes: object) -> tuple[fxc.CompactModule, list[tuple[str, fx.GraphModule]]]:
    """The result, and the graph behind every pass."""
    kept: list[tuple[str, fx.GraphModule]] = []

    def keep(name: str, graph: fx.GraphModule) -> None:
        kept.append((name, copy.deepcopy(graph)))

    return fxc.compile(Net().eval(), passes, X, train_data=LOADER, dump=keep), kept


def sparsity(graph: fx.GraphModule) -> float:
    weights = [graph.get_parameter(f"{name}.weight") for name in ("conv1", "conv2", "conv3", "fc")]
    return float(sum((weight == 0).sum() for weight in weights)) / sum(weight.numel() for weight in weights)


# -- the way ---------------------------------------------------------------------------------------------------------


def test_schedules_in_numbers() -> None:
    def amounts(schedule: str) -> list[float]:
        return [Way(schedule, share).gone(0.8) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]

    assert amounts("linear") == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert amounts("constant") == pytest.approx([0.0, 0.33126, 0.552786, 0.70093, 0.8])
    # Zhu and Gupta: s_t = s_f + (s_i - s_f) (1 - t)^3
    assert amounts("cubic") == pytest.approx([0.8 - 0.8 * (1 - t) ** 3 for t in (0.0, 0.25, 0.5, 0.75, 1.0)])
    left = [1.0 - amount for amount in amounts("constant")]
    assert [after / before for before, after in pairwise(left)] == pytest.approx([0.2**0.25] * 4, rel=1e-5)


@given(st.sampled_from(sorted(SCHEDULES)), st.floats(0.01, 0.99), st.floats(0, 1), st.floats(0, 1))
def test_schedules_go_from_the_start_to_the_goal(schedule: str, amount: float, one: float, other: float) -> None:
    assert Way(schedule, 0.0).gone(amount) == 0
    assert Way(schedule, 1.0).gone(amount) == pytest.approx(amount, abs=1e-6)
    low, high = sorted((one, other))
    assert 0 <= Way(schedule, low).gone(amount) <= Way(schedule, high).gone(amount) + 1e-6


@pytest.mark.parametrize(
    "text", ["macs:0.25:cubic:0.4", "parameters:1000:linear:0.5", "latency:5.0ms:batch16:constant:1.0"]
)
def test_budgets_on_the_way_print_and_read_back(text: str) -> None:
    assert str(read_budget(text)) == text


def test_budgets_on_the_way_lie_between() -> None:
    assert Budget.of("macs:0.25:linear:0.5").target(1000) == 625
    assert Budget.of("macs:250:linear:0.5").target(1000) == 625
    assert Budget.of("macs:250:constant:0.5").target(1000) == pytest.approx(500)
    assert Budget.of("macs:2000:linear:0.5").target(1000) == 1000  # larger than the network
    assert read_budget("latency:2ms:linear:0.5").target(4.0) == 3.0
    with pytest.raises(OptionError, match="between 0 and 1"):
        Budget.of("macs:0.25:linear:1.5")
    with pytest.raises(OptionError, match="did you mean 'cubic'"):
        Way("cubix", 0.5)


# -- steps -----------------------------------------------------------------------------------------------------------


def test_the_group_is_its_steps() -> None:
    item = P.Iterate(P.MaskWeights(0.8), P.Train(epochs=2), steps=2, schedule="linear")
    assert print_pipeline(list(item.parts())) == (
        "mask-weights{amount=0.4}, train{epochs=2}, mask-weights{amount=0.8}, train{epochs=2, seed=1}"
    )
    item = P.Iterate("prune-channels{budget=macs:0.25}", steps=2, rewind=True, train_first=True)
    assert print_pipeline(list(item.parts())) == (
        "remember-weights, train{seed=2}, mask-channels{budget=macs:0.25:cubic:0.5}, rewind-weights, train, "
        "mask-channels{budget=macs:0.25}, rewind-weights, train{seed=1}, remove-channels"
    )
    item = P.Iterate([P.PruneChannels(ratios={"conv2": 0.5}), P.MaskWeights(0.5)], ["train", "fuse"], 2, "linear")
    assert print_pipeline(list(item.parts())) == (
        "mask-channels{ratios=[conv2:0.25]}, mask-weights{amount=0.25}, train, fuse, "
        "mask-channels{ratios=[conv2:0.5]}, mask-weights, train{seed=1}, fuse, remove-channels"
    )


def test_short_steps_see_different_batches() -> None:
    class Numbered(Dataset[tuple[torch.Tensor, int]]):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            self.seen.append(index)
            return X[index % 16], index % 4

    def batches(item: P.Iterate) -> list[frozenset[int]]:
        data = Numbered()
        fxc.compile(Net().eval(), [item], X, train_data=DataLoader(data, batch_size=4, shuffle=True))
        return [frozenset(data.seen[start : start + 4]) for start in range(0, len(data.seen), 4)]

    item = P.Iterate(P.MaskWeights(0.5), P.Train(steps=1, seed=5), steps=4)
    assert len(set(batches(item))) == 4
    assert batches(item) == batches(item)
    assert set(batches(item)) != set(batches(replace(item, train=P.Train(steps=1, seed=50))))


@pytest.mark.parametrize(
    "item",
    [
        P.Iterate(P.MaskWeights(0.8), P.Train(epochs=2), 3, "constant", True),
        P.Iterate([P.PruneChannels(0.3), "mask-weights{scope=layer}"], [P.Train(), P.Train(epochs=3)]),
    ],
)
def test_it_prints_as_text_that_reads_back(item: P.Iterate) -> None:
    assert parse(str(item)) == [item]
    assert parse(print_pipeline(list(item.parts()))) == list(item.parts())


def test_text_as_people_write_it() -> None:
    text = "iterate{prune=mask-weights{amount=0.8}, train=train{epochs=2}, steps=3}, fuse"
    assert parse(text) == [P.Iterate(P.MaskWeights(0.8), P.Train(epochs=2), 3), P.Fuse()]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_masks_a_little_more_and_the_last_one_the_amount(schedule: str) -> None:
    result, kept = compiled(P.Iterate(P.MaskWeights(0.8), steps=4, schedule=schedule))
    found = [sparsity(graph) for name, graph in kept if name == "mask-weights"]
    wanted = [Way(schedule, share).gone(0.8) for share in (0.25, 0.5, 0.75, 1.0)]
    assert found == pytest.approx(wanted, abs=1e-4)
    trained = [graph for name, graph in kept if name == "train"]
    assert [sparsity(graph) for graph in trained] == pytest.approx(found, abs=1e-3)
    masks = [graph_info(graph).masks["conv2.weight"] for graph in trained]
    assert all(not (later & ~earlier).any() for earlier, later in pairwise(masks))
    assert result.report is not None
    assert [row.name for row in result.report.passes[1:]] == [
        text for item in P.Iterate(P.MaskWeights(0.8), steps=4, schedule=schedule).parts() for text in [str(item)]
    ]
    weights = [graph.get_parameter("conv2.weight") for graph in trained]
    assert not torch.equal(weights[0] * masks[1], weights[1])  # it has trained in between


BUDGETS = ["macs:0.3", "parameters:0.4", "bytes:0.5", "macs:600000"]


@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_are_met_at_the_end_with_steps_on_the_way(budget: str) -> None:
    result, kept = compiled(P.Iterate(P.PruneChannels(budget=budget), steps=3, schedule="linear"))
    quantity = budget.partition(":")[0]
    sizes = [getattr(cost(graph), quantity) for _, graph in kept]
    goal = Budget.of(budget).target(sizes[0])
    assert getattr(cost(result), quantity) == pytest.approx(goal, rel=0.03)
    # what is masked at a step, removed for a look
    looks = [
        fxc.PassManager([P.RemoveChannels()]).run(graph, X).graph_module for name, graph in kept if name == "train"
    ]
    reached = [getattr(cost(graph), quantity) for graph in looks]
    wanted = [sizes[0] + (goal - sizes[0]) * share for share in (1 / 3, 2 / 3, 1.0)]
    assert reached == pytest.approx(wanted, rel=0.04)
    before = run(kept[-2][1], ExampleInputs.of(X))
    assert torch.allclose(run(result, ExampleInputs.of(X)), before, atol=1e-4)


def test_ratios_are_shares_of_the_whole_network() -> None:
    result, kept = compiled(P.Iterate(P.PruneChannels(0.5, scope="layer"), steps=4))
    assert result.conv2.out_channels == 24  # type: ignore[union-attr]
    assert result.conv1.out_channels == 16  # type: ignore[union-attr]
    graphs = [graph for name, graph in kept if name == "mask-channels"]
    dead = [int((graph.get_parameter("conv2.weight").flatten(1) == 0).all(1).sum()) for graph in graphs]
    assert dead == [int(48 * Way("cubic", share).gone(0.5)) for share in (0.25, 0.5, 0.75, 1.0)]


def test_only_the_last_budget_has_to_be_met() -> None:
    """Steps of eight channels cannot meet every point on the way."""
    item = P.PruneChannels(budget="macs:0.338", round_to=16)
    result, kept = compiled(P.Iterate(item, steps=5, schedule="linear"))
    masked = [graph for name, graph in kept if name == "mask-channels"]
    looks = [fxc.PassManager([P.RemoveChannels()]).run(graph, X).graph_module for graph in masked]
    full = cost(kept[0][1]).macs
    wanted = [Way("linear", step / 5).left(full, 0.338 * full) for step in (1, 2, 3, 4)]
    for graph, least in zip(looks, wanted, strict=False):
        assert cost(graph).macs >= least  # nothing comes back on the way
    assert (result.conv1.out_channels, result.conv2.out_channels) == (16, 32)  # type: ignore[union-attr]
    with pytest.raises(BudgetError, match="within 3 %"):
        compiled(P.Iterate(P.PruneChannels(budget="macs:0.45", round_to=16), steps=5))


# -- rewinding -------------------------------------------------------------------------------------------------------


def state(graph: fx.GraphModule) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in graph.state_dict().items() if tensor.is_floating_point()}


def test_what_survives_goes_back_to_the_start() -> None:
    _, kept = compiled(P.Iterate(P.MaskWeights(0.6), steps=3, rewind=True))
    start = state(kept[1][1])
    assert kept[1][0] == "remember-weights"
    for (before, earlier), (name, graph) in pairwise(kept):
        if name != "rewind-weights":
            continue
        assert before == "mask-weights"
        masks = graph_info(graph).masks
        for key, tensor in state(graph).items():
            assert torch.equal(tensor, start[key] * masks[key] if key in masks else start[key]), key
        trained = not torch.equal(state(earlier)["bn1.running_mean"], start["bn1.running_mean"])
        assert trained == (earlier is not kept[2][1])
    ends = [graph for name, graph in kept if name == "train"]
    assert not torch.equal(state(ends[-1])["fc.weight"], start["fc.weight"])


def test_channels_that_survive_keep_the_values_of_the_start() -> None:
    """With nothing trained after the last rewinding, the removed network holds the values of the start."""
    passes = list(P.Iterate(P.PruneChannels(0.5, scope="layer"), steps=3, rewind=True).parts())
    result, kept = compiled([*passes[:-2], passes[-1]])
    masked = kept[-2][1]
    weight, start = state(masked)["conv2.weight"], state(kept[0][1])["conv2.weight"]
    rows, columns = ~(weight == 0).all(3).all(2).all(1), ~(weight == 0).all(3).all(2).all(0)
    assert (int(rows.sum()), int(columns.sum())) == (24, 16)
    assert torch.equal(result.get_parameter("conv2.weight"), start[rows][:, columns])
    assert torch.allclose(run(result, ExampleInputs.of(X)), run(masked, ExampleInputs.of(X)), atol=1e-5)


def test_tickets_are_drawn_by_trained_weights() -> None:
    def masks(train_first: bool) -> torch.Tensor:
        item = P.Iterate(
            P.MaskWeights(0.5), P.Train(epochs=5, learning_rate=0.03), 1, rewind=True, train_first=train_first
        )
        _, kept = compiled(item)
        return graph_info(kept[-1][1]).masks["conv2.weight"]

    start = Net().conv2.weight.detach()
    untrained, trained = masks(False), masks(True)
    assert float(start[~untrained].abs().mean()) < float(start[~trained].abs().mean())
    assert not torch.equal(untrained, trained)


def test_rewinding_needs_something_to_go_back_to() -> None:
    with pytest.raises(PassError, match="put remember-weights before it"):
        compiled("rewind-weights")
    with pytest.raises(PassError, match="another shape"):
        compiled("remember-weights, prune-channels{ratio=0.5}, rewind-weights")


def test_remembering_changes_nothing_and_rewinding_twice_changes_nothing_more() -> None:
    result, _ = compiled("remember-weights, train, rewind-weights, rewind-weights")
    assert result.report is not None
    rows = result.report.passes
    assert [row.modified for row in rows[1:]] == [False, True, True, False]
    assert torch.allclose(run(result, ExampleInputs.of(X)), run(Net().eval(), ExampleInputs.of(X)), atol=1e-5)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "prune must be a pass"),
        ({"prune": "fuse"}, "prune must be a pass"),
        ({"prune": P.MaskWeights(pattern="2:4")}, "prune must be a pass"),
        ({"prune": P.MaskWeights(0.5), "steps": 0}, "steps must be a positive whole number"),
        ({"prune": P.MaskWeights(0.5), "schedule": "cubix"}, "did you mean 'cubic'"),
        ({"prune": 3}, "passes must be"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        P.Iterate(**options)


def test_inner_passes_are_held_to_the_order_of_stages() -> None:
    with pytest.raises(PassOrderError, match="takes a graph of stage FLOAT"):
        compiled(["insert-observers", P.Iterate(P.MaskWeights(0.5))])
    with pytest.raises(PassOrderError, match="takes a graph of stage FLOAT, but would meet OBSERVED"):
        compiled(P.Iterate(P.MaskWeights(0.5), "insert-observers, train"))
    with pytest.raises(UnsupportedError, match="stands for several passes"):
        P.Iterate(P.MaskWeights(0.5)).run(fxc.trace(Net().eval(), X), fxc.PassContext(ExampleInputs.of(X)))
