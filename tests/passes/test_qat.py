"""Training with fake quantisation: what it sees is what is deployed, with and without batch norms, for every format."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.emit.cpu_int8 import Int8Conv, Int8Layer
from fxcompress.errors import InputError, OptionError, PassOrderError
from fxcompress.graph.compare import run
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import graph_info
from fxcompress.pipeline.text import parse
from fxcompress.quant.arithmetic import signal_to_noise
from fxcompress.quant.fake_quantize import FakeQuantize, LearnedQuantize
from fxcompress.quant.normed_layers import NormedLayer
from fxcompress.testing import assert_graph
from fxcompress.train.masks import hold_masks
from fxcompress.train.modes import training
from tests.strategies import Program, programs, randomise_statistics

X = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Residual blocks with batch norms, one pair called twice, a transposed layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, momentum=0.3)
        self.up, self.bn4 = nn.ConvTranspose2d(6, 4, 1), nn.BatchNorm2d(4)
        self.conv5 = nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, 5)
        randomise_statistics(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        x = F.relu(self.bn3(self.conv3(F.relu(self.bn3(self.conv3(x))))))
        x = F.relu(self.bn4(self.up(x)))
        logits: torch.Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(self.conv5(x), 1), 1))
        return logits


def inserted(model: nn.Module, x: torch.Tensor = X, before: tuple[Any, ...] = (), **options: Any) -> fx.GraphModule:
    manager = fxc.PassManager([*before, P.InsertObservers(qat=True, **options)])
    return manager.run(fxc.trace(model.eval(), x), x).graph_module


def train(
    graph: fx.GraphModule,
    steps: int = 6,
    x: torch.Tensor = X,
    first: int = 0,
    total: int | None = None,
    rate: float = 1e-3,
) -> None:
    """A training loop that tells the modules how far it has come."""
    parameters = [parameter for parameter in graph.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=rate, weight_decay=1e-3)
    with training(graph):
        for index in range(first, first + steps):
            for module in graph.modules():
                if isinstance(module, (FakeQuantize, NormedLayer)):
                    module.follow_training(index / (total or steps))
            batch = torch.roll(x, index, 0) + 0.1 * index
            optimiser.zero_grad()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(index)
                graph(batch).square().mean().backward()
            optimiser.step()
            hold_masks(graph)


def converted(graph: fx.GraphModule, x: torch.Tensor = X) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph with pairs, and the lowered one."""
    pairs = fxc.PassManager([P.ConvertObserved()]).run(graph, x).graph_module
    return pairs, fxc.PassManager([P.Lower("cpu")]).run(pairs, x).graph_module


def run_with_gradients(graph: fx.GraphModule, x: torch.Tensor) -> bool:
    """Whether there is something to train."""
    return bool(graph(x).requires_grad)


def noise(reference: nn.Module, result: nn.Module, x: torch.Tensor = X) -> float:
    return signal_to_noise(run(reference, ExampleInputs.of(x)), run(result, ExampleInputs.of(x)))


# -- what is inserted ------------------------------------------------------------------------------------------------


def test_layers_are_joined_with_their_batch_norms_and_planned_as_they_are_deployed() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.b(F.relu(self.norm(self.a(x)) + x))
            return y

    graph = inserted(Two())
    assert_graph(
        graph,
        """
        stage OBSERVED
        %0 = placeholder x
        %1 = module observers.x: LearnedQuantize(%0)
        %2 = module a: NormedConv2d(%1)
        %3 = add(%2, %1)  # epilogue of a
        %4 = relu(%3)  # epilogue of a
        %5 = module observers.relu: LearnedQuantize(%4)
        %6 = attribute b.weight
        %7 = module observers.b_weight: LearnedQuantize(%6)
        %8 = conv_function(%5, %7, stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        %9 = output(%8)
        """,
        shapes=False,
    )
    names = {name for name, _ in graph.named_parameters()}
    assert {"a.weight", "a.bias", "a.norm.weight", "a.norm.bias", "a.quantizer.step", "b.weight"} <= names
    fused = inserted(Two(), before=("fuse",))
    assert [node.name for node in fused.graph.nodes if node.name.startswith("observers")] == [
        "observers_x", "observers_a_weight", "observers_relu", "observers_b_weight"
    ]  # fmt: skip


