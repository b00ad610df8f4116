"""Dynamic and weight-only quantisation: what becomes of which layer, what it needs, and equality of the stages."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.analysis.quantization import plan_quantization
from fxcompress.emit.cpu_int8 import (
    Int8Conv,
    Int8DynamicLinear,
    Int8Embedding,
    Int8Linear,
    Int8WeightOnlyLinear,
    Quantize,
    QuantizeRows,
)
from fxcompress.errors import InputError, OptionError
from fxcompress.graph import ops
from fxcompress.pipeline.text import parse, print_pipeline
from fxcompress.quant.arithmetic import signal_to_noise
from fxcompress.quant.observers import MinMax
from fxcompress.quant.rows import DynamicQuantize
from fxcompress.quant.spec import MODES


class Block(nn.Module):
    """A layer of an encoder, or of a decoder where each token sees those before it only."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads, self.causal = heads, causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        z: torch.Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return z


class Encoder(nn.Module):
    """Image patches by a convolution, blocks, and a head on the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.blocks = nn.Sequential(*(Block(32, 4, False) for _ in range(2)))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))
        return y


class Decoder(nn.Module):
    """Tokens in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 32)
        self.blocks = nn.Sequential(*(Block(32, 4, True) for _ in range(2)))
        self.head = nn.Linear(32, 40)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.blocks(self.embed(ids)))
        return y


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def compiled(model: nn.Module, x: torch.Tensor, passes: Any, **data: Any) -> tuple[fx.GraphModule, fxc.CompactModule]:
    """The quantise-dequantise graph, and the result."""
    kept: dict[str, fx.GraphModule] = {}

    def keep(name: str, graph_module: fx.GraphModule) -> None:
        kept[name.partition("{")[0]] = copy.deepcopy(graph_module)

    compact = fxc.compile(model, passes, x, dump=keep, **data)
    return kept["convert-observed"], compact


def layers(module: nn.Module) -> dict[str, str]:
    """The kernels of a lowered graph with weights, by path."""
    kinds = (Int8Conv, Int8Linear, Int8DynamicLinear, Int8WeightOnlyLinear, Int8Embedding)
    return {name: type(one).__name__ for name, one in module.named_modules() if isinstance(one, kinds)}


def count(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(one, kind) for one in module.modules())


def assert_equals(reference: fx.GraphModule, compact: fxc.CompactModule, *inputs: torch.Tensor) -> None:
    """Kernels and graph compute what the quantise-dequantise graph computes."""
    with torch.no_grad():
        for compact.executor in ("auto", "graph"):
            for x in inputs:
                found, expected = compact(x), reference(x)
                assert found.shape == expected.shape
                assert signal_to_noise(expected, found) >= 35
    compact.executor = "auto"


# -- the plan --------------------------------------------------------------------------------------------------------


def fused(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    return fxc.PassManager(["fuse", "fuse-activation"]).run(fxc.trace(model.eval(), x), x).graph_module


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.second = nn.Conv2d(3, 4, 3), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.relu(self.first(torch.relu(self.conv(x)).mean((2, 3)))))
        return y


PLANS = {
    "dynamic": "int8 first + relu_1 (dynamic)\nint8 second (dynamic)",
    "weight-only": "int8 first + relu_1 (weight-only)\nint8 second (weight-only)",
}


@pytest.mark.parametrize("mode", PLANS)
def test_only_linear_layers_become_8_bit_and_ask_for_no_grids(mode: str) -> None:
    plan = plan_quantization(fused(Small(), IMAGES), lambda path, module: None, lambda path, module: mode)
    assert str(plan).startswith(PLANS[mode])
    assert not plan.groups
    assert f"mode='{mode}' does not measure" in plan.reasons["conv"]
    assert plan.reasons["mean"] == "no int8 layer reads it"


def test_static_layers_ask_for_grids_that_dynamic_ones_can_store() -> None:
    modes = {"first": "dynamic"}
    plan = plan_quantization(
        fused(Small(), IMAGES), lambda path, module: None, lambda path, module: modes.get(path, "static")
    )
    assert str(plan).split("\nfloat")[0] == (
        "int8 conv + relu\nint8 first + relu_1 (dynamic)\nint8 second\ngrid x\ngrid relu_1"
    )
    assert plan.groups[1].layer == "second"


# -- the stages ------------------------------------------------------------------------------------------------------


