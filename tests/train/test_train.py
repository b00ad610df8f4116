"""Train: the loop does what a loop written by hand does, and everything around it holds."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.errors import FxCompressError, InputError, OptionError
from fxcompress.graph.metadata import graph_info
from fxcompress.pipeline.base import PassContext
from fxcompress.report_page import page
from fxcompress.train.modes import FollowsTraining

torch.manual_seed(0)
X = torch.randn(96, 8)
Y = (X[:, 0] > 0).long() + 2 * (X[:, 1] > 0).long()
BATCHES = list(zip(X.split(16), Y.split(16), strict=True))


def linear_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def full_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16, momentum=0.3, eps=1e-3), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(16, 4),
    ).eval()  # fmt: skip


def loader(seed: int | None = None) -> DataLoader[Any]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True, generator=generator)


def train(model: nn.Module, data: Any = None, *before: fxc.Pass, **options: Any) -> fxc.CompactModule:
    return fxc.compile(model, [*before, P.Train(BATCHES if data is None else data, **options)], X[:4])


def metrics(compact: fxc.CompactModule) -> dict[str, Any]:
    assert compact.report is not None
    return compact.report.passes[-1].metrics


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in module.state_dict().values()]


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


# The loop


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({"optimiser": "sgd(momentum=0.5)", "weight_decay": 0.1}, lambda p: torch.optim.SGD(p, 0.05, 0.5, 0, 0.1)),
        ({"optimiser": "sgd"}, lambda p: torch.optim.SGD(p, 0.05, 0.9, nesterov=True)),
        ({"optimiser": "adamw(betas=(0.8, 0.9))"}, lambda p: torch.optim.AdamW(p, 0.05, (0.8, 0.9), weight_decay=0.0)),
        ({"optimiser_factory": lambda p: torch.optim.Adagrad(p, 0.03)}, lambda p: torch.optim.Adagrad(p, 0.03)),
    ],
)
def test_it_is_the_loop_that_one_would_write(
    options: dict[str, Any], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> None:
    model = full_net()
    expected = copy.deepcopy(model).train()
    optimiser = make(list(expected.parameters()))
    torch.manual_seed(5)
    losses = []
    for _ in range(2):
        for x, y in BATCHES:
            optimiser.zero_grad()
            loss = F.cross_entropy(expected(x), y)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    compact = train(model, epochs=2, learning_rate=0.05, seed=5, **options)
    assert same(compact, expected)
    assert metrics(compact)["loss"] == pytest.approx([sum(losses[:6]) / 6, sum(losses[6:]) / 6])
    assert same(model, full_net()), "the caller's model is not touched"


def test_accumulated_batches_count_as_one_and_the_last_group_is_not_lost() -> None:
    whole = [(X[:64], Y[:64]), (X[64:], Y[64:])]
    pieces = [(X[:16], Y[:16]), (X[16:48], Y[16:48]), (X[48:64], Y[48:64]), (X[64:70], Y[64:70]), (X[70:], Y[70:])]
    options = {"optimiser": "sgd", "learning_rate": 0.1, "epochs": 3}
    once, gathered = train(linear_net(), whole, **options), train(linear_net(), pieces, accumulate=3, **options)
    for first, second in zip(weights(once), weights(gathered), strict=True):
        torch.testing.assert_close(first, second)
    assert not same(once, linear_net())
    assert metrics(gathered)["loss"] == pytest.approx(metrics(once)["loss"])
    assert gathered.report is not None
    assert gathered.report.passes[-1].edits == 6


def test_clipping_bounds_the_step() -> None:
    options = {"optimiser": "sgd(momentum=0.0)", "learning_rate": 1.0, "steps": 1}
    for clip in (0.05, 0.01):
        compact = train(linear_net(), clip=clip, **options)
        moved = [a - b for a, b in zip(weights(compact), weights(linear_net()), strict=True)]
        assert float(torch.cat([part.flatten() for part in moved]).norm()) == pytest.approx(clip, rel=1e-3)


def test_steps_end_a_training_and_repeat_the_data() -> None:
    compact = train(linear_net(), steps=8)
    assert compact.report is not None
    assert compact.report.passes[-1].edits == 8
    assert len(metrics(compact)["loss"]) == 2
    assert same(train(linear_net(), steps=6), train(linear_net(), epochs=1))
    assert same(train(linear_net(), epochs=0), linear_net())


def test_schedules() -> None:
    rates: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    def run(schedule: str, **options: Any) -> list[float]:
        rates.clear()
        train(linear_net(), epochs=2, schedule=schedule, optimiser_factory=lambda p: Spy(p, 1e-3), **options)
        return [rate / 1e-3 for rate in rates]

    assert run("constant") == [1.0] * 12
    assert run("linear") == pytest.approx([1 - i / 12 for i in range(12)])
    assert run("cosine(end=0.5)")[6] == pytest.approx(0.75)
    assert run("step(at=(0.5,), factor=0.25)") == pytest.approx([1.0] * 6 + [0.25] * 6)
    warm = run("constant", warmup=0.25)
    assert warm == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 9)
    train(linear_net(), schedule_factory=lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=n + 1))
    plateau = train(linear_net(), epochs=4, learning_rate=1e-6, schedule_factory=lambda o, n: (
        torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.1)))  # fmt: skip
    assert metrics(plateau)["learning_rate"][-1] < 1e-6


def test_a_custom_step_gets_the_batch_as_it_is() -> None:
    dicts = [{"values": x, "labels": y} for x, y in BATCHES]

    def step(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(module(batch["values"]), batch["labels"])

    assert same(train(linear_net(), dicts, step=step, epochs=2), train(linear_net(), epochs=2))
    watched = train(linear_net(), dicts, step=step, validation=dicts)
    assert metrics(watched)["metric"] == "loss"


def test_bf16_trains_and_is_near_fp32() -> None:
    exact, short = (train(linear_net(), epochs=3, learning_rate=0.01, precision=name) for name in ("fp32", "bf16"))
    assert not same(exact, short)
    assert metrics(short)["loss"] == pytest.approx(metrics(exact)["loss"], rel=0.02)
    assert all(tensor.dtype == torch.float32 for tensor in short.parameters())


# Promises around it


@pytest.mark.parametrize("optimiser", ["sgd(momentum=0.9)", "adam", "adamw", "rmsprop(momentum=0.9)"])
def test_masks_hold_in_every_optimiser(optimiser: str) -> None:
    masked = fxc.compile(linear_net(), [P.MaskWeights(0.6)], X[:4])
    trained = train(linear_net(), None, P.MaskWeights(0.6), optimiser=optimiser, weight_decay=0.1, epochs=3)
    masks = graph_info(trained).masks
    assert masks.keys() == {"0.weight", "2.weight"}
    for path, mask in masks.items():
        assert not trained.get_parameter(path)[~mask].any()
        assert (trained.get_parameter(path)[mask] != masked.get_parameter(path)[mask]).all()


def test_masks_hold_where_the_optimiser_adds_noise() -> None:
    class Langevin(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.01)

    trained = train(linear_net(), None, P.MaskWeights(0.6), optimiser_factory=lambda p: Langevin(p, 0.01))
    for path, mask in graph_info(trained).masks.items():
        assert not trained.get_parameter(path)[~mask].any()


def test_masked_weights_do_not_count_in_the_norm_that_is_clipped() -> None:
    """A step along gradients clipped to a norm is as long as that norm, although most weights cannot move."""
    options = {"optimiser": "sgd(momentum=0.0)", "learning_rate": 1.0, "steps": 1, "clip": 0.01}
    masked = fxc.compile(linear_net(), [P.MaskWeights(0.8)], X[:4])
    trained = train(linear_net(), None, P.MaskWeights(0.8), **options)
    moved = [(a - b).flatten() for a, b in zip(weights(trained), weights(masked), strict=True)]
    assert float(torch.cat(moved).norm()) == pytest.approx(0.01, rel=1e-3)


def test_batch_norm_and_dropout_keep_their_numbers_and_modes() -> None:
    compact = train(full_net(), epochs=1)
    norm, dropout = compact.get_submodule("1"), compact.get_submodule("3")
    assert isinstance(norm, nn.BatchNorm1d)
    assert isinstance(dropout, nn.Dropout)
    assert (norm.momentum, norm.eps, dropout.p) == (0.3, 1e-3, 0.3)
    assert norm.num_batches_tracked == 6
    assert not any(module.training for module in compact.modules())


def test_what_was_frozen_by_eval_stays_frozen() -> None:
    model = full_net().train()
    model[1].eval()
    frozen, free = train(model), train(full_net().train())
    assert torch.equal(frozen.get_buffer("1.running_mean"), torch.zeros(16))
    assert not torch.equal(free.get_buffer("1.running_mean"), torch.zeros(16))
    assert not torch.equal(frozen.get_parameter("1.weight"), torch.ones(16)), "its parameters train"
    assert model[0].training
    assert not model[1].training

    traced = fxc.trace(full_net().train(), X[:4])
    traced.get_submodule("1").eval()
    fxc.PassManager([P.Train(BATCHES)]).run(traced, X[:4])
    result = fxc.PassManager([P.Train(BATCHES)]).run(traced, X[:4]).graph_module
    assert torch.equal(result.get_buffer("1.running_mean"), torch.zeros(16))


def test_frozen_parameters_stay() -> None:
    model = linear_net()
    model[0].requires_grad_(False)
    compact = train(model, weight_decay=0.5)
    assert torch.equal(compact.get_parameter("0.weight"), model.get_parameter("0.weight"))
    assert not torch.equal(compact.get_parameter("2.weight"), model.get_parameter("2.weight"))
    with pytest.raises(InputError, match="no parameter with requires_grad=True"):
        train(linear_net().requires_grad_(False))


class Watching(nn.Module):
    """Follows the training, and remembers it in its state."""

    told: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("told", torch.zeros(0))

    def follow_training(self, done: float) -> None:
        self.told = torch.cat([self.told, torch.tensor([done])])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Endless:
    """Batches without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(BATCHES)


