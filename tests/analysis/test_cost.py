"""Costs, against figures published with torchvision's weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import get_model, get_model_weights

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.analysis.cost import cost


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "resnext50_32x4d", "efficientnet_b0", "shufflenet_v2_x1_0"]
)
def test_parameters_and_macs_are_those_torchvision_publishes(name: str) -> None:
    meta = next(iter(get_model_weights(name))).meta
    found = cost(fxc.trace(get_model(name, weights=None).eval(), torch.zeros(2, 3, 224, 224)))
    assert found.parameters == meta["num_params"]
    assert found.macs == pytest.approx(meta["_ops"] * 1e9, rel=0.01)


def test_tied_tensors_count_once_and_every_call_counts() -> None:
    layer, twin = nn.Linear(4, 4), nn.Linear(4, 4)
    twin.weight = layer.weight
    found = cost(fxc.trace(nn.Sequential(layer, twin, layer), torch.zeros(2, 4)))
    assert found.parameters == 16 + 4 + 4
    assert found.macs == 3 * 16
    assert found.bytes == 4 * found.parameters


def test_attention_and_products_are_counted() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.scaled_dot_product_attention(x, x, x)
            return y @ x.transpose(-1, -2)

    found = cost(fxc.compile(Attention(), [], torch.zeros(1, 2, 5, 8)))
    assert found.macs == 2 * (5 * 5 * 8 + 5 * 5 * 8) + 2 * 5 * 5 * 8


def test_the_prediction_of_a_choice_is_what_removal_leaves() -> None:
    from fxcompress.analysis.budget import CostOfChoice
    from fxcompress.analysis.channels import analyse
    from fxcompress.analysis.importance import score
    from fxcompress.analysis.plans import choose

    model, x = get_model("mobilenet_v3_large", weights=None).eval(), torch.zeros(1, 3, 64, 64)
    graph = fxc.compile(model, [], x)
    analysis = analyse(graph)
    scores = score(graph, analysis, "l2")
    plan = choose(graph, analysis, scores, ratio=0.4, budget=None, scope="layer", round_to=1)
    predicted = CostOfChoice(graph, analysis)
    pruned = cost(fxc.compile(model, [P.PruneChannels(0.4, scope="layer")], x))
    assert predicted("parameters", plan.dead) == pytest.approx(pruned.parameters, rel=1e-6)
    assert predicted("macs", plan.dead) == pytest.approx(pruned.macs, rel=1e-6)
