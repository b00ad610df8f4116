"""Lowering for GPUs: the lowered graph computes what the graph before it does, and the ledger says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.cli import app
from fxcompress.emit.cuda import comparison, device
from fxcompress.emit.cuda.layers import CudaConv, CudaLayer, CudaLinear
from fxcompress.emit.cuda.pointwise import CudaEnter, CudaLayerNorm
from fxcompress.errors import OptionError, UnsupportedError
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import Stage, graph_info
from fxcompress.pipeline.base import PassContext
from fxcompress.quant.arithmetic import signal_to_noise

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("gpu_kernels"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),  # infinity is meant
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
]

HOME = "cuda" if torch.cuda.is_available() else "cpu"


class Images(nn.Module):
    """What residual networks have: a first layer with three channels, pooling, adds, depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.deep, self.narrow = nn.Conv2d(16, 16, 3, padding="same", groups=16), nn.Conv2d(16, 8, 2, padding="same")
        self.last = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 3, 2, 1)
        x = F.relu(self.left(x) + x)
        y = F.relu6(self.deep(F.relu6(self.right(x))))
        x = self.narrow(y) + x
        logits: torch.Tensor = self.last(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


class Gated(nn.Module):
    """Squeeze and excitation, with functions in between that have no kernel of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.back = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.last = nn.Conv2d(16, 6, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x = F.silu(self.first(x))
        gate = torch.sigmoid(self.back(F.silu(self.gate(x.mean((2, 3), keepdim=True)))))
        x = F.interpolate(x * gate, scale_factor=2.0)
        return torch.softmax(self.last(x), 1), {"gate": gate.squeeze(), "count": x.shape[0] + torch.arange(3)}


class Tokens(nn.Module):
    """A transformer's block, with a position table and numbers made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 5, 16) / 4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([torch.zeros(x.shape[0], 1, 16), x], 1) + self.positions
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x[:, 0].float()


class Projections(nn.Module):
    """Attention of one head, with a layer for each of query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 16)
        self.last = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), -1)
        logits: torch.Tensor = self.last(weights @ self.value(x))
        return logits


class Listed(nn.Module):
    """Takes tensors in a list, and numbers of other kinds."""

    def forward(self, pair: list[torch.Tensor], index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = pair
        parts = torch.chunk(left + right, 2, 1)
        return parts[0] * parts[1], right[index]


def randomized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features) / 4
            module.running_var = torch.rand(module.num_features) + 0.5
    return model.eval()


def example(model: nn.Module) -> torch.Tensor:
    shapes = {Images: (2, 3, 16, 16), Gated: (2, 4, 6, 6), Tokens: (2, 4, 16)}
    return torch.randn(shapes[type(model)], generator=torch.Generator().manual_seed(1))


def quantised(model: nn.Module, x: torch.Tensor) -> Any:
    """The quantise-dequantise graph that the lowering starts from, in plain float32."""
    context = PassContext(ExampleInputs.of(x), {"calibration": [x]}, "cuda")
    steps = "fuse, insert-observers{correct_bias=true}, calibrate, convert-observed"
    return fxc.PassManager(steps).run(fxc.trace(model, x), x, context).graph_module


def test_integers_are_those_of_the_graph_before_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "measures", lambda: False)  # a GPU could find fp16 to be faster
    torch.manual_seed(0)
    model = randomized(Images())
    x = example(model)
    compact = fxc.compile(model, "fuse, quantize", x, target="cuda", calibration=[x])
    expected = quantised(model, x)(x)
    for batch in (x, x[:1], torch.cat([x, x + 0.25])):
        found, expected = compact(batch.to(HOME)), quantised(model, x)(batch)
        assert found.dtype == torch.float32
        assert torch.equal(found.cpu(), expected.half().float()), "only the result is rounded, to fp16"
    numbers = [module.numbers for module in compact.modules() if isinstance(module, CudaLayer)]
    assert set(numbers) == {"int8"}
    assert not any("dequantize" in name or "enter" in name for name, _ in compact.named_modules())


@pytest.mark.parametrize("model_class", [Images, Gated, Tokens])
@pytest.mark.parametrize(("dtype", "decibels"), [("fp16", 55), ("bf16", 36), ("int8", 25), ("fp8", 22)])
def test_outputs_keep_shape_dtype_and_nearly_the_numbers(
    model_class: type[nn.Module], dtype: str, decibels: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == "bf16" and HOME == "cpu":
        monkeypatch.setenv(device.VARIABLE, "off")  # the interpreter takes the bits of bf16 for integers
        monkeypatch.setattr(device, "unavailable", lambda: None)
        monkeypatch.setattr(device, "home", lambda: torch.device("cpu"))
    torch.manual_seed(0)
    model = randomized(model_class())
    x = example(model)
    compact = fxc.compile(model, None, x, target="cuda", dtype=dtype, calibration=[x])
    assert graph_info(compact).stage is Stage.LOWERED
    with torch.no_grad():
        expected, found = model(x), compact(x.to(HOME))
    leaves = torch.utils._pytree.tree_leaves
    for one, other in zip(leaves(expected), leaves(found), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if one.is_floating_point():
            assert signal_to_noise(one, other.cpu()) > decibels
        else:
            assert torch.equal(one, other.cpu())


def test_pieces_of_values_are_not_converted_again_and_those_of_inputs_are() -> None:
    model = Tokens().eval()
    compact = fxc.compile(model, None, example(model), target="cuda")
    paths = {name for name, module in compact.named_modules() if isinstance(module, CudaEnter)}
    assert paths == {"x_enter", "zeros_enter"}
    pair, index = [torch.randn(3, 4), torch.randn(3, 4)], torch.tensor([2, 0])
    compact = fxc.compile(Listed(), "fuse", (pair, index), target="cuda")
    found = compact([one.to(HOME) for one in pair], index.to(HOME))
    for one, other in zip(Listed()(pair, index), found, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert signal_to_noise(one, other.cpu()) > 50


def test_norms_round_for_their_readers() -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    x = example(model)
    compact = fxc.compile(model, "fuse, quantize", x, target="cuda", calibration=[x])
    norms = [module for module in compact.modules() if isinstance(module, CudaLayerNorm)]
    assert [norm.output is not None for norm in norms] == [True, True]


def test_linear_layers_that_read_the_same_are_joined() -> None:
    torch.manual_seed(0)
    model, x = Projections().eval(), torch.randn(2, 5, 16)
    for dtype in ("fp16", "int8"):
        compact = fxc.compile(model, None, x, target="cuda", dtype=dtype, calibration=[x])
        sizes = sorted(module.out_features for module in compact.modules() if isinstance(module, CudaLinear))
        assert sizes == [8, 32]
        assert signal_to_noise(model(x), compact(x.to(HOME)).cpu()) > (50 if dtype == "fp16" else 30)
        assert compact.report is not None
        assert sum("which reads the same" in " ".join(line.notes) for line in compact.report.layers) == 2


def test_a_first_layer_gets_a_fourth_channel() -> None:
    model = randomized(Images())
    x = example(model)
    for dtype in ("fp16", "int8"):
        compact = fxc.compile(model, None, x, target="cuda", dtype=dtype, calibration=[x])
        first = compact.get_submodule("first")
        assert isinstance(first, CudaConv)
        assert (first.in_channels, first.weight.shape[1]) == (4, 4)
        enters = [module for module in compact.modules() if isinstance(module, CudaEnter)]
        assert [enter.channels for enter in enters] == [4]


def test_the_ledger_says_how_each_layer_is_computed() -> None:
    model = randomized(Images())
    x = example(model)
    for dtype in ("fp16", "int8"):
        report = fxc.compile(model, None, x, target="cuda", dtype=dtype, calibration=[x]).report
        assert report is not None
        said = {line.layer: " ".join(line.notes) for line in report.layers}
        for layer in ("first", "left", "right", "deep", "narrow", "last"):
            assert ("int8" if dtype == "int8" and HOME == "cpu" else "16" if dtype == "fp16" else "") in said[layer]


def test_the_fastest_numbers_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are made up: fp16 is faster for convolutions, int8 for the linear layer."""
    torch.manual_seed(0)
    model = randomized(Images())
    x = example(model)
    graph = quantised(model, x)

    def times(layer: CudaLayer, shape: Any, addend: Any = None) -> tuple[float, str]:
        integers = layer.numbers == "int8"
        return (10.0 if integers == isinstance(layer, CudaLinear) else 100.0), "made up"

    monkeypatch.setattr(comparison, "layer_microseconds", times)
    monkeypatch.setattr(comparison, "measures", lambda: True)
    lowered = P.Lower("cuda").run(graph, PassContext(ExampleInputs.of(x), target="cuda"))
    kinds = {
        name: module.numbers for name, module in lowered.graph_module.named_modules() if isinstance(module, CudaLayer)
    }
    assert kinds.pop("last") == "int8"
    assert set(kinds.values()) == {"fp16"}
    enters = [module for module in lowered.graph_module.modules() if isinstance(module, CudaEnter)]
    assert enters[0].grid is None, "the input comes as it is, not rounded to 8 bits and back"
    notes = {note.layer: note.text for note in lowered.notes}
    assert notes["first"] == "fp16: fp16 10.0 us (made up); int8 100.0 us (made up)"
    assert notes["left"] == "fp16: fp16 12.0 us (made up); int8 100.0 us (made up)"  # with a conversion
    assert "int8: int8 10.0 us" in notes["last"]


def test_precision_goes_only_for_a_gain() -> None:
    layers: list[CudaLayer] = [
        CudaLinear(4, 4, False, "int8", input=[1.0, 0, 0, 255]), CudaLinear(4, 4, False, "fp16"),
    ]  # fmt: skip
    if HOME == "cpu":
        assert [one.numbers for one in comparison.verdicts(layers, (1, 4), None, "int8")] == ["int8", "fp16"]


@pytest.mark.parametrize("dtype", ["fp16", "int8", "fp8"])
def test_a_file_loads_and_runs_anywhere(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for model in (randomized(Images()), Tokens().eval()):
        x = example(model)
        compact = fxc.compile(model, None, x, target="cuda", dtype=dtype, calibration=[x])
        compact.save(tmp_path / "gpu.fxc")
        loaded = fxc.load(tmp_path / "gpu.fxc")
        assert torch.equal(loaded.to(HOME)(x.to(HOME)), compact(x.to(HOME)))
        with monkeypatch.context() as patch:
            patch.setenv(device.VARIABLE, "off")  # a machine without a GPU: PyTorch's operators, on the CPU
            plain = fxc.load(tmp_path / "gpu.fxc")(x)
        assert plain.device.type == "cpu"
        assert signal_to_noise(plain, compact(x.to(HOME)).cpu()) > (22 if dtype == "fp8" else 50)


class Words(nn.Module):
    """An embedding, and its weight as an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.back = nn.Embedding(12, 16), nn.Linear(16, 8), nn.Linear(8, 16)
        self.out = nn.Linear(16, 12, bias=False)
        self.out.weight = self.table.weight

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.back(F.relu(self.up(self.table(index)))))
        return logits


@pytest.mark.parametrize("mode", ["dynamic", "weight-only"])
def test_layers_without_fixed_grids_stay_in_16_bits_with_their_rounded_weights(mode: str) -> None:
    torch.manual_seed(0)
    model, index = Words().eval(), torch.randint(12, (2, 5))
    compact = fxc.compile(model, f"fuse, quantize{{mode={mode}}}", index, target="cuda")
    layers = {module.numbers for module in compact.modules() if isinstance(module, CudaLinear)}
    assert layers == {"fp16"}
    assert signal_to_noise(model(index), compact(index.to(HOME)).cpu()) > 25


def test_passes_are_completed_for_the_dtype() -> None:
    from fxcompress.pipeline.presets import passes_for

    def names(passes: Any, dtype: str | None) -> list[str]:
        return [item.name for item in passes_for(passes, "cuda", dtype)]

    assert names(None, None) == names(None, "fp16") == names("fuse", "fp8") == ["fuse", "lower-float"]
    assert names(None, "int8") == names("int8", None) == ["fuse", "quantize"]
    assert names("prune-channels{ratio=0.5}", "bf16") == ["prune-channels", "fuse", "lower-float"]
    assert names("half-channels", "int8") == ["prune-channels", "fuse", "quantize"]
    assert names("fuse, insert-observers, calibrate, convert-observed", None)[-1] == "lower"
    assert names("fuse, lower-float{dtype=bf16}", "bf16") == ["fuse", "lower-float"]
    with pytest.raises(OptionError, match="these passes quantise to int8, but dtype='fp16' was asked for"):
        names("int8", "fp16")


def test_wrong_wishes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    with pytest.raises(OptionError, match="dtype must be one of 'fp16', 'bf16', 'int8', 'fp8', not 'fp32'"):
        fxc.compile(model, None, x, target="cuda", dtype="fp32")
    with pytest.raises(OptionError, match="dtype='fp16' is for target='cuda'"):
        fxc.compile(model, "fuse", x, dtype="fp16")
    with pytest.raises(OptionError, match="LowerFloat: dtype must be one of"):
        P.LowerFloat("int8")
    monkeypatch.delenv(device.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for passes in (None, "int8", "fuse", "lower-float", "fuse, lower{target=cuda}"):
        with pytest.raises(UnsupportedError, match=r"target 'cuda' cannot be compiled for here: .*Compile on the mac"):
            fxc.compile(model, passes, x, target="cuda", calibration=[x])
    with pytest.raises(UnsupportedError, match="cannot be compiled for here"):
        fxc.compile(model, "fuse, lower-float", x)


def test_the_callers_model_stays_where_and_what_it_is() -> None:
    model = randomized(Images())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = example(model)
    fxc.compile(model, None, x, target="cuda", dtype="fp16")
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, before[name])


def test_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)\n"
    )
    out, report = tmp_path / "gpu.fxc", tmp_path / "report.json"
    model = f"{tmp_path / 'net.py'}:make"
    command = ["compress", model, "--target", "cuda", "--out", str(out), "--report", str(report)]
    result = CliRunner().invoke(app, [*command, "--dtype", "fp16"])
    assert result.exit_code == 0, result.output
    assert [line["name"] for line in json.loads(report.read_text())["passes"]][-1] == "lower-float"
    result = CliRunner().invoke(app, [*command, "--dtype", "int8", "--calibration", "random"])
    assert result.exit_code == 0, result.output
    layers = [module for module in fxc.load(out).modules() if isinstance(module, CudaLinear)]
    assert len(layers) == 2