def test_layers_that_read_the_same_value_share_its_rows() -> None:
    reference, compact = compiled(Encoder(), IMAGES, "int8-dynamic")
    kinds = [ops.kind(node) for node in reference.graph.nodes]
    assert kinds.count("linear_function") == 2 * 6 + 1
    assert kinds.count("fake_quantize_rows") == 2 * 4 + 1
    assert "fake_quantize" not in kinds
    assert count(compact, QuantizeRows) == 9
    assert count(compact, Quantize) == 0


def test_weights_are_rounded_to_fine_scales() -> None:
    for mode in ("dynamic", "weight-only"):
        reference, _ = compiled(Small(), IMAGES, ["fuse", P.Quantize(mode=mode, reduced_range=False)])
        scale, weight = reference.get_buffer("first.weight_scale"), reference.get_parameter("first.weight")
        torch.testing.assert_close(scale, weight.abs().amax(1) / 127)


def test_a_reduced_range_is_for_products_of_integers() -> None:
    largest = {}
    for mode in MODES:
        _, compact = compiled(Small(), IMAGES, ["fuse", P.Quantize(mode=mode, reduced_range=True)], calibration=IMAGES)
        largest[mode] = int(compact.get_buffer("first.weight").abs().max())
    assert largest == {"static": 64, "dynamic": 64, "weight-only": 127} or largest["static"] < 64


def test_no_calibration_is_needed_but_for_static_layers() -> None:
    for preset in ("int8-dynamic", "int8-weight-only"):
        fxc.compile(Encoder(), preset, IMAGES)
    with pytest.raises(InputError, match="needs data"):
        fxc.compile(Encoder(), "fuse, quantize{dynamic='*'}", IMAGES)


def test_convolutions_may_be_static_where_linear_layers_are_dynamic() -> None:
    passes = ["fuse", P.Quantize(dynamic="*", weight_only="head")]
    reference, compact = compiled(Encoder(), IMAGES, passes, calibration=IMAGES)
    kinds = layers(compact)
    assert kinds.pop("patches") == "Int8Conv"
    assert kinds.pop("head") == "Int8WeightOnlyLinear"
    assert set(kinds.values()) == {"Int8DynamicLinear"}
    assert_equals(reference, compact, IMAGES)


def test_the_ledger_says_how_layers_get_their_inputs_and_why_others_stay_float() -> None:
    notes = compiled(Small(), IMAGES, "int8-dynamic")[1].report.to_dict()["layers"]  # type: ignore[union-attr]
    told = {row["layer"]: " ".join(map(str, row.values())) for row in notes}
    assert "int8: rows are measured at every call" in told["first"]
    assert "a convolution needs values on fixed grids" in told["conv"]
    notes = compiled(Decoder(), TOKENS, "int8-weight-only")[1].report.to_dict()["layers"]  # type: ignore[union-attr]
    told = {row["layer"]: " ".join(map(str, row.values())) for row in notes}
    assert "int8 weight, float arithmetic" in told["head"]
    assert "int8 weight" in told["embed"]


def test_embeddings_whose_weights_change_stay_float() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Linear(4, 3))
    _, compact = compiled(model, torch.arange(4), "int8-weight-only")
    assert layers(compact) == {"1": "Int8WeightOnlyLinear"}