def test_batch_norms_that_cannot_be_folded_stay() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.twice = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.twice(F.relu(self.twice(self.a(F.relu(self.norm(x))))))
            return y

    result = fxc.PassManager([P.InsertObservers(qat=True)]).run(fxc.trace(Apart().eval(), X), X)
    assert isinstance(result.graph_module.get_submodule("norm"), nn.BatchNorm2d)
    assert any("not joined" in str(note) and "twice" in str(note) for note in result.rows[-1].notes)
    assert not any(isinstance(module, NormedLayer) for module in result.graph_module.modules())


def test_masks_go_with_the_parameters() -> None:
    graph = inserted(Net(), before=(P.MaskChannels(0.3), P.MaskWeights(0.5)))
    masks = graph_info(graph).masks
    assert "conv1.norm.weight" in masks
    assert not any(path.startswith("bn1") for path in masks)
    train(graph)
    parameters = dict(graph.named_parameters())
    for path, mask in masks.items():
        assert not parameters[path][~mask].any()
    pairs, lowered = converted(graph)
    assert noise(pairs, lowered) > 80
    assert not pairs.get_parameter("conv1.weight")[~masks["conv1.weight"]].any()
    assert set(graph_info(pairs).masks) <= {name for name, _ in pairs.named_parameters()}


# -- what is deployed ------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "learned": {},
    "followed": {"learn_steps": False},
    "minmax": {"learn_steps": False, "activation": "minmax", "weight": "minmax"},
    "w4a8": {"weight_bits": 4},
    "w3a4": {"weight_bits": 3, "activation_bits": 4},
    "float layers": {"ignore": ("conv2", "fc")},
}


@pytest.mark.parametrize("before", [(), ("fuse",), (P.PruneChannels(0.3),)], ids=["norms", "fused", "pruned"])
@pytest.mark.parametrize("case", OPTIONS)
def test_what_training_saw_is_what_the_lowered_graph_computes(case: str, before: tuple[Any, ...]) -> None:
    graph = inserted(Net(), before=before, **OPTIONS[case])
    start = copy.deepcopy(graph)
    train(graph)
    pairs, lowered = converted(graph)
    x = X[:5] * 1.5
    assert noise(graph, pairs, x) > (50 if case != "w3a4" else 35)
    assert noise(pairs, lowered, x) > 80
    assert noise(graph, lowered, x) > 35
    assert noise(start, lowered, x) < 35  # it is something else that was there before
    assert not any(isinstance(module, nn.BatchNorm2d) for module in lowered.modules())
    layers = [module for module in lowered.modules() if isinstance(module, Int8Layer)]
    assert len(layers) == (4 if case == "float layers" else 6)  # conv3 is called twice
    bits = OPTIONS[case].get("weight_bits", 8)
    assert all(-(2 ** (bits - 1)) <= int(m.weight.min()) <= int(m.weight.max()) < 2 ** (bits - 1) for m in layers)


@pytest.mark.parametrize("case", OPTIONS)
def test_without_biases_evaluation_and_pairs_agree_bit_for_bit(case: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(4, 3, 3, bias=False))
    graph = inserted(model, **({} if case == "float layers" else OPTIONS[case]))
    train(graph)
    pairs, lowered = converted(graph)
    assert noise(graph, pairs) == math.inf
    assert noise(graph, lowered) > 100