def follow(data: Any, **options: Any) -> list[float]:
    traced = fxc.trace(nn.Sequential(linear_net(), nn.Identity()), X[:4])
    traced.add_module("1", Watching())
    assert isinstance(traced.get_submodule("1"), FollowsTraining)
    assert not isinstance(traced.get_submodule("0"), FollowsTraining)
    traced.eval()
    P.Train(data, **options).run(traced, PassContext(fxc.graph.inputs.ExampleInputs.of(X[:4])))
    told: list[float] = traced.get_buffer("1.told").tolist()
    return told


def test_modules_are_told_once_before_every_step_how_much_is_over() -> None:
    assert follow(BATCHES, epochs=2) == pytest.approx([i / 12 for i in range(12)])
    assert follow(BATCHES, steps=4) == pytest.approx([i / 4 for i in range(4)])
    assert follow(BATCHES, epochs=1, accumulate=4) == [0.0, 0.5]
    assert follow(Endless(), epochs=2) == pytest.approx([0.0] * 6 + [i / 12 for i in range(6, 12)])


# Data and seeds


class Noisy(Dataset[Any]):
    """Draws from all three global generators."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(8) + float(numpy.random.rand()) + random.random()
        return X[index] + 0.1 * noise, Y[index]


def noisy(workers: int = 0) -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=16, shuffle=True, num_workers=workers)


def test_a_seed_repeats_everything_and_nothing_global_changes() -> None:
    def run(seed: int) -> fxc.CompactModule:
        model = full_net()
        torch.randn(random.randint(1, 9))  # what was drawn before does not count
        return train(model, noisy(), epochs=2, seed=seed)

    random.seed(1)
    first, again, other = run(3), run(3), run(4)
    assert same(first, again)
    assert not same(first, other)
    model = full_net()
    torch.randn(3)
    before = torch.get_rng_state(), str(numpy.random.get_state(legacy=False)), random.getstate()
    train(model, noisy(), validation=noisy())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (str(numpy.random.get_state(legacy=False)), random.getstate()) == before[1:]


def test_the_order_of_the_data_does_not_depend_on_the_model() -> None:
    seen: dict[str, list[torch.Tensor]] = {"with": [], "without": []}
    for name, model in (("with", full_net()), ("without", linear_net())):

        def keep(output: torch.Tensor, target: torch.Tensor, name: str = name) -> torch.Tensor:
            seen[name].append(target)
            return F.cross_entropy(output, target)

        train(model, loader(), epochs=2, loss_function=keep)
    assert all(torch.equal(a, b) for a, b in zip(seen["with"], seen["without"], strict=True))
    assert not torch.equal(torch.cat(seen["with"][:6]), torch.cat(seen["with"][6:])), "each epoch has its own order"


# Evaluation


def test_the_best_weights_are_kept_and_patience_ends_it() -> None:
    seen: list[dict[str, torch.Tensor]] = []
    values = iter([0.5, 0.7, 0.7, 0.6, 0.9])

    def evaluate(module: nn.Module) -> float:
        assert not module.training
        assert not torch.is_grad_enabled()
        seen.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        return next(values)

    compact = train(full_net(), epochs=5, evaluate=evaluate, patience=2)
    assert metrics(compact)["validation"] == [0.5, 0.7, 0.7, 0.6]
    assert metrics(compact)["best_epoch"] == 2
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in compact.state_dict().items())
    values = iter([0.5, 0.4, 0.45])
    lower = train(full_net(), epochs=3, evaluate=evaluate, higher_is_better=False)
    assert metrics(lower)["best_epoch"] == 2


def test_metrics_are_what_their_names_say() -> None:
    model = linear_net()
    output = model(X).detach()
    expected = {
        "accuracy": float((output.argmax(1) == Y).float().mean()),
        "accuracy(top=2)": float((output.topk(2).indices == Y[:, None]).any(1).float().mean()),
        "loss": float(F.cross_entropy(output, Y)),
    }
    uneven = [(X[:50], Y[:50]), (X[50:], Y[50:])]
    for metric, value in expected.items():
        found = metrics(train(model, learning_rate=1e-12, validation=uneven, metric=metric))
        assert found["validation"] == pytest.approx([value], rel=1e-5)
    own = train(model, learning_rate=1e-12, validation=uneven, metric_function=lambda o, y: F.cross_entropy(o, y))
    assert metrics(own)["validation"] == pytest.approx([expected["loss"]], rel=1e-5)
    targets = [(x, torch.sin(x[:, :4])) for x, _ in BATCHES]
    squares = metrics(train(model, targets, loss="mse", learning_rate=1e-12, validation=targets))
    assert (squares["metric"], squares["validation"]) == ("loss", squares["loss"])
    wanted = {"mse": (output - torch.sin(X[:, :4])).square().mean(), "mae": (output - torch.sin(X[:, :4])).abs().mean()}
    for metric, mean in wanted.items():
        found = metrics(train(model, targets, loss="mse", learning_rate=1e-12, validation=targets, metric=metric))
        assert found["validation"] == pytest.approx([float(mean)], rel=1e-5)
    signs = [(x, (x[:, :4] > 0).float()) for x, _ in BATCHES]
    found = metrics(train(model, signs, loss="bce_with_logits", learning_rate=1e-12, validation=signs,
                          metric="binary_accuracy"))  # fmt: skip
    assert found["validation"] == pytest.approx([float(((output > 0) == (X[:, :4] > 0)).float().mean())])


def test_pipeline_text_and_the_page_know_all_of_it() -> None:
    text = (
        "train{epochs=3, optimiser='sgd(momentum=0.8)', schedule='cosine(end=0.1)', warmup=0.1, clip=1.0, accumulate=2}"
    )
    [item] = fxc.PassManager(text).passes
    assert fxc.PassManager(str(item)).passes == [item]
    compact = fxc.compile(linear_net(), [item], X[:4], train_data=BATCHES, validation=BATCHES)
    assert compact.report is not None
    shown = page(compact.report)
    for title in ("Training inside the pipeline", "Evaluation during training", "Schedule of the learning rate"):
        assert title in shown
    notes = {line.layer: line.notes for line in compact.report.layers}
    assert "3 epochs, 9 steps" in notes["training"][0]


def test_progress_counts_steps() -> None:
    seen: list[tuple[str, int, int | None]] = []
    manager = fxc.PassManager([P.Train(BATCHES, epochs=2)], progress=lambda *given: seen.append(given))
    manager.run(fxc.trace(linear_net(), X[:4]), X[:4])
    counts = [(done, total) for text, done, total in seen if text.startswith("epoch")]
    assert counts == [(step, 12) for step in range(1, 13)]


# Errors


def nan_at(batch: int) -> Callable[[Any, Any], torch.Tensor]:
    calls = iter(range(1, 1000))
    return lambda output, target: F.cross_entropy(output, target) * (float("nan") if next(calls) == batch else 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_function": nan_at(3)}, r"the loss is nan in epoch 1, batch 3.*those from before the training"),
        ({"loss_function": nan_at(8), "epochs": 2}, r"the loss is nan in epoch 2, batch 2.*those after epoch 1"),
        ({"data": []}, "holds no batch"),
        ({"data": iter(BATCHES), "epochs": 2}, "an iterator, which can be used for one epoch only"),
        ({"data": X}, "must be an iterable"),
        ({"data": [(X[:4], Y[:4]), (X[:4, :7], Y[:4])]}, r"batch 2 \(shapes \(4, 7\), \(4,\)\) does not fit"),
        ({"data": [(X[:4].long(), Y[:4])]}, "batch 1 .*does not fit the example inputs"),
        ({"data": [(X[:4], Y[:3])]}, r"batch 1 \(shapes \(4, 8\), \(3,\)\) does not fit the model or the loss"),
        ({"data": [(X[:4], Y[:4] + 9)]}, "batch 1 .*out of bounds"),
        ({"data": [(X[:0], Y[:0])]}, "batch 1 is empty"),
        ({"data": [X[:4]]}, r"batch 1 is a Tensor, not a pair \(input, target\)"),
        ({"data": [(X[:4], torch.zeros(4, 1))], "loss": "mse"}, r"batch 1 .* of one shape, not \(4, 4\) and \(4, 1\)"),
        ({"data": [(X[:4] / 0, Y[:4])]}, "batch 1 holds NaN or infinity"),
        ({"loss_function": lambda output, target: output}, r"not one of shape \(16, 4\)"),
        ({"loss_function": lambda output, target: output.detach().sum()}, "does not depend on any parameter"),
        ({"patience": 2}, "need data that is not trained on"),
        ({"data": Endless(), "schedule": "cosine"}, "needs to know how many steps"),
        ({"validation": []}, "the validation data holds no batch"),
        ({"evaluate": lambda module: float("nan")}, r"the evaluation \(evaluation\) gave nan after epoch 1"),
    ],
)
def test_data_that_cannot_be_trained_on_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(linear_net(), **options)


def test_an_iterator_that_ends_is_told() -> None:
    class Once:
        def __init__(self) -> None:
            self.batches = iter(BATCHES)

        def __iter__(self) -> Iterator[Any]:
            yield from self.batches

    with pytest.raises(InputError, match="holds no batch any more after epoch 1"):
        train(linear_net(), Once(), epochs=2)


@pytest.mark.parametrize("epoch", [1, 2])
def test_after_an_error_the_last_good_weights_are_there(epoch: int) -> None:
    traced = fxc.trace(linear_net(), X[:4])
    context = PassContext(fxc.graph.inputs.ExampleInputs.of(X[:4]))
    with pytest.raises(InputError, match="nan"):
        P.Train(BATCHES, epochs=2, loss_function=nan_at(6 * (epoch - 1) + 4)).run(traced, context)
    assert same(traced, linear_net() if epoch == 1 else train(linear_net(), epochs=1))


def test_weights_that_break_in_the_last_step_are_told() -> None:
    class Breaking(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.param_groups[0]["params"][0].data.fill_(float("inf"))

    with pytest.raises(InputError, match=r"weights '0\.weight' are not finite after epoch 1"):
        train(linear_net(), BATCHES[:1], optimiser_factory=lambda p: Breaking(p, 0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimiser": "adamm"}, "did you mean 'adam'"),
        ({"optimiser": "sgd(momentun=0.9)"}, "has no option 'momentun'; did you mean 'momentum'"),
        ({"optimiser": "sgd(0.9)"}, "written as name=value"),
        ({"optimiser": "sgd(lr=0.1)"}, "give learning_rate"),
        ({"loss": "cross_entropy(smoothing=1)"}, "no option 'smoothing'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"schedule": "cosine(end=[)"}, "cannot be read"),
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"steps": 0}, "steps must be"),
        ({"epochs": 1.5}, "epochs must be"),
        ({"accumulate": 0}, "accumulate must be"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"warmup": 1.0}, "warmup must be"),
        ({"learning_rate": -1.0}, "learning_rate must be"),
        ({"checkpoint_every": 3}, "needs a folder"),
        ({"precision": "fp16"}, "'fp16' needs a model on CUDA"),
        ({"optimiser": "sgd(momentum=-1.0)"}, "cannot be made: Invalid momentum"),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        train(linear_net(), **options)


def test_errors_of_the_project_are_one_family() -> None:
    assert issubclass(fxc.errors.CheckpointError, FxCompressError)
    assert issubclass(fxc.errors.ProcessError, FxCompressError)
