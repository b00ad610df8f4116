"""Real networks, with random weights and statistics: pruned, fused, quantised, saved, and equal at every step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import fx, nn
from torch.utils._pytree import tree_leaves

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.graph.compare import run
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.testing import assert_equivalent
from tests.strategies import randomise_statistics

#: name -> height and width of the smallest input that exercises the network
NETWORKS = {
    "alexnet": 96, "vgg11_bn": 64, "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64, "wide_resnet50_2": 64,
    "densenet121": 64, "googlenet": 64, "inception_v3": 96, "squeezenet1_1": 64, "mobilenet_v2": 64,
    "mobilenet_v3_large": 64, "mnasnet1_0": 64, "shufflenet_v2_x1_0": 64, "efficientnet_b0": 64,
    "efficientnet_v2_s": 64, "regnet_y_400mf": 64, "convnext_tiny": 64, "fcn_resnet50": 64,
    "deeplabv3_mobilenet_v3_large": 64, "lraspp_mobilenet_v3_large": 64, "r3d_18": 32,
}  # fmt: skip

#: No downloads, and no slow initialisation beyond torch's own.
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "fcn_resnet50": {"weights_backbone": None},
    "deeplabv3_mobilenet_v3_large": {"weights_backbone": None},
    "lraspp_mobilenet_v3_large": {"weights_backbone": None},
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None, **OPTIONS.get(name, {}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):  # shufflenet's own momentum would hide its statistics
            module.reset_running_stats()
    randomise_statistics(model)
    return model.eval()


def images(name: str, batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    size = NETWORKS[name]
    shape = (batch, 3, 8, size, size) if name == "r3d_18" else (batch, 3, size, size)
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(batch))


def decibels(reference: Any, result: Any) -> float:
    """Signal to noise ratio over all outputs together."""
    signal = noise = 0.0
    for left, right in zip(tree_leaves(reference), tree_leaves(result), strict=True):
        signal += left.double().square().sum().item()
        noise += (left.double() - right.double()).square().sum().item()
    return float("inf") if noise == 0 else 10 * torch.log10(torch.tensor(signal / noise)).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_removed_equals_masked(name: str) -> None:
    model = network(name)
    for dtype, limit in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        x = images(name, 2, dtype)
        graph = fxc.trace(model.to(dtype), x)
        masked = fxc.PassManager([P.MaskChannels(0.5, scope="layer")], verify=False).run(graph, x)
        removed = fxc.PassManager([P.RemoveChannels()], verify=False).run(masked.graph_module, x)
        assert max(leaf.abs().max() for leaf in tree_leaves(run(masked.graph_module, ExampleInputs.of(x)))) > 0
        assert_equivalent(masked.graph_module, removed.graph_module, x, limit)
        assert removed.rows[-1].cost.parameters <= 0.40 * masked.start.parameters


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_fused_and_quantised(name: str, tmp_path: Path) -> None:
    kept: dict[str, fx.GraphModule] = {}

    def keep(title: str, graph_module: fx.GraphModule) -> None:
        if title == "convert-observed":
            kept[title] = copy.deepcopy(graph_module)

    x = images(name, 2)
    compact = fxc.compile(
        network(name),
        [P.PruneChannels(0.5, scope="layer"), P.Fuse(), P.Quantize(calibration=images(name, 4))],
        example_inputs=x,
        dump=keep,
    )
    assert compact.report is not None
    assert compact.report.after.parameters <= 0.40 * compact.report.before.parameters
    assert decibels(run(kept["convert-observed"], ExampleInputs.of(x)), run(compact, ExampleInputs.of(x))) >= 35
    compact.save(tmp_path / "model.fxc")
    loaded = fxc.load(tmp_path / "model.fxc")
    with torch.no_grad():
        for batch in (1, 3, 8):
            expected = compact(images(name, batch))
            for left, right in zip(tree_leaves(expected), tree_leaves(loaded(images(name, batch))), strict=True):
                assert torch.equal(left, right)
    assert not [line.layer for line in compact.report.layers if not line.notes]
