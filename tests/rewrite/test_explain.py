"""Explanations: for every candidate what was done, or why not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxcompress.graph.capture import trace
from fxcompress.graph.printer import print_graph
from fxcompress.passes.fuse import Fuse
from fxcompress.passes.fuse_conv_bn import FoldBatchNorm
from fxcompress.pipeline.manager import PassManager
from fxcompress.rewrite.explain import explain, explanation, rules_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.bn3 = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.bn1(self.conv1(x)).relu()
        y = self.conv2(x)
        return self.bn2(y) + self.bn3((y + x).relu())


def test_every_batch_norm_gets_a_verdict() -> None:
    x = torch.randn(1, 3, 8, 8)
    graph_module = PassManager("canonicalize").run(trace(Model(), x, training=False), x).graph_module
    before = print_graph(graph_module)
    outcomes = explain(graph_module, FoldBatchNorm().rules())
    assert explanation(outcomes) == (
        "bn1 [fold-batch-norm]: yes: batch norm folded into conv1\n"
        "bn2 [fold-batch-norm]: no: `conv2` is read by 2 nodes: bn2, add\n"
        "bn3 [fold-batch-norm]: no: the input of `bn3` is `relu_1` (relu), not conv or conv_transpose or linear"
    )
    assert print_graph(graph_module) == before
    assert "bn1.weight" in graph_module.state_dict()


def test_rules_see_what_other_rules_made_possible() -> None:
    x = torch.randn(1, 3, 8, 8)
    graph_module = PassManager("canonicalize").run(trace(Model(), x, training=False), x).graph_module
    verdicts = {(outcome.node, outcome.rule): outcome for outcome in explain(graph_module, rules_of([Fuse()]))}
    assert verdicts["relu", "fuse-activation"].refusal is None
    assert verdicts["add", "fuse-add"].refusal is not None


def test_a_graph_without_candidates() -> None:
    assert explanation(explain(trace(nn.ReLU(), torch.randn(1)), [])) == "no rule has a candidate in this graph"
