"""Snapshots see every edit of a graph, and bring it back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import fxcompress as fxc
from fxcompress.graph.snapshot import Snapshot


def _traced() -> fx.GraphModule:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    return fxc.trace(model, torch.zeros(1, 3, 8, 8))


def _node(graph_module: fx.GraphModule, target: str) -> fx.Node:
    (found,) = graph_module.graph.find_nodes(op="call_module", target=target)
    assert isinstance(found, fx.Node)
    return found


def _erase(graph_module: fx.GraphModule) -> None:
    node = _node(graph_module, "1")
    node.replace_all_uses_with(node.all_input_nodes[0])
    graph_module.graph.erase_node(node)


def _replace_weight(graph_module: fx.GraphModule) -> None:
    graph_module.get_submodule("0").weight = nn.Parameter(torch.zeros(4, 3, 3, 3))


def _write_in_place(graph_module: fx.GraphModule) -> None:
    with torch.no_grad():
        graph_module.get_parameter("0.weight").mul_(0.5)


def _set_attribute(graph_module: fx.GraphModule) -> None:
    convolution = graph_module.get_submodule("0")
    assert isinstance(convolution, nn.Conv2d)
    convolution.padding = (1, 1)


def _replace_module(graph_module: fx.GraphModule) -> None:
    graph_module.set_submodule("2", nn.ReLU6())


def _retarget(graph_module: fx.GraphModule) -> None:
    _node(graph_module, "2").target = "1"


EDITS = [_erase, _replace_weight, _write_in_place, _set_attribute, _replace_module, _retarget]


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_is_seen(edit: Callable[[fx.GraphModule], None]) -> None:
    graph_module = _traced()
    before = Snapshot(graph_module)
    assert before.changed() is None
    edit(graph_module)
    assert before.changed() is not None


@pytest.mark.parametrize("edit", [edit for edit in EDITS if edit is not _write_in_place])
def test_the_graph_comes_back_as_it_was(edit: Callable[[fx.GraphModule], None]) -> None:
    graph_module = _traced()
    x = torch.randn(2, 3, 8, 8)
    expected = graph_module(x)
    before = Snapshot(graph_module)
    edit(graph_module)
    restored = before.restore()
    assert torch.equal(restored(x), expected)
    assert [node.name for node in restored.graph.nodes] == [row[2] for row in before.nodes]


def test_a_restored_graph_is_not_touched_by_later_edits() -> None:
    graph_module = _traced()
    x = torch.randn(2, 3, 8, 8)
    expected = graph_module(x)
    restored = Snapshot(graph_module).restore()
    for edit in EDITS[:2]:
        edit(graph_module)
    assert torch.equal(restored(x), expected)
