"""Quantize, part by part: what becomes 8-bit, the graph at each stage, biases, memory, and equality of the stages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_leaves

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.analysis.quantization import plan_quantization
from fxcompress.emit.cpu_int8 import Int8Add, Int8Affine, Int8Conv, Int8Layer, Int8MaxPool, Int8Mul
from fxcompress.errors import InputError, OptionError
from fxcompress.graph import ops
from fxcompress.graph.compare import run
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.printer import print_graph
from fxcompress.pipeline.base import PassContext
from fxcompress.quant.arithmetic import fake_quantize, signal_to_noise
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.observers import ChannelMean
from fxcompress.quant.spec import WEIGHT
from fxcompress.testing import assert_equivalent, assert_graph

X = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers of every kind, and a forward given as a function."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False)
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(256, 3)
        self.norm, self.wide = nn.LayerNorm(8), nn.Conv2d(8, 4, 1)
        self.transposed = nn.ConvTranspose2d(4, 4, 1)
        self.mirror = nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1)
        self.even = nn.Conv2d(4, 4, (2, 4), padding="same")
        self.position = nn.Parameter(torch.randn(1, 4, 8, 8))
        self.scaled, self.joined = nn.BatchNorm2d(4), nn.BatchNorm2d(8)
        for norm in (self.scaled, self.joined):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.get_buffer("running_mean"))
            nn.init.uniform_(norm.get_buffer("running_var"), 0.5, 2.0)
        self.function = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


Forward = Callable[[Any, torch.Tensor], Any]


def fused(forward: Forward) -> fx.GraphModule:
    return fxc.PassManager(["fuse"]).run(fxc.trace(Net(forward).eval(), X), X).graph_module


def stages(forward: Forward, x: torch.Tensor = X, **options: Any) -> dict[str, fx.GraphModule]:
    """The graph behind each part of Quantize, by the name of the pass."""
    kept: dict[str, fx.GraphModule] = {}

    def keep(name: str, graph_module: fx.GraphModule) -> None:
        kept[name] = copy.deepcopy(graph_module)

    manager = fxc.PassManager(["fuse", P.Quantize(X, **options)], dump=keep)
    manager.run(fxc.trace(Net(forward).eval(), x), x)
    return kept


def kinds(graph_module: fx.GraphModule) -> list[str]:
    """What the nodes of a graph are, modules by the name of their class."""
    return [
        type(ops.submodule(node)).__name__ if node.op == "call_module" else ops.kind(node)
        for node in graph_module.graph.nodes
        if node.op not in ("placeholder", "output")
    ]


# -- the plan --------------------------------------------------------------------------------------------------------

PLANS: dict[str, tuple[Forward, str]] = {
    "activations and residual adds belong to the layer": (
        lambda net, x: F.relu(net.b(F.relu(net.a(x))) + x),
        """
        int8 a + relu
        int8 b + add + relu_1
        grid x
        grid relu
        """,
    ),
    "values that are only moved share a grid, also through cat": (
        lambda net, x: net.wide(torch.cat([F.max_pool2d(net.a(x), 1), net.b(x)], 1)),
        """
        int8 a
        int8 b
        int8 wide
        grid x
        grid a, b
        """,
    ),
    "what only float operators read stays float": (
        lambda net, x: torch.softmax(net.norm(net.a(x)), 1),
        """
        int8 a
        grid x
        float norm: no int8 kernel for layer_norm
        float softmax: no int8 kernel for softmax
        """,
    ),
    "pooling between 8-bit layers is 8-bit": (
        lambda net, x: net.fc(torch.flatten(F.adaptive_avg_pool2d(net.a(x), 1), 1)),
        """
        int8 a
        int8 fc
        int8 adaptive_avg_pool2d
        grid x
        grid a
        grid adaptive_avg_pool2d
        """,
    ),
    "pooling in front of the first layer stays float": (
        lambda net, x: net.a(F.avg_pool2d(x, 2)),
        """
        int8 a
        grid avg_pool2d
        float avg_pool2d: its inputs are float
        """,
    ),
    "a gate may stay float": (
        lambda net, x: net.b((y := F.relu(net.a(x))) * torch.sigmoid(F.adaptive_avg_pool2d(y, 1))),
        """
        int8 a + relu
        int8 b
        int8 mul
        grid x
        grid relu
        grid mul
        float adaptive_avg_pool2d: no int8 layer reads it
        float sigmoid: no int8 kernel for sigmoid
        """,
    ),
    "a sum of two 8-bit values and its relu": (
        lambda net, x: net.c(F.relu(F.max_pool2d(net.a(x), 1) + F.max_pool2d(net.b(x), 1))),
        """
        int8 a
        int8 b
        int8 c
        int8 add
        int8 relu
        grid x
        grid a
        grid b
        grid relu
        """,
    ),
    "layers without a kernel say why": (
        lambda net, x: net.transposed(net.mirror(x)),
        """
        float mirror: padding_mode='reflect'
        float transposed: no int8 kernel for conv_transpose
        """,
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_what_becomes_8_bit(case: str) -> None:
    forward, expected = PLANS[case]
    plan = plan_quantization(fused(forward), lambda path, module: None)
    assert str(plan) == "\n".join(line.strip() for line in expected.strip().splitlines())


def test_layers_can_be_left_out_and_numbers_of_other_types_stay() -> None:
    graph = fused(lambda net, x: net.b(net.a(x)))
    plan = plan_quantization(graph, lambda path, module: "too dear" if path == "b" else None)
    assert [anchor.path for anchor in plan.anchors] == ["a"]
    assert plan.reasons == {"b": "too dear"}
    double = fxc.trace(Net(lambda net, x: net.a(x)).double().eval(), X.double())
    assert plan_quantization(double, lambda path, module: None).reasons == {"a": "its numbers are not float32"}


# -- the graph at each stage -----------------------------------------------------------------------------------------


def test_observers_leave_the_function_and_the_paths_of_the_weights_alone() -> None:
    graph = fused(lambda net, x: F.relu(net.c(net.a(x))))
    observed = fxc.PassManager([P.InsertObservers(activation="minmax", correct_bias=False)]).run(graph, X).graph_module
    assert_graph(
        observed,
        """
        stage OBSERVED
        %0 = placeholder x
        %1 = module observers.x: MinMax(uint8[0,255])(%0)
        %2 = attribute a.weight
        %3 = module observers.a_weight: PerChannelMinMax(int8[-127,127], axis=0)(%2)
        %4 = attribute a.bias
        %5 = conv_function(%1, %3, bias=%4, stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        %6 = module observers.a: MinMax(uint8[0,255])(%5)
        %7 = attribute c.weight
        %8 = module observers.c_weight: PerChannelMinMax(int8[-127,127], axis=0)(%7)
        %9 = conv_function(%6, %8, stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        %10 = relu(%9)  # epilogue of c
        %11 = output(%10)
        """,
        shapes=False,
    )
    assert torch.equal(run(observed, ExampleInputs.of(X)), run(graph, ExampleInputs.of(X)))
    assert "a.weight" in observed.state_dict()


def test_gradients_reach_the_weights_at_every_stage_before_kernels() -> None:
    kept = stages(lambda net, x: net.b(F.relu(net.a(x))))
    for name in ("insert-observers", "convert-observed"):
        kept[name](X).square().sum().backward()
        gradient = kept[name].get_parameter("a.weight").grad
        assert gradient is not None
        assert gradient.abs().sum() > 0


def test_fake_quantisers_start_transparent_and_round_when_told_to() -> None:
    graph = fused(lambda net, x: net.b(F.relu(net.a(x))))
    manager = fxc.PassManager([P.InsertObservers(qat=True), P.Calibrate(X)])
    observed = manager.run(graph, X).graph_module  # the manager checks that the outputs are the same
    quantisers = [module for module in observed.modules() if isinstance(module, FakeQuantize)]
    assert len(quantisers) == 4
    for module in quantisers:
        module.quantizing = True
    converted = fxc.PassManager([P.ConvertObserved()]).run(observed, X).graph_module
    assert signal_to_noise(run(converted, ExampleInputs.of(X)), run(observed, ExampleInputs.of(X))) > 60


def test_layers_and_what_follows_become_one_module() -> None:
    lowered = stages(lambda net, x: F.relu(net.b(F.relu6(net.a(x))) + x))["lower"]
    assert kinds(lowered) == ["Quantize", "Int8Conv", "Dequantize", "Int8Conv"]
    last = lowered.get_submodule("b")
    assert isinstance(last, Int8Conv)
    assert last.output is None  # read by float operators only: no integers in between
    assert last.residual == "float"


def test_data_stay_integers_between_layers() -> None:
    def forward(net: Any, x: torch.Tensor) -> Any:
        y = F.max_pool2d(net.a(x), 3, 2, 1)
        y = torch.cat([y, net.b(y).flip(1)], 1).transpose(2, 3)
        y = F.pad(F.interpolate(net.wide(y), scale_factor=2.0), (1, 0, 0, 1))
        y, z = torch.chunk(net.c(y), 2, 1)
        y = torch.flatten(F.adaptive_avg_pool2d(torch.cat([z, y], 1), 1), 1)
        return net.fc(y)

    kept = stages(forward)
    lowered = kept["lower"]
    assert kinds(lowered).count("Quantize") == 1
    assert "Dequantize" not in kinds(lowered)
    dtypes = {node.name: str(value.dtype) for node in lowered.graph.nodes
              if (value := node.meta["fxcompress"].value) is not None and hasattr(value, "dtype")}  # fmt: skip
    assert [name for name, dtype in dtypes.items() if dtype != "torch.uint8"] == ["x", "fc", "output"]
    agree(kept, 1, 4, 7)


def agree(kept: dict[str, fx.GraphModule], *batches: int) -> None:
    """The lowered graph gives the numbers of the graph with quantise-dequantise pairs, up to rounding at the end."""
    for batch in batches:
        x = ExampleInputs.of(torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(batch)))
        assert signal_to_noise(run(kept["convert-observed"], x), run(kept["lower"], x)) > 100


FORWARDS: dict[str, Forward] = {
    "relu6 and hardswish": lambda net, x: net.c(F.hardswish(net.b(F.relu6(net.a(x))))),
    "residual of a float value": lambda net, x: net.c(net.a(x) + F.softplus(x)),
    "gate": lambda net, x: net.b((y := F.relu(net.a(x))) * torch.sigmoid(F.adaptive_avg_pool2d(y, 1))),
    "sum of pooled values": lambda net, x: net.c(F.relu(F.max_pool2d(net.a(x), 2) + F.max_pool2d(net.b(x), 2))),
    "activation without a kernel": lambda net, x: net.c(F.gelu(net.a(x))),
    "uneven padding": lambda net, x: net.c(F.relu(net.even(net.a(x)))),
    "a layer called twice": lambda net, x: net.a(F.relu(net.a(x))),
    "value also read by float": lambda net, x: (y := net.a(x), net.b(y), torch.softmax(y, 1))[1:][0],
    "flattened images": lambda net, x: net.head(torch.flatten(F.relu(net.a(x)), 1)),
    "layer norm between": lambda net, x: net.b(net.norm(net.a(x))),
    "relu of a sum with a branch": lambda net, x: net.c(F.relu(net.b(y := F.relu(net.a(x))) + y)) + 1,
    "maximum of everything": lambda net, x: net.fc(torch.flatten(F.adaptive_max_pool2d(net.a(x), 1), 1)),
    "sizes read from values": lambda net, x: net.head((y := net.a(x)).reshape(y.shape[0], -1)),
    "average over windows": lambda net, x: net.c(F.avg_pool2d(net.a(x), 3, 2, 1)),
    "mean": lambda net, x: net.fc(F.relu(net.a(x)).mean([2, 3])),
    "norm of a sum": lambda net, x: net.c(F.relu(net.scaled(F.relu(net.a(x)) + F.relu(net.b(x))))),
    "norm of joined values": lambda net, x: (
        net.wide(y := net.joined(torch.cat([net.a(x), net.b(x)], 1))) * F.softplus(y)[:, :4]
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # PyTorch is slow there, in float
@pytest.mark.parametrize("case", FORWARDS)
def test_the_lowered_graph_gives_the_numbers_of_the_pairs(case: str) -> None:
    kept = stages(FORWARDS[case])
    agree(kept, 1, 3, 8)
    expected = run(kept["fuse-activation"], ExampleInputs.of(X))
    assert signal_to_noise(expected, run(kept["lower"], ExampleInputs.of(X))) > 20
    assert any(isinstance(module, Int8Layer) for module in kept["lower"].modules())


BROADCAST: dict[str, Forward] = {
    "mean over the batch": lambda net, x: net.c(F.relu(net.b(y := net.a(x)) + F.relu(net.c(y).mean(0, keepdim=True)))),
    "the first of the batch": lambda net, x: net.c(F.relu(net.b(y := net.a(x)) + F.relu(net.c(y))[:1])),
    "a layer of less": lambda net, x: net.c(F.relu(net.b((y := net.a(x))[:1]) + F.relu(net.c(y)))),
    "a parameter": lambda net, x: net.c(F.relu(net.a(x)) * 1.0 + net.position) + net.b(x) + net.position,
}


@pytest.mark.parametrize("case", BROADCAST)
def test_addends_that_have_one_shape_only_at_the_batch_of_the_example_are_broadcast_at_others(case: str) -> None:
    kept = stages(BROADCAST[case], x=X[:1])
    agree(kept, 1, 3, 8, 1)


def test_dead_layers_leave_nothing_behind() -> None:
    lowered = stages(lambda net, x: net.b(F.relu(net.a(x))))["lower"]
    assert {name for name, _ in lowered.named_buffers()} == {
        f"{layer}.{name}" for layer in "ab" for name in ("weight", "weight_scale", "bias")
    }  # fmt: skip


def test_memory_of_a_residual_is_reused_only_where_nobody_reads_it_later() -> None:
    def summing(forward: Forward) -> Int8Conv:
        kept = stages(forward)
        agree(kept, 2)
        layer = kept["lower"].get_submodule("b")
        assert isinstance(layer, Int8Conv)
        assert layer.residual is not None
        return layer

    assert summing(lambda net, x: net.c(net.b(F.relu(net.c(y := net.a(x)))) + y)).overwrite
    later = summing(lambda net, x: net.c(F.relu(net.b(F.relu(y := net.a(x))) + y) * 1.0) + net.c(y))
    assert not later.overwrite
    shared = summing(lambda net, x: net.c(net.b(F.relu(y := net.a(x))) + y.transpose(2, 3)))
    assert not shared.overwrite  # a view: the memory belongs to another value
    same = summing(lambda net, x: net.c(net.b(y := net.a(x)) + y))
    assert not same.overwrite  # the kernel reads its input while it writes


def test_sums_and_products_have_modules_of_their_own() -> None:
    lowered = stages(FORWARDS["sum of pooled values"])["lower"]
    modules = [module for module in lowered.modules() if isinstance(module, (Int8Add, Int8MaxPool))]
    assert [type(module).__name__ for module in modules] == ["Int8MaxPool", "Int8MaxPool", "Int8Add"]
    assert isinstance(modules[-1], Int8Add)
    assert modules[-1].relu
    assert any(isinstance(module, Int8Mul) for module in stages(FORWARDS["gate"])["lower"].modules())
    for case, relu in (("norm of a sum", True), ("norm of joined values", False)):
        lowered = stages(FORWARDS[case])["lower"]
        assert [module.relu for module in lowered.modules() if isinstance(module, Int8Affine)] == [relu]
        assert not any(isinstance(module, nn.BatchNorm2d) for module in lowered.modules())


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["a", "c", "fc", "grouped"])
def test_biases_make_up_for_the_rounding_of_weights_on_average(layer: str) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 8, 1, groups=2) if layer == "grouped" else Net(lambda net, x: x).get_submodule(layer)
    x = X if layer != "fc" else X.transpose(1, 3)
    x = x + torch.arange(x.shape[1]).view(1, -1, 1, 1)  # means that differ from zero and from each other
    errors = {}
    for correct in (True, False):
        observers = P.InsertObservers(activation="minmax", correct_bias=correct)
        parts = [observers, P.Calibrate(x), P.ConvertObserved()]
        graph = fxc.PassManager(parts).run(fxc.trace(nn.Sequential(module).eval(), x), x).graph_module
        for node in graph.graph.nodes:
            if ops.kind(node) == "fake_quantize":  # of values: leave the error of the weights alone
                node.replace_all_uses_with(node.all_input_nodes[0])
        graph.recompile()
        axes = [0, 1, 2] if layer == "fc" else [0, 2, 3]
        errors[correct] = (graph(x) - module(x)).mean(axes).abs().max().item()
    assert errors[True] < 0.1 * errors[False]


def converted(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    passes = [P.InsertObservers(activation="minmax"), P.Calibrate(x), P.ConvertObserved()]
    return fxc.PassManager(passes).run(fxc.trace(model.eval(), x), x).graph_module


@pytest.mark.parametrize("layer", ["a", "c"], ids=["with bias", "without"])
def test_a_layer_called_twice_is_corrected_once_by_the_mean_of_all_of_its_inputs(layer: str) -> None:
    x = X + 10 * torch.arange(4).view(1, -1, 1, 1)
    net = Net(lambda net, x: net.get_submodule(layer)(F.relu(net.get_submodule(layer)(x))))
    graph, original = converted(net, x), net.get_submodule(layer)
    weight = original.get_parameter("weight")
    rounded = fake_quantize(weight, graph.get_buffer(f"{layer}.weight_scale"), torch.zeros(4), WEIGHT)
    mean = torch.cat([x, F.relu(original(x))]).double().mean([0, 2, 3])
    shift = (rounded - weight).double().flatten(1) @ mean
    before = 0 if layer == "c" else original.get_parameter("bias")
    steps = 1e-3  # biases are rounded too
    assert torch.allclose(graph.get_parameter(f"{layer}.bias").double(), before - shift, rtol=0, atol=steps)
    assert shift.abs().max() > 10 * steps
    biases = [ops.arguments(node)["bias"] for node in graph.graph.nodes if ops.kind(node) == "conv_function"]
    assert [bias.target for bias in biases] == [f"{layer}.bias"] * 2
    text = print_graph(graph)
    assert not P.ConvertObserved().run(graph, PassContext(ExampleInputs.of(x))).modified
    assert print_graph(graph) == text


def test_a_bias_that_something_else_reads_stays_what_it_was() -> None:
    net = Net(lambda net, x: (net.a(x), net.a.bias * 2))
    graph = converted(net, X + 3)
    found = graph(X)
    assert torch.equal(found[1], net.get_parameter("a.bias") * 2)
    assert torch.equal(graph.get_parameter("a.bias"), net.get_parameter("a.bias"))
    assert not torch.equal(graph.get_parameter("a.bias_1"), net.get_parameter("a.bias"))


class Names(nn.Module):
    """Layers and an input whose names could be taken for those of each other's observers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.ModuleDict({"b": nn.Linear(8, 8)})
        self.a_b = nn.Linear(8, 8)

    def forward(self, a_b_input: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.a_b(self.a["b"](a_b_input) * 100)
        return result


def test_every_observer_has_a_name_of_its_own() -> None:
    net = Names()
    graph = converted(net, X)
    assert signal_to_noise(net(X), run(graph, ExampleInputs.of(X))) > 30


def test_means_are_those_of_what_the_layers_are_given() -> None:
    mean = ChannelMean(4, axis=-3)
    assert mean.mean() is None
    assert mean(X) is X
    assert mean.mean() is None
    mean.recording = True
    mean(X[:1])
    mean(X[1:])
    found = mean.mean()
    assert found is not None
    assert torch.allclose(found, X.double().mean([0, 2, 3]))
    mean.reset()
    assert mean.mean() is None


def test_calibration_starts_anew_and_is_idempotent() -> None:
    graph = fxc.PassManager([P.InsertObservers()]).run(fused(lambda net, x: net.b(net.a(x))), X).graph_module
    context = PassContext(ExampleInputs.of(X))
    first = P.Calibrate([X, X * 2]).run(graph, context)
    assert first.modified
    assert first.metrics == {"batches": 2}
    assert not P.Calibrate([X * 2, X]).run(graph, context).modified  # the same numbers in another order
    assert P.Calibrate([X * 2, X], batches=1).run(graph, context).modified
    assert not fxc.PassManager([P.Calibrate(X * 2)]).run(graph, X).rows[-1].modified


def test_running_the_graph_outside_of_calibration_records_nothing() -> None:
    graph = fxc.PassManager([P.InsertObservers(), P.Calibrate(X)]).run(fused(lambda net, x: net.a(x)), X).graph_module
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    graph(X * 100)
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.state_dict().items())


def test_conversion_without_data_is_refused() -> None:
    with pytest.raises(InputError, match=r"observer 'observers.*recorded nothing.*run Calibrate with data"):
        fxc.PassManager([P.InsertObservers(), P.ConvertObserved()]).run(fused(lambda net, x: net.a(x)), X)


def test_graphs_without_layers_pass_through_untouched() -> None:
    graph = fused(lambda net, x: torch.softmax(x, 1))
    text = print_graph(graph).partition("\n")[2]
    result = fxc.PassManager([P.Quantize()]).run(graph, X)  # no data needed either
    assert not any(row.modified for row in result.rows)
    assert print_graph(result.graph_module).partition("\n")[2] == text
    assert_equivalent(graph, result.graph_module, X)


def test_wrong_options_are_refused() -> None:
    for options, message in [
        ({"activation": "histogramm"}, "did you mean 'histogram'"),
        ({"activation": "per-channel"}, "one scale each"),
        ({"weight": "maximum"}, "no observer 'maximum'"),
    ]:
        for kind in (P.Quantize, P.InsertObservers):
            with pytest.raises(OptionError, match=message):
                kind(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="target must be one of"):
        P.Lower("tpu")
    assert str(P.Quantize(X, ignore=("a",), batches=3)) == "quantize{ignore=[a], batches=3}"


def joined(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A small value, and one whose range is a hundred times as wide."""
    return F.relu(model.a(x)), model.b(x)


OUTPUTS_BESIDE_CAT: dict[str, Forward] = {
    "as it is": lambda m, x: [small := joined(m, x)[0], m.wide(torch.cat([small, joined(m, x)[1]], 1))],
    "nested": lambda m, x: {
        "features": [small := joined(m, x)[0]],
        "y": m.wide(torch.cat([small, joined(m, x)[1]], 1)),
    },
    "flattened": lambda m, x: [(small := joined(m, x)[0]).flatten(1), m.wide(torch.cat([small, joined(m, x)[1]], 1))],
    "pooled": lambda m, x: [F.max_pool2d(small := joined(m, x)[0], 2), m.wide(torch.cat([small, m.b(x)], 1))],
    "joined in the output": lambda m, x: [m.c(small := joined(m, x)[0]), torch.cat([small, joined(m, x)[1]], 1)],
}


@pytest.mark.parametrize("case", OUTPUTS_BESIDE_CAT)
@pytest.mark.parametrize("qat", [False, True])
def test_outputs_keep_their_precision_beside_a_wider_concatenation(case: str, qat: bool) -> None:
    model = Net(OUTPUTS_BESIDE_CAT[case]).eval()
    with torch.no_grad():
        model.b.weight.mul_(100)
    passes = [P.Fuse(), P.InsertObservers(qat=qat), P.Calibrate(X), P.ConvertObserved(), P.Lower()]
    compact = fxc.compile(model, passes, X)
    found, expected = (ExampleInputs.of(X).call(one) for one in (compact, model))
    for ours, exact in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert signal_to_noise(exact, ours) > 30


def test_a_cat_that_no_kernel_reads_ties_nothing() -> None:
    plan = plan_quantization(fused(lambda m, x: [m.c(y := m.a(x)), torch.cat([y, m.b(x)], 1).softmax(1)]), accepts=free)
    assert [group.values for group in plan.groups] == [("x",), ("a",)]
    plan = plan_quantization(fused(lambda m, x: [m.c(y := m.a(x)), m.wide(torch.cat([y, m.b(x)], 1))]), accepts=free)
    assert [group.values for group in plan.groups] == [("x",), ("a", "b")]


def free(path: str, module: nn.Module) -> None:
    """Accept every layer."""
