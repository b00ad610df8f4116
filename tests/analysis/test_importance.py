"""Criteria, each against a few lines of plain torch on one layer; data, aggregation and functions of the user."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.analysis.channels import analyse
from fxcompress.analysis.gradients import mean_activations, squared_gradients
from fxcompress.analysis.importance import score
from fxcompress.errors import InputError, OptionError
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.pipeline.text import parse, print_pass

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)
    ).eval()


def data(count: int = 3, batch: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(batch, 3, 8, 8, generator=generator), torch.randint(0, 4, (batch,), generator=generator))
        for _ in range(count)
    ]


def scores_of_first_layer(model: nn.Module, criterion: Any, **options: Any) -> torch.Tensor:
    graph = fxc.compile(model, [], X)
    analysis = analyse(graph)
    found = score(graph, analysis, criterion, **options)
    [first] = [
        parameter for parameter in analysis.parameters if parameter.paths == ("0.weight",) and parameter.producer
    ]
    return torch.from_numpy(found[analysis.groups(first.axis)[0]])


def gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    grad = twin.get_parameter("0.weight").grad
    assert grad is not None
    return grad.double()


def lamp(model: nn.Module) -> torch.Tensor:
    squares = model.get_parameter("0.weight").detach().double().square().flatten(1).sum(1)
    return torch.stack([one / squares[squares >= one].sum() for one in squares])


def fpgm(model: nn.Module) -> torch.Tensor:
    rows = model.get_parameter("0.weight").detach().double().flatten(1)
    return torch.stack([(rows - row).norm(dim=1).sum() for row in rows])


def taylor(model: nn.Module) -> torch.Tensor:
    weight = model.get_parameter("0.weight").detach().double()
    batches = [(gradients(model, x, y) * weight).square().flatten(1).sum(1) for x, y in data()]
    return torch.stack(batches).mean(0)


def hessian(model: nn.Module) -> torch.Tensor:
    weight = model.get_parameter("0.weight").detach().double()
    samples = [
        gradients(model, x[i : i + 1], y[i : i + 1]).square() for x, y in data() for i in range(len(y))
    ]  # fmt: skip
    return 0.5 * (torch.stack(samples).mean(0) * weight.square()).flatten(1).sum(1)


def activation(model: nn.Module) -> torch.Tensor:
    assert isinstance(model, nn.Sequential)
    with torch.no_grad():
        return torch.cat([model[:3](x) for x, _ in data()]).abs().double().mean((0, 2, 3))


ORACLES = {"lamp": lamp, "fpgm": fpgm, "taylor": taylor, "hessian": hessian, "activation": activation}


@pytest.mark.parametrize("criterion", ORACLES)
def test_a_criterion_is_what_its_paper_says(criterion: str) -> None:
    model = network()
    graph = fxc.compile(model, [], X)
    measured = None
    pairs = [(ExampleInputs.of(x), y) for x, y in data()]
    if criterion in ("taylor", "hessian"):
        measured = squared_gradients(graph, "", pairs, F.cross_entropy, by_sample=criterion == "hessian")
    if criterion == "activation":
        measured = mean_activations(graph, "", graph, analyse(graph), [inputs for inputs, _ in pairs])
    found = scores_of_first_layer(model, criterion, measured=measured)
    torch.testing.assert_close(found, ORACLES[criterion](model), rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("criterion", ORACLES)
def test_the_pass_masks_what_the_criterion_likes_least_and_touches_no_gradient(criterion: str) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masked = fxc.compile(
        model, [P.MaskChannels(0.5, importance=criterion, scope="layer")], X, train_data=data()
    )  # fmt: skip
    dead = (masked.get_parameter("0.weight") == 0).flatten(1).all(1)
    expected = torch.zeros(12, dtype=torch.bool)
    expected[ORACLES[criterion](model).argsort()[:6]] = True
    assert torch.equal(dead, expected)
    assert all(parameter.grad is None for parameter in (*model.parameters(), *masked.parameters()))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
def test_scores_of_a_group_are_brought_together(aggregate: str) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x) + self.b(x))  # type: ignore[no-any-return]

    model = Residual().eval()
    graph = fxc.compile(model, [], X)
    analysis = analyse(graph)
    found = score(graph, analysis, "l1", aggregate=aggregate)
    [axis] = [p.axis for p in analysis.parameters if p.paths == ("a.weight",) and p.producer]
    norms = torch.stack([w.detach().abs().flatten(1).mean(1) for w in (model.a.weight, model.b.weight)])
    expected = {"mean": norms.mean(0), "sum": norms.sum(0), "max": norms.amax(0)}[aggregate]
    np.testing.assert_allclose(found[analysis.groups(axis)[0]], expected.numpy(), rtol=1e-5)


def test_lamp_ranks_layers_together_without_a_mean() -> None:
    """The groups that LAMP's own scores put lowest are those that go, whatever the size of a layer's weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 20, 3), nn.ReLU(), nn.Conv2d(20, 4, 1)).eval()
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(100)
    masked = fxc.compile(model, [P.MaskChannels(0.5, importance="lamp")], X)
    lowest: list[tuple[float, str, int]] = []
    for name in ("0.weight", "2.weight"):
        squares = model.get_parameter(name).detach().double().square().flatten(1).sum(1)
        lowest += [
            (float(one / squares[squares >= one].sum()), name, index) for index, one in enumerate(squares)
        ]  # fmt: skip
    expected = {(name, index) for _, name, index in sorted(lowest)[:16]}
    rows = {name: (masked.get_parameter(name) == 0).flatten(1).all(1) for name in ("0.weight", "2.weight")}
    assert {(name, i) for name, row in rows.items() for i in row.nonzero().flatten().tolist()} == expected


