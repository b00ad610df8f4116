"""Which channels belong together, for the operators of convolutional networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.analysis.channels import ChannelAnalysis, Walk, analyse, layer
from fxcompress.analysis.transfer import RESIZE, RULES, transfer
from fxcompress.errors import PassError
from fxcompress.graph import ops
from fxcompress.testing import assert_equivalent

Forward = Callable[["Net", torch.Tensor], torch.Tensor]
X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """Convolutions a and b of 4 channels, c that reads them, and a forward to be given."""

    def __init__(self, forward: Forward, inputs: int = 4) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.c = nn.Conv2d(inputs, 5, 1)
        self.run = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.run(self, x))  # type: ignore[no-any-return]


def groups(model: nn.Module) -> tuple[ChannelAnalysis, dict[str, list[int]]]:
    analysis = analyse(fxc.compile(model.eval(), [], X))
    found = {
        parameter.paths[0]: analysis.groups(parameter.axis)[0].tolist()
        for parameter in analysis.parameters
        if parameter.producer
    }
    return analysis, found


def test_a_residual_add_ties_equal_positions() -> None:
    _, found = groups(Net(lambda net, x: net.a(x) + net.b(x)))
    assert found["a.weight"] == found["b.weight"]
    assert len(set(found["a.weight"])) == 4


def test_concatenation_keeps_them_apart() -> None:
    _, found = groups(Net(lambda net, x: torch.cat([net.a(x), net.b(x)], 1), inputs=8))
    assert not set(found["a.weight"]) & set(found["b.weight"])


def test_a_multiplication_with_an_image_freezes() -> None:
    analysis, found = groups(Net(lambda net, x: net.a(x) + F.pad(x, (0, 0, 0, 0, 0, 1))))
    assert {analysis.frozen[group] for group in found["a.weight"]} == {"add (add) ties it to a dimension of fixed size"}


def test_broadcasting_over_channels_does_not_tie() -> None:
    analysis, found = groups(Net(lambda net, x: net.a(x) * x.mean(1, keepdim=True)))
    assert not set(found["a.weight"]) & set(analysis.frozen)


def test_a_shuffle_ties_positions_of_its_groups() -> None:
    _, found = groups(Net(lambda net, x: F.channel_shuffle(net.a(x), 2)))
    assert found["a.weight"][0] == found["a.weight"][2]
    assert found["a.weight"][1] == found["a.weight"][3]
    assert len(set(found["a.weight"])) == 2


def test_flatten_and_its_undoing_tie_nothing() -> None:
    _, found = groups(Net(lambda net, x: net.a(x).flatten(1).reshape(2, 4, 8, 8)))
    assert len(set(found["a.weight"])) == 4


def test_statistics_over_channels_freeze_with_their_name() -> None:
    analysis, found = groups(Net(lambda net, x: F.softmax(net.a(x), dim=1)))
    assert {analysis.frozen[group] for group in found["a.weight"]} == {"softmax over the channels (softmax)"}


def test_a_reused_layer_ties_its_output_to_its_input() -> None:
    layer = nn.Conv2d(6, 6, 1)
    _, found = groups(nn.Sequential(nn.Conv2d(3, 6, 1), layer, nn.ReLU(), layer, nn.Conv2d(6, 2, 1)))
    assert found["0.weight"] == found["1.weight"]


def test_a_layer_norm_over_positions_freezes() -> None:
    analysis, found = groups(nn.Sequential(nn.Conv2d(3, 6, 1), nn.LayerNorm([6, 8, 8]), nn.Conv2d(6, 2, 1)))
    assert {analysis.frozen[g] for g in found["0.weight"]} == {"normalised together with positions by 1"}


def test_a_million_channels_are_walked_without_touching_them_one_by_one() -> None:
    """In Python, index by index, this would take minutes."""
    layers = nn.Sequential(nn.Conv2d(3, 1000, 1), nn.Upsample((25, 40)), nn.Flatten(), nn.Linear(1_000_000, 2))
    analysis, found = groups(layers)
    widest = max(analysis.parameters, key=lambda parameter: len(parameter.axis))
    assert len(widest.axis) == 1_000_000
    assert len(np.unique(found["0.weight"])) == 1000
    assert np.array_equal(np.repeat(found["0.weight"], 1000), analysis.groups(widest.axis)[0])


def double_first(x: torch.Tensor) -> torch.Tensor:
    """A user's operator."""
    return torch.cat([x[:, :1] * 2, x[:, 1:]], dim=1) if x.shape[1] > 1 else x * 2


fx.wrap("double_first")


