"""Every workflow of torch.nn.utils.prune that people come with, on any layer of ResNet-18 and of a small CNN."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torchvision.models import resnet18

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.testing import assert_equivalent
from tests.models.test_torchvision import decibels
from tests.strategies import randomise_statistics


class BabyCNN(nn.Module):
    """Two convolutions with batch norm and pooling, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(32 * 7 * 7, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.bn1(self.conv1(x)).relu())
        x = self.pool(self.bn2(self.conv2(x)).relu())
        x = torch.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc2(x)  # type: ignore[no-any-return]


Prune = Callable[[nn.Module], object]
METHODS: dict[str, Prune] = {
    "l1_unstructured": lambda m: prune.l1_unstructured(m, "weight", amount=0.4),
    "random_unstructured": lambda m: prune.random_unstructured(m, "weight", amount=0.3),
    "ln_structured": lambda m: prune.ln_structured(m, "weight", amount=0.5, n=2, dim=0),
    "random_structured": lambda m: prune.random_structured(m, "weight", amount=0.5, dim=0),
    "ln_structured_inputs": lambda m: prune.ln_structured(m, "weight", amount=0.5, n=2, dim=1),
}


def baby() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = BabyCNN()
    randomise_statistics(model)
    return model.eval(), torch.randn(2, 1, 28, 28)


def residual() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = resnet18(weights=None)
    randomise_statistics(model)
    return model.eval(), torch.randn(2, 3, 32, 32)


def layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


CASES = [(baby, name) for name in layers(baby()[0])] + [
    (residual, name)
    for name in ("conv1", "layer1.0.conv1", "layer1.1.conv2", "layer2.0.downsample.0", "layer4.1.conv2", "fc")
]


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("build", "layer"), CASES)
def test_what_torch_prune_leaves_is_understood(
    build: Callable[[], tuple[nn.Module, torch.Tensor]], layer: str, method: str, permanent: bool
) -> None:
    model, x = build()
    module = model.get_submodule(layer)
    METHODS[method](module)
    expected = copy.deepcopy(model.state_dict())
    if permanent:
        prune.remove(module, "weight")
    compact = fxc.compile(model, [P.RemoveChannels(), P.Fuse()], x, verify=False)
    assert_equivalent(model.double(), compact.double(), x.double(), 1e-6)
    assert permanent or expected.keys() == model.state_dict().keys()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("build", "layer"), [(baby, "conv2"), (baby, "fc1"), (residual, "layer2.0.conv1")])
def test_and_the_whole_pipeline_down_to_int8(
    build: Callable[[], tuple[nn.Module, torch.Tensor]], layer: str, method: str
) -> None:
    model, x = build()
    METHODS[method](model.get_submodule(layer))
    passes = [P.RemoveChannels(), P.Fuse(), P.Quantize(calibration=torch.cat([x, x.flip(-1)]))]
    compact = fxc.compile(model, passes, x)
    assert any(type(module).__name__ == "Int8Conv" for module in compact.modules())
    assert decibels(model(x), compact(x)) >= 20


def test_pruned_filters_leave_the_network() -> None:
    """Half of the filters of a convolution whose successor is not padded against a constant are gone."""
    model, x = baby()
    prune.ln_structured(model.fc1, "weight", amount=0.5, n=2, dim=0)
    compact = fxc.compile(model, [P.RemoveChannels(), P.Fuse()], x)
    assert compact.get_parameter("fc1.weight").shape == (32, 1568)
    assert compact.get_parameter("fc2.weight").shape == (10, 32)


def test_global_unstructured_is_understood() -> None:
    model, x = residual()
    parameters = [(model.get_submodule(name), "weight") for name in layers(model)]
    total = sum(model.get_parameter(f"{name}.weight").numel() for name in layers(model))
    prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=0.6)
    compact = fxc.compile(model, [P.RemoveChannels(), P.Fuse()], x)
    assert_equivalent(model, compact, x, 1e-4)
    zeros = sum(int((compact.get_parameter(f"{name}.weight") == 0).sum()) for name in layers(model))
    assert zeros == pytest.approx(0.6 * total, rel=0.01)
