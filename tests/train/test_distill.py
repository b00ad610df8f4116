"""Distill: its losses are those of the papers, it learns from the teacher, and nothing of it is left behind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.errors import FxCompressError, InputError, OptionError
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.pipeline.base import PassContext
from fxcompress.train.distillation import Tapped, attention_difference, attention_map, softened_divergence
from tests.train.test_resume import Stop
from tests.train.test_train import BATCHES, X, Y, linear_net, metrics, same, train

torch.manual_seed(0)
IMAGES = torch.randn(48, 3, 8, 8)
LABELS = torch.randint(4, (48,))
PHOTOS = list(zip(IMAGES.split(16), LABELS.split(16), strict=True))


class Conv(nn.Module):
    """Two convolutions and a classifier of a given width."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.fc = nn.Linear(2 * width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.conv2(x))
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def distill(student: nn.Module, teacher: nn.Module | None, data: Any = None, **options: Any) -> fxc.CompactModule:
    x = IMAGES[:2] if isinstance(student, Conv) else X[:4]
    own = PHOTOS if isinstance(student, Conv) else BATCHES
    return fxc.compile(student, [P.Distill(own if data is None else data, teacher=teacher, **options)], x)


# Losses


def test_softened_divergence_is_what_hinton_wrote() -> None:
    ours, theirs, temperature = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64), 3.0
    expected = 0.0
    for z, v in zip(ours.tolist(), theirs.tolist(), strict=True):
        q = [math.exp(x / temperature) for x in z]
        p = [math.exp(x / temperature) for x in v]
        expected += sum(b / sum(p) * math.log(b / sum(p) * sum(q) / a) for a, b in zip(q, p, strict=True)) / 5
    assert float(softened_divergence(ours, theirs, temperature)) == pytest.approx(temperature**2 * expected)
    dense = torch.randn(2, 3, 4, 5)
    flat = [value.movedim(1, -1).reshape(-1, 3) for value in (dense, 2 * dense)]
    torch.testing.assert_close(softened_divergence(dense, 2 * dense, 2.0), softened_divergence(flat[0], flat[1], 2.0))
    sequence = torch.randn(2, 6, 3)
    tokens = sequence.reshape(-1, 3)
    torch.testing.assert_close(softened_divergence(sequence, -sequence, 1.0), softened_divergence(tokens, -tokens, 1.0))


def test_its_gradient_hardly_depends_on_the_temperature() -> None:
    """For high temperatures it is that of half the squared difference of centred logits, over the classes."""
    ours, theirs = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    (gradient,) = torch.autograd.grad(softened_divergence(ours, theirs, 200.0), ours)
    centred = [value - value.mean(1, keepdim=True) for value in (ours.detach(), theirs)]
    torch.testing.assert_close(gradient, (centred[0] - centred[1]) / 10 / 8, rtol=0.05, atol=1e-4)


