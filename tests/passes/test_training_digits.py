"""Training inside pipelines on real digits: what is gained, and that it is kept in the lowered graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.analysis.cost import cost
from fxcompress.demo import BabyCNN, Digits, Shuffled, accuracy, load_digits
from fxcompress.demo import train as fit
from fxcompress.graph.metadata import graph_info
from fxcompress.quant.arithmetic import signal_to_noise

pytestmark = pytest.mark.xdist_group("digits")  # one float network for all


@pytest.fixture(scope="module")
def trained() -> tuple[BabyCNN, Digits, Digits]:
    """A small network with 3,500 digits to train and 1,500 to test on."""
    torch.manual_seed(0)
    training, test = load_digits(0, test=1500)
    model = BabyCNN(8)
    fit(model, Shuffled(training, 64, 0), 2, learning_rate=3e-3)
    assert accuracy(model, test) > 0.93
    return model, training, test


def loader(training: Digits, seed: int = 1) -> Shuffled:
    return Shuffled(Digits(training.images[:2048], training.labels[:2048]), 64, seed)


@pytest.mark.parametrize(
    ("before", "options"),
    [("norms", {}), ("norms", {"learn_steps": False}), ("norms", {"weight_bits": 4}), ("fused", {"weight_bits": 4})],
    ids=["w8", "followed", "w4", "w4 fused"],
)
def test_the_lowered_network_sees_what_training_saw(
    trained: tuple[BabyCNN, Digits, Digits], options: dict[str, Any], before: str
) -> None:
    model, training, test = trained
    kept: dict[str, fx.GraphModule] = {}

    def keep(name: str, graph: fx.GraphModule) -> None:
        kept[name] = copy.deepcopy(graph)

    compact = fxc.compile(
        model,
        [*(["fuse"] if before == "fused" else []), P.InsertObservers(qat=True, **options),
         P.Train(loader(training), epochs=1, learning_rate=3e-4), P.ConvertObserved(), P.Lower()],
        test.images[:1],
        dump=keep,
    )  # fmt: skip
    with torch.inference_mode():
        expected, found = kept["train"].eval()(test.images), compact(test.images)
        start = model(test.images)
    assert signal_to_noise(expected, found) >= 35
    assert float((expected.argmax(1) == found.argmax(1)).float().mean()) >= 0.999
    assert signal_to_noise(start, found) < 30  # training has changed it
    assert accuracy(compact, test) >= accuracy(model, test) - 0.004


def test_training_with_few_bits_is_better_than_rounding_afterwards(trained: tuple[BabyCNN, Digits, Digits]) -> None:
    model, training, test = trained
    bits: dict[str, Any] = {"weight_bits": 3, "activation_bits": 3}
    after = fxc.compile(model, ["fuse", P.Quantize([training.images[:256]], **bits)], test.images[:1])
    during = fxc.compile(model, P.QAT(P.Train(loader(training), epochs=1), **bits), test.images[:1])
    assert accuracy(during, test) > accuracy(after, test) + 0.003


def test_pruned_and_trained_with_rounding(trained: tuple[BabyCNN, Digits, Digits]) -> None:
    model, training, test = trained
    compact = fxc.compile(
        model,
        [P.Iterate(P.PruneChannels(budget="macs:0.5"), P.Train(loader(training)), steps=2),
         P.QAT(P.Train(loader(training), learning_rate=3e-4))],
        test.images[:1],
    )  # fmt: skip
    report = compact.report
    assert report is not None
    assert report.after.macs == pytest.approx(0.5 * report.before.macs, rel=0.03)
    assert report.after.bytes < 0.3 * report.before.bytes
    assert accuracy(compact, test) >= accuracy(model, test) - 0.005


def test_step_by_step_is_at_least_as_good_as_at_once(trained: tuple[BabyCNN, Digits, Digits]) -> None:
    """80 % of the weights, and as many epochs of the same batches."""
    model, training, test = trained
    found = {}
    for seed in (1, 2):
        data = loader(training, seed)
        at_once = fxc.compile(model, [P.MaskWeights(0.8), P.Train(data, epochs=3)], test.images[:1])
        data = loader(training, seed)
        in_steps = fxc.compile(model, P.Iterate(P.MaskWeights(0.8), P.Train(data), steps=3), test.images[:1])
        for graph in (at_once, in_steps):
            masks = [mask for path, mask in graph_info(graph).masks.items() if path.endswith("weight")]
            assert sum(int((~mask).sum()) for mask in masks) == pytest.approx(
                0.8 * sum(m.numel() for m in masks), abs=1
            )
        assert cost(at_once).parameters == cost(in_steps).parameters
        found[seed] = accuracy(at_once, test), accuracy(in_steps, test)
    assert sum(steps for _, steps in found.values()) >= sum(once for once, _ in found.values())