def test_a_function_of_the_user_scores_every_index() -> None:
    seen = []

    def first_ones_matter(weight: torch.Tensor, dimension: int) -> torch.Tensor:
        seen.append((tuple(weight.shape), dimension))
        weight.zero_()  # it works on a copy
        return torch.arange(weight.shape[dimension], 0, -1)

    item = P.PruneChannels(0.5, importance=first_ones_matter, scope="layer")
    model = network()
    pruned = fxc.compile(model, [item], X)
    assert seen == [((12, 3, 3, 3), 0)]
    assert torch.equal(pruned.get_parameter("0.weight"), model.get_parameter("0.weight")[:6])
    assert print_pass(item) == "prune-channels{ratio=0.5, importance=<first_ones_matter>, scope=layer}"
    with pytest.raises(OptionError, match="unexpected character '<'"):
        parse(print_pass(item))
    with pytest.raises(OptionError, match=r"or in Python a function\(weight, dimension\), not 'mine'"):
        parse("prune-channels{ratio=0.5, importance=mine}")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda weight, dimension: weight.abs().sum(), r"on '0.weight', dimension 0, returned scores of shape \(\)"),
        (lambda weight, dimension: torch.ones(5), r"must return one for every index: shape \(12,\)"),
        (lambda weight, dimension: torch.full((12,), float("nan")), "returned NaN, infinite or negative"),
        (lambda weight, dimension: -torch.ones(12), "returned NaN, infinite or negative"),
        (lambda weight, dimension: None, "returned NoneType, not a tensor of scores"),
    ],
)
def test_scores_of_a_user_that_make_no_sense_are_refused(function: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fxc.compile(network(), [P.MaskChannels(0.5, importance=function)], X)


def nan_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.sum() * float("nan")


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({"importance": "taylor"}, r"importance='taylor' needs batches of \(input, target\).*train_data="),
    "no inputs": ({"importance": "activation"}, r"needs batches of inputs.*calibration="),
    "empty": ({"importance": "taylor", "data": []}, "the data holds no batch"),
    "no batches": ({"importance": "activation", "data": []}, "the data holds no batch"),
    "no targets": ({"importance": "hessian", "data": [X]}, r"training batch 1 is a Tensor, not a pair"),
    "wrong shape": ({"importance": "activation", "data": [X[0]]}, "does not fit the example inputs"),
    "nan": (
        {"importance": "taylor", "data": data(), "loss_function": nan_loss}, "the loss of batch 1 is nan",
    ),
    "many losses": (
        {"importance": "taylor", "data": data(), "loss_function": lambda out, y: out}, r"one of shape \(4, 4\)",
    ),
    "no gradient": (
        {"importance": "taylor", "data": data(), "loss_function": lambda out, y: out.detach().sum()},
        "does not depend on any parameter",
    ),
    "wrong loss": (
        {"importance": "taylor", "data": data(), "loss": "bce_with_logits"}, "the loss of batch 1 cannot be computed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_data_that_cannot_be_used_is_said(mistake: str) -> None:
    options, message = MISTAKES[mistake]
    with pytest.raises(InputError, match=message):
        fxc.compile(network(), [P.MaskChannels(0.5, **options)], X)


def test_data_can_be_limited_and_comes_from_compile() -> None:
    used = []

    def batches() -> Any:
        for pair in data(5):
            used.append(1)
            yield pair

    item = P.MaskChannels(0.5, importance="taylor", batches=2)
    fxc.compile(network(), [item], X, train_data=batches())
    assert len(used) == 2


class Gate(nn.Module):
    """Cannot be traced as a whole: one of its parts can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return self.head(y) if y.sum() > -1e9 else y


@pytest.mark.parametrize("criterion", ["taylor", "activation"])
def test_a_region_is_judged_by_the_loss_of_the_whole_model(criterion: str) -> None:
    model = Gate().eval()
    compact = fxc.compile(
        model, [P.MaskChannels(0.5, importance=criterion, scope="layer")], X, train_data=data()
    )  # fmt: skip
    dead = [
        (tensor == 0).flatten(1).all(1)
        for name, tensor in compact.named_parameters()
        if name.endswith("0.weight") and tensor.shape == (12, 3, 3, 3)
    ]
    weight = model.body[0].weight
    assert isinstance(weight, torch.Tensor)
    if criterion == "activation":
        expected = activation(model.body)
    else:
        grads = []
        for x, y in data():
            twin = copy.deepcopy(model)
            F.cross_entropy(twin(x), y).backward()
            grads.append(twin.get_parameter("body.0.weight").grad)
        expected = torch.stack([(g * weight.detach()).square().flatten(1).sum(1) for g in grads if g is not None]).mean(
            0
        )
    assert dead
    assert set(dead[0].nonzero().flatten().tolist()) == set(expected.argsort()[:6].tolist())