def test_attention_maps() -> None:
    value = torch.randn(2, 5, 3, 4)
    map_ = attention_map(value)
    assert map_.shape == (2, 12)
    torch.testing.assert_close(map_.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(map_[1, 7], (value[1, :, 1, 3] ** 2).sum() / (value[1] ** 2).sum(0).norm())
    assert attention_difference(value, 3 * value) < 1e-12, "the map says where, not how much"
    assert attention_map(torch.randn(2, 6, 8)).shape == (2, 6)


def test_the_whole_loss_is_the_weighted_sum() -> None:
    student, teacher = Conv(4, 1), Conv(6, 2).eval()
    options: dict[str, Any] = {"alpha": 0.3, "temperature": 2.0, "steps": 1, "learning_rate": 1e-12}
    logits = student.eval()(IMAGES[:16]), teacher(IMAGES[:16])
    student.train()
    with torch.no_grad():
        logits = student(IMAGES[:16]), teacher(IMAGES[:16])
    expected = 0.3 * softened_divergence(*logits, 2.0) + 0.7 * F.cross_entropy(logits[0], LABELS[:16])
    found = metrics(distill(Conv(4, 1).eval(), teacher, PHOTOS[:1], **options))["loss"]
    assert found == pytest.approx([float(expected)], rel=1e-4)
    assert metrics(distill(Conv(4, 1).eval(), teacher, PHOTOS[:1], attention="conv2", **options))["loss"] > found
    assert metrics(distill(Conv(4, 1).eval(), teacher, PHOTOS[:1], features="conv2", **options))["loss"] > found


def test_without_a_teachers_share_it_is_training() -> None:
    assert same(distill(linear_net(), linear_net(), alpha=0.0), train(linear_net()))
    assert not same(distill(linear_net(), linear_net(), alpha=0.5), train(linear_net()))


# What it does


def test_the_student_comes_near_the_teacher_without_targets() -> None:
    teacher = train(linear_net(), epochs=30, learning_rate=0.02)
    torch.manual_seed(7)
    student = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    before = float((student(X).argmax(1) == teacher(X).argmax(1)).float().mean())
    found = distill(student, teacher, list(X.split(16)), alpha=1.0, epochs=40, learning_rate=0.02)
    after = float((found(X).argmax(1) == teacher(X).argmax(1)).float().mean())
    assert before < 0.6
    assert after > 0.85
    by_calibration = fxc.compile(
        student, [P.Distill(teacher=teacher, alpha=1.0, epochs=40, learning_rate=0.02)], X[:4], calibration=X.split(16)
    )
    assert same(found, by_calibration)


def test_values_are_matched_by_their_difference() -> None:
    teacher = nn.Linear(8, 1)
    student = nn.Sequential(nn.Linear(8, 1))
    found = distill(student, teacher, [X], alpha=1.0, match="values", epochs=200, learning_rate=0.05)
    torch.testing.assert_close(found.get_parameter("0.weight"), teacher.weight, atol=0.02, rtol=0)


def test_the_default_teacher_is_the_model_before_the_first_pass() -> None:
    model = linear_net()
    pruned = [P.PruneChannels(0.5), P.Distill(BATCHES, alpha=1.0, epochs=2)]
    default = fxc.compile(model, pruned, X[:4])
    explicit = fxc.compile(model, [pruned[0], P.Distill(BATCHES, teacher=model, alpha=1.0, epochs=2)], X[:4])
    stranger = nn.Sequential(nn.Linear(8, 4))
    other = fxc.compile(model, [pruned[0], P.Distill(BATCHES, teacher=stranger, alpha=1.0, epochs=2)], X[:4])
    assert same(default, explicit)
    assert not same(default, other)
    result = fxc.PassManager(pruned).run(fxc.trace(model, X[:4]), X[:4])
    assert same(result.graph_module, default)
    with pytest.raises(InputError, match="give teacher=model"):
        P.Distill(BATCHES).run(fxc.trace(model, X[:4]), PassContext(ExampleInputs.of(X[:4])))


def test_the_teacher_is_in_evaluation_mode_without_gradients_and_left_as_it_was() -> None:
    teacher = Conv(4, 3).train()
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    seen: list[tuple[bool, bool]] = []
    teacher.fc.register_forward_hook(lambda module, args, output: seen.append((module.training, output.requires_grad)))
    distill(Conv(4, 1).eval(), teacher)
    assert set(seen) == {(False, False)}
    assert teacher.training
    assert teacher.bn1.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    "passes",
    [
        [P.PruneChannels(0.5)],
        [P.Fuse(), P.InsertObservers(), P.Calibrate(list(IMAGES.split(16)))],
        [P.PruneChannels(0.5), P.Fuse(), P.InsertObservers(), P.Calibrate(list(IMAGES.split(16)))],
    ],
    ids=["pruned", "observed", "both"],
)
def test_features_come_nearer_in_pruned_and_observed_graphs(passes: list[fxc.Pass]) -> None:
    teacher = Conv(8, 2).eval()
    options: dict[str, Any] = {"alpha": 0.0, "feature_weight": 10.0, "loss_function": lambda o, y: 0.0 * o.sum()}
    compact = fxc.compile(
        Conv(8, 1).eval(),
        [*passes, P.Distill(PHOTOS, teacher=teacher, features=("conv2",), epochs=30, learning_rate=0.02, **options)],
        IMAGES[:2],
    )
    losses = metrics(compact)["loss"]
    assert losses[-1] < 0.6 * losses[0]
    assert not any("projection" in name or "linear" in name for name in compact.state_dict())


def test_attention_comes_nearer() -> None:
    teacher = Conv(8, 2).eval()
    zero = {"alpha": 0.0, "loss_function": lambda o, y: 0.0 * o.sum(), "attention": {"relu": "conv1"}}
    losses = metrics(distill(Conv(4, 1).eval(), teacher, epochs=20, learning_rate=0.02, **zero))["loss"]
    assert losses[-1] < 0.6 * losses[0]


def test_projections_are_trained() -> None:
    """A student whose own weights are fixed can only lose by its projection."""
    student = Conv(4, 1).eval()
    for parameter in (*student.conv1.parameters(), *student.bn1.parameters(), *student.conv2.parameters()):
        parameter.requires_grad_(False)
    zero = {"alpha": 0.0, "loss_function": lambda o, y: 0.0 * o.sum(), "features": "conv2"}
    losses = metrics(distill(student, Conv(8, 2).eval(), epochs=20, learning_rate=0.02, **zero))["loss"]
    assert losses[-1] < 0.9 * losses[0]