class Peak(nn.Module):
    """An observer as PyTorch users write them, with one scale."""

    peak: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.dtype, self.qscheme, self.quant_min, self.quant_max = torch.qint8, torch.per_tensor_symmetric, -127, 127
        self.register_buffer("peak", torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.peak.copy_(torch.maximum(self.peak, x.abs().max()))
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.peak / 127, torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("learn_steps", [True, False])
def test_observers_from_elsewhere_can_be_trained_with(learn_steps: bool) -> None:
    graph = inserted(Net(), activation=Peak, weight=Peak, learn_steps=learn_steps)
    train(graph)
    pairs, lowered = converted(graph)
    assert noise(graph, lowered) > 35
    assert noise(pairs, lowered) > 80


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(programs(max_steps=8), st.sampled_from([{}, {"learn_steps": False}, {"weight_bits": 4}]))
def test_random_models_are_trained_as_they_are_deployed(model: Program, options: dict[str, Any]) -> None:
    model = model.float()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    value = run(model, ExampleInputs.of(x)).abs().max().item()
    assume(1e-3 < value < 1e3 and math.isfinite(value))
    graph = inserted(model, x, **options)
    assume(run_with_gradients(graph, x))
    train(graph, 3, x)
    after = run(graph, ExampleInputs.of(x))
    assume(bool(after.isfinite().all()) and 1e-3 < after.abs().max().item() < 1e4)
    manager = fxc.PassManager([P.ConvertObserved()], verify=False)
    pairs = manager.run(graph, x).graph_module
    lowered = fxc.PassManager([P.Lower()], verify=False).run(pairs, x).graph_module
    assert noise(graph, lowered, x[:3]) >= 35
    assert not any(isinstance(module, NormedLayer) for module in pairs.modules())


@pytest.mark.parametrize("case", ["learned", "followed"])
def test_before_training_nothing_is_rounded_and_calibrated_graphs_convert_without_training(case: str) -> None:
    manager = fxc.PassManager([P.InsertObservers(qat=True, **OPTIONS[case]), P.Calibrate(X)])
    graph = manager.run(fxc.trace(Net().eval(), X), X).graph_module
    assert noise(Net().eval(), graph) > 100
    pairs, lowered = converted(graph)
    assert 25 < noise(graph, pairs) < 60
    assert noise(pairs, lowered) > 80
    with pytest.raises(InputError, match="run Calibrate with data"):
        converted(inserted(Net(), **OPTIONS[case]))


def test_calibrating_after_training_changes_nothing() -> None:
    graph = inserted(Net())
    train(graph)
    result = fxc.PassManager([P.Calibrate(X * 10)]).run(graph, X)
    assert not result.rows[-1].modified
    assert noise(graph, result.graph_module) == math.inf


def test_late_in_training_statistics_and_grids_stay() -> None:
    graph = inserted(Net(), freeze_norms=0.4, freeze_observers=0.6)

    def watched(*names: str) -> dict[str, torch.Tensor]:
        return {key: t.clone() for key, t in graph.state_dict().items() if key.endswith(names)}

    def changed(before: dict[str, torch.Tensor]) -> set[str]:
        now = graph.state_dict()
        return {key for key, tensor in before.items() if not torch.equal(tensor, now[key])}

    statistics, grids = ("conv1.norm.running_mean", "conv1.norm.running_var"), ("initial_step", "scale", "zero_point")
    train(graph, 4, total=10)
    before, weights = watched(*statistics), watched("weight", "step")
    train(graph, 2, first=4, total=10)
    assert not changed(before)
    assert len(changed(weights)) > 10
    before, weights = watched(*statistics, *grids), watched("weight")
    train(graph, 4, first=6, total=10)
    assert not changed(before)
    assert changed(weights)
    train(graph, 1, total=10)
    assert changed(before)


def test_batch_norms_that_the_caller_keeps_in_evaluation_mode_keep_their_statistics() -> None:
    model = Net().train()
    model.bn1.eval()
    kept: list[fx.GraphModule] = []
    fxc.compile(
        model, [P.InsertObservers(qat=True), P.Train([(X, LABELS)], epochs=2)], X,
        dump=lambda name, graph: kept.append(copy.deepcopy(graph)),
    )  # fmt: skip
    trained = kept[-1].state_dict()
    start = model.state_dict()
    assert torch.equal(trained["conv1.norm.running_mean"], start["bn1.running_mean"])
    assert not torch.equal(trained["conv1.norm.weight"], start["bn1.weight"])
    assert not torch.equal(trained["conv2.norm.running_mean"], start["bn2.running_mean"])


def test_an_interrupted_training_goes_on_exactly() -> None:
    uninterrupted, resumed = inserted(Net()), inserted(Net())
    train(uninterrupted, 4, total=10)
    resumed.load_state_dict(copy.deepcopy(uninterrupted.state_dict()))
    for graph in (uninterrupted, resumed):
        train(graph, 6, first=4, total=10)
    one, other = uninterrupted.state_dict(), resumed.state_dict()
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_rounding_reaches_the_loss() -> None:
    """A control: with few bits training is another one, and lowers the loss of the rounded network."""

    def loss(graph: nn.Module) -> float:
        return float(run(graph, ExampleInputs.of(X)).square().mean())

    graph = inserted(Net(), weight_bits=2, activation_bits=3)
    train(graph, 1)
    before = loss(graph)
    train(graph, 20, rate=0.02)
    assert loss(graph) < 0.9 * before
    assert all(
        float(m.step.detach().std()) > 0 for m in graph.modules() if isinstance(m, LearnedQuantize) and len(m.step) > 1
    )


# -- pipelines -------------------------------------------------------------------------------------------------------

LABELS = torch.arange(8) % 5


def test_the_passes_one_by_one_and_the_group_do_the_same() -> None:
    loader = [(X, LABELS)] * 3
    single = fxc.compile(
        Net().eval(),
        [P.InsertObservers(qat=True, weight_bits=4), P.Calibrate([X]), P.Train(loader, epochs=2), P.ConvertObserved(),
         P.Lower()],
        X,
    )  # fmt: skip
    group = fxc.compile(Net().eval(), P.QAT(P.Train(loader, epochs=2), calibration=[X], weight_bits=4), X)
    text = fxc.compile(Net().eval(), "qat{train=train{epochs=2}, weight_bits=4}", X, train_data=loader, calibration=[X])
    assert noise(single, group) == noise(single, text) == math.inf
    assert group.report is not None
    names = [row.name for row in group.report.passes]
    assert names[1:] == ["insert-observers{weight_bits=4, qat=True}", "calibrate{batches=8}", "train{epochs=2}",
                         "convert-observed", "lower"]  # fmt: skip
    assert isinstance(group.get_submodule("conv1"), Int8Conv)


def test_the_first_grids_come_from_the_training_data_if_there_is_no_other() -> None:
    loader = [(X, LABELS)] * 3
    given_to_pass = fxc.compile(Net().eval(), P.QAT(P.Train(loader)), X)
    given_to_compile = fxc.compile(Net().eval(), "qat", X, train_data=loader)
    assert noise(given_to_pass, given_to_compile) == math.inf


def test_the_group_prints_as_text_that_reads_back() -> None:
    item = P.QAT(["mask-weights{amount=0.7}", P.Train(epochs=3)], weight_bits=4, freeze_norms=0.5)
    assert parse(str(item)) == [item]
    assert str(P.QAT()) == "qat"
    assert str(item) == "qat{weight_bits=4, train=[mask-weights{amount=0.7}, train{epochs=3}], freeze_norms=0.5}"


@pytest.mark.parametrize("first", ["qat", "quantize", "insert-observers, convert-observed"])
def test_graphs_that_are_quantised_already_are_refused_before_anything_runs(first: str) -> None:
    for then in ("qat", "insert-observers{qat=True}"):
        with pytest.raises(PassOrderError, match="takes a graph of stage FLOAT"):
            fxc.compile(Net().eval(), f"{first}, {then}", X)
    compact = fxc.compile(Net().eval(), "fuse, quantize", X, calibration=[X])
    with pytest.raises(PassOrderError, match="takes a graph of stage FLOAT"):
        fxc.compile(compact, P.QAT(P.Train([(X, LABELS)])), X)


@pytest.mark.parametrize(
    "options", [{"weight_bits": 1}, {"activation_bits": 9}, {"weight_bits": 4.0}, {"freeze_norms": 1.5},
                {"freeze_observers": -0.1}, {"train": ()}, {"activation": "per-channel-error"}],
)  # fmt: skip
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        P.QAT(**options)


def test_fewer_bits_without_training() -> None:
    """The same formats serve quantisation after training; ranges of least error are the default there."""

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()

    def quality(**options: Any) -> float:
        return noise(model, fxc.compile(model, ["fuse", P.Quantize([X], **options)], X))

    assert quality(weight_bits=2) < quality(weight_bits=4) < quality(weight_bits=8)
    assert quality(weight_bits=2, weight="per-channel") < quality(weight_bits=2)
    assert quality(activation_bits=3) < quality(activation_bits=8)