def by_sign(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.sum() > 0 else x


def test_a_function_that_cannot_be_traced_keeps_its_channels() -> None:
    analysis, found = groups(Net(lambda net, x: by_sign(net.a(x))))
    assert "read by by_sign (by_sign), which the channel rules do not know" in analysis.frozen[found["a.weight"][0]]


def test_a_users_operator_can_be_given_a_rule() -> None:
    model = Net(lambda net, x: double_first(net.a(x)))

    @transfer(double_first)
    def rule(walk: Walk, node: fx.Node) -> object:
        (source,) = node.all_input_nodes
        axes = walk.of(source)
        first = axes[1]
        if first is not None:
            walk.freeze(first.take(slice(0, 1)), "the first channel is special")
        return axes

    try:
        torch.manual_seed(0)
        masked = fxc.compile(model, [P.MaskChannels(0.5)], X)
        pruned = fxc.compile(model, [P.PruneChannels(0.5)], X)
        assert pruned.get_parameter("a.weight").shape[0] < 4
        assert_equivalent(masked, pruned, X)
        assert double_first in {node.target for node in pruned.graph.nodes}
    finally:
        del RULES[double_first]


class Mixer(nn.Module):
    """A layer of a user's own, which looks at data, so that it cannot be traced."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.width = outputs
        self.weight, self.scale = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.rand(inputs) + 0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale.view(1, -1, 1, 1)
        if x.sum() > 1e9:
            x = x * 0
        made = torch.einsum("oi,bihw->bohw", self.weight, x).view(x.shape[0], self.width, *x.shape[2:])
        return made + self.bias.view(1, -1, 1, 1)


def gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """A function of a user's own."""
    return x * torch.tanh(gate) if x.sum() < 1e9 else x


fx.wrap("gated")


def mixer_rule(walk: Walk, node: fx.Node, *, reads: bool = True) -> object:
    """As the documentation has it."""
    module: Any = layer(node)
    given = walk.of(node.args[0])
    channels = given[1]
    walk.parameter(module.scale, 0, channels, "scale of the mixer")
    walk.parameter(module.weight, 1, channels, "inputs of the mixer")
    if channels is not None and reads:
        harmless = (channels.constant == 0) | walk.unused(module.weight, 1)
        walk.read(node, channels, harmless, "a channel that is not zero is mixed")
    made = walk.made_here(module.weight, 0)
    walk.parameter(module.bias, 0, made, "bias of the mixer")
    return (given[0], made, *given[2:])


def gated_rule(walk: Walk, node: fx.Node) -> object:
    """As the documentation has it."""
    first, second = (walk.of(argument) for argument in node.args)
    tied = [walk.tie(one, other, "gated") for one, other in zip(first, second, strict=True)]
    return tuple(axis and axis.varying() for axis in tied)


@pytest.mark.parametrize("reads", [True, False])
def test_a_users_module_can_be_given_a_rule(reads: bool) -> None:
    """Parameters, sizes kept in attributes, and shapes of what cannot be traced follow."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.mixer, self.d = (
                nn.Conv2d(3, 8, 1),
                nn.Conv2d(3, 8, 1),
                Mixer(8, 12),
                nn.Conv2d(12, 4, 1),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.d(self.mixer(gated(self.a(x), self.b(x))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Own().eval()
    try:
        transfer(gated)(gated_rule)
        transfer(Mixer, resize=lambda module: setattr(module, "width", len(module.weight)))(
            lambda walk, node: mixer_rule(walk, node, reads=reads)
        )
        masked = fxc.compile(model, [P.MaskChannels(0.5, scope="layer")], X)
        pruned = fxc.compile(model, [P.PruneChannels(0.5, scope="layer")], X)
        kept = 4 if reads else 8
        assert pruned.get_parameter("a.weight").shape[0] == pruned.get_parameter("b.weight").shape[0] == kept
        assert pruned.get_parameter("mixer.weight").shape == (6, kept)
        assert pruned.get_parameter("mixer.bias").shape == (6,)
        assert_equivalent(masked, pruned, X)
        assert pruned.report is not None
        notes = [note for line in pruned.report.layers for note in line.notes]
        assert reads != any("whose rule does not say that it reads it" in note for note in notes)
    finally:
        for key in (gated, Mixer):
            del RULES[key]
            ops.WHOLE.discard(key)
        del RESIZE[Mixer]


def test_a_rule_that_returns_wrong_axes_is_named() -> None:
    try:
        transfer(double_first)(lambda walk, node: walk.of(node.args[0])[:2])
        with pytest.raises(PassError, match=r"rule for double_first .* one axis, or None, for each dimension"):
            fxc.compile(Net(lambda net, x: double_first(net.a(x))), [P.PruneChannels(0.5)], X)
    finally:
        del RULES[double_first]


@pytest.mark.parametrize("padding", ["same", "valid", (1, 0)])
def test_padding_given_as_a_word(padding: str | tuple[int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=padding), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=padding)).eval()
    masked = fxc.compile(model, [P.MaskChannels(0.5)], X)
    assert_equivalent(masked, fxc.compile(model, [P.PruneChannels(0.5)], X), X)
