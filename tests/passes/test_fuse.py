"""Fuse: whole networks compute what they did, in fewer nodes; one run does it all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from fxcompress.graph import ops
from fxcompress.graph.capture import trace
from fxcompress.graph.compare import difference
from fxcompress.graph.printer import print_graph
from fxcompress.passes.fuse import Fuse
from fxcompress.pipeline.base import parameters_equal
from fxcompress.pipeline.manager import PassManager


def randomise(model: nn.Module) -> nn.Module:
    """Draw the numbers of batch norms at random: with the defaults every wrong formula would look right."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.get_buffer("running_mean").normal_(0, 0.5)
            module.get_buffer("running_var").uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)
    return model.eval()


#: network -> (side of the input, batch norms left, nodes whose work a layer's kernel does)
NETWORKS: dict[str, tuple[int, int, int]] = {
    "resnet18": (32, 0, 25),
    "mobilenet_v3_small": (32, 0, 48),
    "densenet121": (32, 62, 59),
    "shufflenet_v2_x0_5": (32, 0, 37),
    "efficientnet_b0": (32, 0, 74),
    "squeezenet1_1": (32, 0, 26),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_keep_their_output(name: str) -> None:
    side, norms, marks = NETWORKS[name]
    torch.manual_seed(0)
    model = randomise(torchvision.models.get_model(name, weights=None)).double()
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    expected = model(x)
    captured = trace(model, x, training=False)
    result = PassManager([Fuse()]).run(captured, x)
    fused = result.graph_module
    assert difference(expected, fused(x)).relative <= 1e-10
    kinds = [ops.kind(node) for node in fused.graph.nodes]
    assert (kinds.count("batch_norm"), kinds.count("dropout")) == (norms, 0)
    assert result.rows[-1].edits == marks
    for batch in (1, 3):
        inputs = torch.randn(batch, 3, side, side, dtype=torch.float64)
        assert difference(model(inputs), fused(inputs)).relative <= 1e-10
    before, numbers = print_graph(fused), copy.deepcopy(fused.state_dict())
    again = PassManager([Fuse()]).run(fused, x)
    assert [row.name for row in again.rows if row.modified or row.edits] == []
    assert print_graph(again.graph_module) == before
    assert parameters_equal(numbers, again.graph_module.state_dict())


def test_float32_stays_within_rounding() -> None:
    torch.manual_seed(0)
    model, x = randomise(torchvision.models.resnet18()), torch.randn(2, 3, 64, 64)
    result = PassManager([Fuse()]).run(trace(model, x, training=False), x)
    assert difference(model(x), result.graph_module(x)).relative <= 1e-5


class Everything(nn.Module):
    """Something for every pass of the group."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.unused = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.bn1(self.dropout(self.conv1(x)) + 0).relu().relu()
        y = self.conv2(self.bn2(x * self.scale.exp()))
        y = torch.softmax(y @ y.mT, -1) @ y
        return torch.tanh(y) * torch.tanh(y) + torch.zeros_like(y).detach() * 0 + y.contiguous()


def test_every_part_does_its_share() -> None:
    model, x = randomise(Everything()), torch.randn(2, 3, 6, 6)
    result = PassManager([Fuse()]).run(trace(model, x, training=False), x)
    assert difference(model(x), result.graph_module(x)).relative <= 1e-5
    edits = {row.name: row.edits for row in result.rows}
    assert edits == {
        "canonicalize": edits["canonicalize"], "fold-constants": 1, "eliminate-identities": 4, "eliminate-common": 1,
        "fuse-attention": 1, "fold-batch-norm": 1, "fold-batch-norm-forward": 1, "eliminate-dead": 1,
        "fuse-activation": 1,
    }  # fmt: skip
    assert set(result.graph_module.state_dict()) == {
        "conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "folded_exp",
    }  # fmt: skip
    again = PassManager([Fuse()]).run(result.graph_module, x)
    assert not any(row.modified for row in again.rows)


def test_the_callers_model_is_not_touched() -> None:
    model, x = randomise(Everything()), torch.randn(2, 3, 6, 6)
    before = copy.deepcopy(model.state_dict())
    PassManager([Fuse()]).run(trace(model, x, training=False), x)
    assert parameters_equal(before, model.state_dict())


def test_every_layer_has_a_note() -> None:
    model, x = randomise(Everything()), torch.randn(2, 3, 6, 6)
    result = PassManager([Fuse()]).run(trace(model, x, training=False), x)
    said = {note.layer for row in result.rows for note in row.notes}
    assert {"bn1", "conv1", "bn2", "conv2", "dropout"} <= said


def test_training_mode_is_left_alone() -> None:
    model, x = Everything().train(), torch.randn(2, 3, 6, 6)
    result = PassManager([Fuse()], verify=False).run(trace(model, x, training=True), x)
    assert [ops.kind(node) for node in result.graph_module.graph.nodes].count("batch_norm") == 2
    assert [ops.kind(node) for node in result.graph_module.graph.nodes].count("dropout") == 1
