"""Training keeps its promises on random models: graphs, modes and masks stay, and a run in two parts is one run."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import fx

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.graph.compare import run
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import graph_info
from fxcompress.graph.printer import print_graph
from tests.strategies import Program, example, programs

some = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

BATCHES = [(example(size), torch.zeros(size)) for size in (4, 3, 5)]


class Stop(Exception):
    """Ends a training from inside."""


def _can_be_trained(model: Program) -> bool:
    output = run(model, ExampleInputs.of(example()))
    return bool(output.isfinite().all() and output.abs().max() < 1e3) and any(True for _ in model.parameters())


@some
@given(programs(max_steps=8))
def test_training_changes_numbers_only_and_resumes(model: Program) -> None:
    assume(_can_be_trained(model))
    masked = fxc.PassManager([P.MaskWeights(0.4)]).run(fxc.trace(model, example()), example()).graph_module
    batches = 0

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal batches
        batches += 1
        if batches == stop:
            raise Stop
        return output.square().mean()

    def trained(**options: Any) -> fx.GraphModule:
        train = P.Train(
            BATCHES,
            epochs=2,
            optimiser="sgd",
            learning_rate=1e-4,
            clip=1.0,
            loss_function=loss,
            weight_decay=0.1,
            **options,
        )
        return fxc.PassManager([train]).run(masked, example()).graph_module

    stop = 0
    try:
        whole = trained()
    except fxc.errors.InputError:  # the loss of an exploding network is not finite
        assume(False)
    assert print_graph(whole) == print_graph(masked)
    modes = [module.training for module in masked.modules()]
    assert [module.training for module in whole.modules()] == modes
    for path, mask in graph_info(whole).masks.items():
        assert not whole.get_parameter(path)[~mask].any()
    with tempfile.TemporaryDirectory() as folder:
        batches, stop = 0, 5
        with pytest.raises(fxc.errors.PassError, match="Stop"):
            trained(checkpoint=folder, checkpoint_every=1)
        stop = 0
        parts = trained(checkpoint=folder, checkpoint_every=1)
    found = parts.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in whole.state_dict().items())
