"""What tests of the CPU kernels share: when they can run, small graphs of lowered layers, and the oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxcompress.emit.compact_module import CompactModule
from fxcompress.emit.cpu_int8 import Int8Layer
from fxcompress.emit.native import library
from fxcompress.quant.spec import Grid

#: Tests that run our own kernels.
NEEDED = pytest.mark.skipif(library.library() is None, reason=f"no kernels: {library.unavailable()}")

SIGNED, POSITIVE = Grid(0.03125, 128), Grid(0.0234375, 0)


def chain(*modules: nn.Module, inputs: int = 1) -> CompactModule:
    """A graph that calls modules one after the other; the first one with all inputs."""
    root, graph = nn.Module(), fx.Graph()
    value: Any = tuple(graph.placeholder(f"x{index}") for index in range(inputs))
    for index, module in enumerate(modules):
        root.add_module(f"layer{index}", module.eval())
        value = (graph.call_module(f"layer{index}", value),)
    graph.output(value[0])
    return CompactModule(root, graph)


def filled(layer: Int8Layer, seed: int) -> Int8Layer:
    generator = torch.Generator().manual_seed(seed)
    layer.weight.copy_(torch.randint(-127, 128, layer.weight.shape, generator=generator))
    layer.weight_scale.copy_(torch.rand(len(layer.weight_scale), generator=generator) * 1e-3 + 1e-4)
    if layer.bias is not None:
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
    return layer


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def by_graph(compact: CompactModule, *inputs: torch.Tensor) -> Any:
    twin = copy.deepcopy(compact)
    twin.executor = "graph"
    return twin(*(tensor.clone(memory_format=torch.preserve_format) for tensor in inputs))


def assert_same(compact: CompactModule, *inputs: torch.Tensor) -> None:
    """Kernels and graph agree: bytes up to the rounding of a number between two integers."""
    expected = by_graph(compact, *inputs)
    for turn in range(2):  # the second call has a plan
        found = compact(*inputs)
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        if found.dtype == torch.uint8:
            gap = (found.int() - expected.int()).abs()
            assert gap.max() <= 1, f"call {turn}"
            assert (gap > 0).sum() <= 3 + 0.02 * gap.numel()
        else:
            # sums of products of the size of one cancel
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * max(1.0, float(expected.abs().max())))
    assert planned(compact)


def planned(compact: CompactModule) -> bool:
    made = compact._native.made
    return made is not None and any(plan is not None for plan in made.plans.values())
