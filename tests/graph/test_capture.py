"""Capture: inputs and outputs of every shape, the caller's model untouched, errors that name the line."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import fxcompress as fxc
from fxcompress.errors import CaptureError, InputError
from fxcompress.graph.metadata import TensorInfo, graph_info, info
from fxcompress.graph.shapes import describe


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(
        self, a: torch.Tensor, b: torch.Tensor, scale: float = 2.0, extra: torch.Tensor | None = None
    ) -> torch.Tensor:
        y: torch.Tensor = self.left(a) + self.right(b) * scale
        return y if extra is None else y + extra


@dataclass
class Result:
    logits: torch.Tensor
    features: list[torch.Tensor]


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Outputs(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> object:
        y, z = self.layer(x), x * 2
        if self.kind == "dict":
            return {"y": y, "z": [z, (y, z)]}
        if self.kind == "ordered":
            return OrderedDict(y=y, z=z)
        if self.kind == "tuple":
            return Pair(y, z)
        return Result(y, [z])


def same(left: object, right: object) -> bool:
    return type(left) is type(right) and fxc.graph.compare.difference(left, right).relative < 1e-6


def test_positional_and_keyword_inputs() -> None:
    model, a, b = TwoInputs().eval(), torch.randn(2, 4), torch.randn(2, 5)
    traced = fxc.trace(model, (a, b))
    assert torch.equal(traced(a, b), model(a, b))
    traced = fxc.trace(model, {"a": a, "b": b})
    assert torch.equal(traced(b=b, a=a), model(a, b))
    traced = fxc.trace(model, {"a": a, "b": b, "extra": torch.ones(3)})
    assert torch.equal(traced(a, b, extra=torch.ones(3)), model(a, b, extra=torch.ones(3)))


def test_plain_values_given_as_inputs_are_fixed_and_keep_their_place() -> None:
    model, a, b = TwoInputs().eval(), torch.randn(2, 4), torch.randn(2, 5)
    traced = fxc.trace(model, (a, b, 3.0))
    assert torch.allclose(traced(a, b), model(a, b, 3.0))


@pytest.mark.parametrize("kind", ["dict", "ordered", "tuple", "dataclass"])
def test_outputs_keep_their_structure(kind: str) -> None:
    model, x = Outputs(kind).eval(), torch.randn(2, 4)
    found, expected = fxc.trace(model, x)(x), model(x)
    assert type(found) is type(expected)
    if isinstance(expected, Result):
        found, expected = vars(found), vars(expected)
    assert torch.utils._pytree.tree_all(bool, torch.utils._pytree.tree_map(torch.equal, found, expected))


def test_every_value_has_shape_dtype_and_device() -> None:
    traced = fxc.trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()), torch.randn(2, 3, 6, 6))
    texts = [describe(info(node).value) for node in traced.graph.nodes]
    assert texts == ["f32[2,3,6,6]", "f32[2,8,4,4]", "f32[2,8,4,4]", "f32[2,128]", "f32[2,128]"]
    value = info(next(iter(traced.graph.nodes))).value
    assert value == TensorInfo((2, 3, 6, 6), torch.float32, torch.device("cpu"))


def test_capture_runs_no_arithmetic_on_large_models() -> None:
    """1e12 MACs would take minutes."""
    layer = nn.Conv2d(64, 64, 3, padding=1)
    traced = fxc.trace(
        nn.Sequential(*[layer] * 8), torch.zeros(1, 1).expand(1, 64).reshape(1, 64, 1, 1).expand(1, 64, 2048, 2048)
    )
    assert describe(info(list(traced.graph.nodes)[-2]).value) == "f32[1,64,2048,2048]"


def _state(model: nn.Module) -> tuple[object, ...]:
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        modes,
        hooks,
        dict(model.named_parameters()),
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_is_untouched(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5))
    model[1].eval()  # a frozen batch norm in a training model
    model.train(training)
    model[0].register_forward_hook(lambda *_: None)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    before, x = _state(model), torch.randn(2, 3, 8, 8)
    x_before = x.clone()
    fxc.compile(model, "prune-channels{ratio=0.5}, fuse", x)
    after = _state(model)
    for left, right in zip(before[0].values(), after[0].values(), strict=True):  # type: ignore[attr-defined]
        assert torch.equal(left, right)
    assert before[1:3] == after[1:3]
    assert all(before[3][name] is parameter for name, parameter in after[3].items())  # type: ignore[index, attr-defined]
    assert torch.equal(x, x_before)


def test_masks_of_torch_prune_are_applied_and_remembered() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    prune.random_unstructured(model[0], "weight", amount=0.5)
    traced = fxc.trace(model, torch.randn(1, 4))
    mask = graph_info(traced).masks["0.weight"]
    assert torch.equal(mask, model.get_buffer("0.weight_mask").bool())
    assert "0.weight" in dict(traced.named_parameters())
    assert torch.equal(traced.get_parameter("0.weight") != 0, mask)


def test_parametrizations_become_permanent() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))).eval()
    x = torch.randn(2, 4)
    assert torch.allclose(fxc.trace(model, x)(x), model(x))


def test_a_layer_alone_can_be_traced() -> None:
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    assert torch.equal(fxc.trace(layer, x)(x), layer(x))


def test_modules_called_twice_and_tied_weights_stay_one() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    traced = fxc.trace(nn.Sequential(first, second, first), torch.randn(1, 4))
    assert len(list(traced.parameters())) == 3


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


class Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no weights were loaded")


def test_data_dependent_control_flow_names_file_and_line() -> None:
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+ \(`if x\.sum\(\) > 0:`\).*torch\.where"):
        fxc.trace(Branch(), torch.randn(2))


def test_a_forward_that_raises_is_told_from_one_that_cannot_be_traced() -> None:
    with pytest.raises(InputError, match=r"forward of Raises raises .*test_capture\.py:\d+.*no weights were loaded"):
        fxc.trace(Raises(), torch.randn(2))


def test_wrong_shape_names_the_node() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(InputError, match=r"\(1, 1, 6, 6\).*node '_0'.*failed"):
        fxc.trace(model, torch.randn(1, 1, 6, 6))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "example_inputs"),
        ("x", "must be a tensor"),
        ((1, 2), "holds no tensor"),
        ((torch.randn(2, 4),), "do not fit"),
        (torch.randn(2, 4, device="meta"), "are on meta but the model is on cpu"),
    ],
)
def test_unusable_inputs(inputs: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxc.compile(TwoInputs(), [], inputs)


def test_in_place_operations_do_not_alias_after_canonicalisation() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            z = F.relu(y, inplace=True)
            y += 1
            return y * z  # z is y

    x = torch.randn(3, 4)
    compact = fxc.compile(InPlace(), [], x)
    assert torch.equal(compact(x), InPlace()(x))


def test_dropout_follows_the_mode_whatever_its_spelling() -> None:
    class Functional(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(x, 0.5, training=self.training)

    compact = fxc.compile(Functional().train(), [], torch.ones(64))
    assert torch.equal(compact(torch.ones(64)), torch.ones(64))
    assert 5 < int((compact.train()(torch.ones(64)) == 0).sum()) < 59


def test_a_graph_module_can_be_compiled_again() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    once = fxc.compile(model, "prune-channels{ratio=0.5}", x)
    twice = fxc.compile(once, "prune-channels{ratio=0.5}", x)
    widths = [m.out_channels for m in (copy.deepcopy(twice)).modules() if isinstance(m, nn.Conv2d)]
    assert widths == [2, 4]


def test_parameters_without_a_shape_are_refused_with_what_to_do() -> None:
    for model, layer in (
        (nn.Sequential(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), nn.ReLU()), r"0\.1 \(LazyLinear\)"),
        (nn.LazyConv2d(4, 3), r"the model itself \(LazyConv2d\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()), r"1 \(LazyBatchNorm2d\)"),
    ):
        x = torch.randn(2, 3, 8, 8)
        with pytest.raises(CaptureError, match=rf"parameters of {layer} have no shape yet.*Run the model once"):
            fxc.trace(model, x)
        model(x)
        model.eval()
        assert torch.equal(fxc.trace(model, x)(x), model(x))