# -- equality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"mode": "dynamic"}, {"mode": "weight-only"}, {"dynamic": "*"}], ids=str)
@pytest.mark.parametrize("network", [Encoder, Decoder])
def test_transformers_compute_what_their_pairs_compute(network: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model, x = network().eval(), IMAGES if network is Encoder else TOKENS
    reference, compact = compiled(model, x, ["fuse", P.Quantize(**options)], calibration=[x])
    others = [torch.cat([x, x + 1])[:3], x[:1]] if network is Encoder else [x[:1, :1], x.repeat(3, 1)[:5, :4]]
    assert_equals(reference, compact, x, *others)
    with torch.no_grad():
        assert signal_to_noise(model(x), compact(x)) >= 28
    compact.save(tmp_path / "m.fxc")
    assert torch.equal(fxc.load(tmp_path / "m.fxc")(x), compact(x))


def test_no_rows_and_rows_of_equal_numbers() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5))
    for preset in ("int8-dynamic", "int8-weight-only"):
        reference, compact = compiled(model, torch.randn(4, 6), preset)
        assert_equals(reference, compact, torch.zeros(3, 6), torch.full((2, 6), -2.5), torch.randn(3, 6) * 1e6)
        assert compact(torch.zeros(0, 6)).shape == (0, 5)


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=5), st.data(), st.sampled_from([1, 2, 7, 33]),
    st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_layers_in_any_modes_compute_what_their_pairs_compute(
    widths: list[int], data: st.DataObject, batch: int, seed: int
) -> None:
    torch.manual_seed(seed)
    modes = {str(2 * index): data.draw(st.sampled_from(MODES), label="mode") for index in range(len(widths) - 1)}
    stack: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        stack += [nn.Linear(wide, narrow), data.draw(st.sampled_from([nn.ReLU(), nn.GELU(), nn.Identity()]))]
    model, x = nn.Sequential(*stack).eval(), torch.randn(batch, widths[0])
    of = {mode: tuple(path for path, one in modes.items() if one == mode) for mode in MODES}
    options: dict[str, Any] = {"dynamic": of["dynamic"], "weight_only": of["weight-only"]}
    reference, compact = compiled(
        model, x, ["canonicalize", P.Quantize(activation="minmax", **options)], calibration=[x]
    )
    names = {"static": "Int8Linear", "dynamic": "Int8DynamicLinear", "weight-only": "Int8WeightOnlyLinear"}
    assert layers(compact) == {path: names[mode] for path, mode in modes.items()}
    assert_equals(reference, compact, x)


# -- options ---------------------------------------------------------------------------------------------------------


def test_options_are_text() -> None:
    for text in (
        "quantize{mode=dynamic}",
        "quantize{mode=weight-only, ignore=[head]}",
        "quantize{dynamic=['*'], weight_only=[head]}",
        "insert-observers{mode=weight-only, weight_bits=4}",
    ):
        assert parse(print_pipeline(parse(text))) == parse(text)
    assert parse("quantize{dynamic=head.*}") == [P.Quantize(dynamic=("head.*",))]


def test_wrong_options_are_refused() -> None:
    for options, message in [
        ({"mode": "dynamical"}, "mode must be one of 'static', 'dynamic', 'weight-only'"),
        ({"mode": "dynamic", "activation": "minmax"}, "leave out activation="),
        ({"mode": "weight-only", "qconfig": SimpleNamespace()}, "leave out mode="),
    ]:
        with pytest.raises(OptionError, match=message):
            P.Quantize(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"weight_only='heat' matches no layer.*did you mean 'head'"):
        fxc.compile(Encoder(), [P.Quantize(mode="dynamic", weight_only="heat")], IMAGES)


def test_configs_of_torch_ao_say_what_is_dynamic() -> None:
    dynamic = SimpleNamespace(activation=lambda: SimpleNamespace(is_dynamic=True), weight="per-channel")
    floats = SimpleNamespace(activation=lambda: SimpleNamespace(dtype=torch.float32), weight="per-channel")
    static = SimpleNamespace(activation=MinMax, weight="per-channel")
    mapping = {"": static, "module_name": {"first": dynamic, "second": floats}}
    _, compact = compiled(Small(), IMAGES, ["fuse", P.Quantize(qconfig=mapping)], calibration=IMAGES)
    assert layers(compact) == {
        "conv": "Int8Conv", "first": "Int8DynamicLinear", "second": "Int8WeightOnlyLinear"
    }  # fmt: skip


def test_training_sees_the_rows_that_the_lowered_graph_sees() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    x, labels = torch.randn(32, 8), torch.randint(0, 3, (32,))
    kept: dict[str, fx.GraphModule] = {}
    passes = [P.QAT(P.Train([(x, labels)], epochs=4, learning_rate=0.05), mode="dynamic", weight_bits=4)]
    compact = fxc.compile(
        model, passes, x, dump=lambda name, graph: kept.update({name.partition("{")[0]: copy.deepcopy(graph)})
    )
    started = [one for one in kept["train"].modules() if isinstance(one, DynamicQuantize)]
    assert len(started) == 2
    assert all(one.started for one in started)
    assert count(kept["convert-observed"], DynamicQuantize) == 0
    with torch.no_grad():
        trained = kept["train"].eval()(x)
        assert signal_to_noise(trained, kept["convert-observed"](x)) >= 60
        assert signal_to_noise(trained, compact(x)) >= 35
        assert not torch.allclose(trained, model.eval()(x), atol=1e-2)
    assert int(compact.get_buffer("3.weight").abs().max()) <= 8
