"""States of quantised modules: weights and the grids that they are read on travel together."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress as fxc
from fxcompress.emit.compact_module import CompactModule
from fxcompress.emit.cpu_int8 import MODULES, Kernel
from fxcompress.quant.spec import Grid

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OBSERVED = "fuse, insert-observers, calibrate, convert-observed"


class Padded(nn.Module):
    """A sum, an average and a padding in the middle of the graph, on grids whose zero point is not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.first(x))
        x = F.pad(x + F.silu(self.second(x)), (1, 0, 2, 0))
        return self.last(self.second(x).mean((2, 3)))  # type: ignore[no-any-return]


def compiled(scale: float, shift: float, passes: str = "int8", executor: str = "auto") -> CompactModule:
    """The same network with weights and calibration of its own."""
    torch.manual_seed(1)
    model = Padded().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale).add_(shift)
    return fxc.compile(model, passes, X, calibration=[scale * X + shift], executor=executor)


@pytest.mark.parametrize("passes", ["int8", OBSERVED])
@pytest.mark.parametrize("executor", ["auto", "graph"])
def test_another_calibration_is_loaded_with_the_weights(passes: str, executor: str) -> None:
    target, source = (compiled(*numbers, passes, executor) for numbers in ((1.0, 0.0), (1.7, 0.1)))
    assert not torch.allclose(target(X), source(X), atol=0.1)  # and everything derived from the first grids is made
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(X), source(X))


def test_a_part_of_a_larger_module_takes_its_grids_too() -> None:
    whole, source = nn.Sequential(compiled(1.0, 0.0)), nn.Sequential(compiled(1.7, 0.1))
    whole(X)
    whole.load_state_dict(source.state_dict())
    assert torch.equal(whole(X), source(X))


def test_a_state_is_tensors_that_any_format_takes() -> None:
    source = compiled(1.7, 0.1)
    state = source.state_dict()
    apart = {name: tensor.clone() for name, tensor in state.items()}  # a layer called twice has its weight once
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for read in (torch.load(file, weights_only=True), safetensors.torch.load(safetensors.torch.save(apart))):
        target = compiled(1.0, 0.0)
        target.load_state_dict(read)
        assert torch.equal(target(X), source(X))


def test_a_state_of_another_form_is_refused_as_torch_does() -> None:
    target = compiled(1.0, 0.0)
    state = target.state_dict()
    state["second.input_grid"] = state["second.input_grid"][:2]
    state["last.input_grid"] = torch.zeros(4, dtype=torch.float64)
    state["first.residual_grid"] = state.pop("first.input_grid")
    with pytest.raises(RuntimeError) as caught:
        target.load_state_dict(state)
    text = str(caught.value)
    assert 'Missing key(s) in state_dict: "first.input_grid"' in text
    assert 'Unexpected key(s) in state_dict: "first.residual_grid"' in text
    assert "second.input_grid holds 2 numbers, where 4 belong" in text
    assert "last" in text
    assert "scale must be a positive number" in text
    missing, unexpected = target.load_state_dict({}, strict=False)
    assert "first.input_grid" in missing
    assert not unexpected


def test_float_states_hold_tensors_of_the_model_only() -> None:
    torch.manual_seed(1)
    model = Padded().eval()
    assert list(fxc.compile(model, "fuse", X).state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("name", MODULES)
def test_every_grid_of_a_kernel_is_in_its_state(name: str) -> None:
    grids = {"input": Grid(0.25, 3), "output": Grid(0.5, 128), "left": Grid(0.125, 0), "right": Grid(2.0, 9),
             "grid": Grid(1.5, 1, 0, 15), "query": Grid(0.375, 2), "key": Grid(0.75, 4),
             "value": Grid(0.1875, 5)}  # fmt: skip
    config = {
        "channels": 2, "in_channels": 2, "out_channels": 2, "in_features": 2, "out_features": 2,
        "kernel_size": [1], "stride": [1], "padding": [0], "dilation": [1], "groups": 1, "bias": True,
        "ceil_mode": False, "operation": "mean", "dimensions": 0, "arguments": {},
        "quant_min": 0, "quant_max": 255, "num_embeddings": 2, "embedding_dim": 2,
        **{name: grid.config() for name, grid in grids.items()},
    }  # fmt: skip
    kind: type[Kernel] = MODULES[name]
    # layers hand options on to their bases
    makers = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    taken = {name for maker in makers for name in inspect.signature(maker).parameters}
    source = kind.from_config({name: config[name] for name in taken if name in config})
    wanted = {name for name in taken if name in grids}
    assert len([name for name in source.state_dict() if name.endswith("grid")]) == len(wanted)
    target = kind.from_config(
        {**source.config(), **{name: Grid(1.0, 7).config() for name in wanted}}  # the same form, other grids
    )
    target.load_state_dict(source.state_dict())
    assert target.config() == source.config()
    assert copy.deepcopy(target).config() == source.config()