def test_names_mean_nodes_and_the_last_value_of_a_layer() -> None:
    graph = fxc.trace(nn.Sequential(Conv(4).eval(), nn.ReLU()), IMAGES[:2])
    inner = graph.get_submodule("0")
    inputs = ExampleInputs.of(IMAGES[:2])
    output, values = Tapped(graph, ["0", "0.conv1", "_1", "0"], "student")(inputs)
    expected = graph(IMAGES[:2])
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(values["0.conv1"], inner.get_submodule("conv1")(IMAGES[:2]))
    torch.testing.assert_close(values["_1"], expected)
    torch.testing.assert_close(values["0"].relu(), expected)
    plain = Tapped(Conv(4).eval(), ["conv1"], "teacher")(inputs)
    torch.testing.assert_close(plain[1]["conv1"], values["0.conv1"])


class Several(nn.Module):
    """Returns a dict."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.scores, self.extra = nn.Linear(8, classes), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"extra": self.extra(x), "scores": self.scores(x)}


def test_one_of_several_outputs_is_chosen() -> None:
    chosen = distill(Several(), None, output="scores", validation=BATCHES)
    assert metrics(chosen)["metric"] == "accuracy"
    trained = train(Several(), output="scores")
    assert torch.equal(trained.get_parameter("extra.weight"), Several().extra.weight)
    assert not torch.equal(trained.get_parameter("scores.weight"), Several().scores.weight)
    own = train(Several(), loss_function=lambda output, y: F.cross_entropy(output["scores"], y))
    assert same(own, trained)
    with pytest.raises(
        OptionError, match="output='score' is not in the output of the model, which has 'extra', 'scores'"
    ):
        distill(Several(), None, output="score")


def test_it_resumes_with_its_projections(tmp_path: Any) -> None:
    calls: list[int] = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise Stop
        return F.cross_entropy(output, target)

    options: dict[str, Any] = {"features": "conv2", "epochs": 4, "loss_function": loss, "learning_rate": 0.05}
    kept: dict[str, Any] = {"checkpoint": str(tmp_path), "checkpoint_every": 2}
    with pytest.raises(fxc.errors.PassError):
        distill(Conv(4, 1).eval(), Conv(8, 2), **options, **kept)
    resumed = distill(Conv(4, 1).eval(), Conv(8, 2), **options, **kept)
    assert len(calls) == 6 + 12 - 4
    assert same(resumed, distill(Conv(4, 1).eval(), Conv(8, 2), **options))
    with pytest.raises(fxc.errors.CheckpointError, match="teacher: Conv"):
        distill(Conv(4, 1).eval(), Conv(8, 5), **options, **kept)


def test_pipeline_text() -> None:
    text = "distill{epochs=2, alpha=0.9, features=[layer1, 'layer2:stages.0'], attention=[conv1]}"
    [item] = fxc.PassManager(text).passes
    assert isinstance(item, P.Distill)
    assert item.features == ("layer1", "layer2:stages.0")
    assert fxc.PassManager(str(item)).passes == [item]
    assert P.Distill(features={"a": "b"}).features == ("a:b",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "conv3"}, r"the student has no layer or node 'conv3'; did you mean 'conv[12]'"),
        ({"features": "conv1:fcc"}, "the teacher has no layer or node 'fcc'; did you mean 'fc'"),
        ({"features": "conv1:conv2"}, r"of shape \(2, 4, 8, 8\), and 'conv2' of the teacher, of shape \(2, 16, 4, 4\)"),
        ({"attention": "conv1:conv2"}, "must have positions, and the same ones"),
        ({"attention": "fc"}, "must have positions"),
        (
            {"teacher": nn.Linear(9, 4)},
            r"the teacher \(Linear\) does not run on the inputs of the student .*mat1 and mat2",
        ),
        ({"alpha": 1.5}, "alpha must be at least 0 and at most 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"match": "probabilities"}, "match must be one of 'logits', 'values'"),
        ({"features": "a:b:c"}, "features must be names"),
        ({"feature_weight": -1.0}, "feature_weight must be at least 0"),
    ],
)
def test_what_does_not_fit_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FxCompressError, match=message):
        distill(Conv(4).eval(), **{"teacher": Conv(8), **options})


def test_teachers_with_other_outputs_are_refused() -> None:
    with pytest.raises(InputError, match=r"teacher's output has shape \(4, 2\), the student's \(4, 4\)"):
        distill(linear_net(), nn.Linear(8, 2))
    with pytest.raises(InputError, match="give match='values'"):
        distill(nn.Sequential(nn.Linear(8, 1)), None)
    unused = nn.Sequential(nn.Linear(8, 4))
    unused.add_module("spare", nn.Identity())
    unused.forward = lambda x: unused[0](x)  # type: ignore[method-assign]
    with pytest.raises(InputError, match="'spare' of the teacher was not run"):
        distill(linear_net(), unused, features="2:spare")
    assert Y.shape == (96,)
