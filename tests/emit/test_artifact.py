"""Saving and loading: nothing is lost, nothing from a file is executed, and a bad file gets one kind of error."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
import pickle
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxcompress as fxc
from fxcompress.emit import artifact
from fxcompress.emit.encoding import decode, encode
from fxcompress.emit.vocabulary import Vocabulary
from fxcompress.errors import ArtifactError, UnsupportedError
from fxcompress.graph import ops
from fxcompress.graph.metadata import Stage, graph_info, info
from fxcompress.report import Report, Totals

CANARY = "FXCOMPRESS_TEST_CANARY"  # whatever a hostile file manages to run leaves a mark in the environment
HARM = f"__import__('os').environ.__setitem__('{CANARY}', 'ran')"


class Mixed(nn.Module):
    """A little of everything that a file has to carry."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Conv2d(8, 8, (3, 1), groups=8, padding=(1, 0), bias=False, padding_mode="reflect")
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64), requires_grad=False)
        self.register_buffer("offset", torch.arange(8, dtype=torch.int64).reshape(1, 8, 1, 1))
        self.register_buffer("secret", torch.ones(1, 8, 1, 1, dtype=torch.bfloat16), persistent=False)
        self.head = nn.Linear(8, 5)
        self.tied = nn.Linear(8, 5)
        self.tied.weight = self.head.weight

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor | None = None) -> dict[str, Any]:
        x = self.stem(x)
        y = self.drop(self.depthwise(x)) * self.scale.float() + cast(torch.Tensor, self.offset)
        x = torch.cat([x, y], dim=1)[:, ::2, ..., :-1]
        x = F.interpolate(x, scale_factor=2.0, mode="nearest").clamp(max=float("inf"))
        x = x * cast(torch.Tensor, self.secret)
        pooled = x.mean((2, 3)).view(x.size(0), -1)
        return {"logits": self.head(pooled), "others": (self.tied(pooled), [x.amax()])}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 2, 3), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(x))
        return cast(torch.Tensor, self.linear(x.reshape(x.size(0), -1)))


def _compact(model: nn.Module, *inputs: torch.Tensor) -> fxc.CompactModule:
    return fxc.CompactModule.of(fxc.trace(model, inputs))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.fxc"
    _compact(Small(), torch.randn(2, 1, 6, 6)).save(path)
    return path


def test_the_canary_would_sing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CANARY, "")
    eval(HARM)
    assert os.environ[CANARY] == "ran"


def _leaves(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


# What survives


def test_outputs_are_identical_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compact = _compact(Mixed(), torch.randn(2, 3, 9, 9))
    graph_info(compact).masks["head.weight"] = torch.rand(5, 8) > 0.3
    graph_info(compact).notes.append("a note")
    compact.save(tmp_path / "m.fxc")
    loaded = fxc.load(tmp_path / "m.fxc")
    for batch in (1, 3):
        x = torch.randn(batch, 3, 9, 9)
        for module in (compact, loaded):
            module.eval()
        assert all(torch.equal(a, b) for a, b in zip(_leaves(compact(x)), _leaves(loaded(x)), strict=True))
        for module in (compact, loaded):
            module.train()
        outputs = []
        for module in (compact, loaded):
            torch.manual_seed(7)
            outputs.append(_leaves(module(x)))
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)), "dropout and statistics follow train()"
    assert type(loaded(x)) is dict
    assert list(loaded(x)) == ["logits", "others"]
    assert torch.equal(graph_info(loaded).masks["head.weight"], graph_info(compact).masks["head.weight"])
    assert graph_info(loaded).notes == graph_info(compact).notes


def test_every_tensor_keeps_its_kind(tmp_path: Path) -> None:
    compact = _compact(Mixed().eval(), torch.randn(2, 3, 9, 9))
    compact.stem.get_submodule("1").train()  # type: ignore[union-attr]
    compact.save(tmp_path / "m.fxc")
    loaded = fxc.load(tmp_path / "m.fxc")
    before, after = compact.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert "secret" not in after
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    assert loaded.get_parameter("scale").requires_grad is False
    assert loaded.get_parameter("head.weight").requires_grad is True
    assert loaded.get_parameter("tied.weight") is loaded.get_parameter("head.weight")
    assert loaded.get_buffer("secret").dtype == torch.bfloat16
    modes = {path: module.training for path, module in compact.named_modules()}
    assert {path: module.training for path, module in loaded.named_modules()} == modes
    assert modes["stem.1"] is True
    assert modes["stem.0"] is False
    assert type(loaded).__name__ == "CompactMixed"


def test_the_graph_and_its_metadata_survive(tmp_path: Path) -> None:
    compact = _compact(Mixed(), torch.randn(2, 3, 9, 9))
    graph_info(compact).stage, graph_info(compact).canonical = Stage.QDQ, True
    compact.save(tmp_path / "m.fxc")
    loaded = fxc.load(tmp_path / "m.fxc")
    assert graph_info(loaded).stage is Stage.QDQ
    assert graph_info(loaded).canonical is True
    for before, after in zip(compact.graph.nodes, loaded.graph.nodes, strict=True):
        assert (before.op, before.name, before.target) == (after.op, after.name, after.target)
        assert str((before.args, before.kwargs)) == str((after.args, after.kwargs))
        assert info(before) == info(after)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_dtypes_and_memory_formats_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Conv2d(4, 6, 3, dtype=dtype).to(memory_format=torch.channels_last)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("conv", (x,)))
    root = nn.Module()
    root.conv = model
    fxc.CompactModule(root, graph).save(tmp_path / "m.fxc")
    loaded = fxc.load(tmp_path / "m.fxc").get_parameter("conv.weight")
    assert loaded.dtype == dtype
    assert loaded.stride() == model.weight.stride() != torch.empty(loaded.shape).stride()
    assert torch.equal(loaded, model.weight)


def test_a_layer_used_under_two_names_stays_one(tmp_path: Path) -> None:
    root, graph = nn.Module(), fx.Graph()
    root.a = root.b = nn.Linear(3, 3).eval()
    x = graph.placeholder("x")
    graph.output(graph.call_module("b", (graph.call_module("a", (x,)),)))
    fxc.CompactModule(root, graph).save(tmp_path / "m.fxc")
    loaded = fxc.load(tmp_path / "m.fxc")
    assert loaded.get_submodule("a") is loaded.get_submodule("b")


def test_recurrent_and_attention_layers_survive(tmp_path: Path) -> None:
    root, graph = nn.Module(), fx.Graph()
    root.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)
    root.attention = nn.MultiheadAttention(12, 2, batch_first=True, kdim=12, vdim=3)
    x = graph.placeholder("x")
    y = graph.call_module("lstm", (x,))
    first = graph.call_function(ops.known_functions()["operator.getitem"], (y, 0))
    index: Any = (..., slice(None, 3, None))
    value = graph.call_function(ops.known_functions()["operator.getitem"], (first, index))
    graph.output(graph.call_module("attention", (first, first, value), {"need_weights": False}))
    compact = fxc.CompactModule(root, graph).eval()
    compact.save(tmp_path / "m.fxc")
    loaded = fxc.load(tmp_path / "m.fxc")
    x_ = torch.randn(2, 5, 4)
    assert torch.equal(compact(x_)[0], loaded(x_)[0])
    loaded(x_)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.get_submodule("lstm").parameters())


def test_a_loaded_float_model_trains_like_the_original(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compact = _compact(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)),
                       torch.randn(2, 1, 6, 6))  # fmt: skip
    compact.save(tmp_path / "m.fxc")
    data, target = torch.randn(16, 1, 6, 6), torch.randint(3, (16,))

    def losses(model: nn.Module) -> list[float]:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1, momentum=0.9)
        found = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data), target)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    loaded = fxc.load(tmp_path / "m.fxc")
    before = losses(compact)
    assert losses(loaded) == before
    assert before[-1] < before[0]


def test_a_loaded_float_model_is_compiled_further(tmp_path: Path) -> None:
    """Prune here, save, load there, fine-tune, quantise: masks and names go with the file."""
    torch.manual_seed(0)
    x = torch.randn(4, 1, 6, 6)
    batches = [(torch.randn(8, 1, 6, 6), torch.randint(3, (8,))) for _ in range(2)]
    pruned = fxc.compile(Small(), "mask-weights{amount=0.5}", x)
    pruned.save(tmp_path / "pruned.fxc")
    loaded = fxc.load(tmp_path / "pruned.fxc")
    zeros = loaded.get_parameter("linear.weight") == 0
    assert zeros.sum() > 20
    trained = fxc.compile(loaded, "train{epochs=2}", x, train_data=batches)
    weight = trained.get_parameter("linear.weight")
    assert torch.equal(weight == 0, zeros), "masks hold"
    assert not torch.equal(weight, loaded.get_parameter("linear.weight"))
    small = fxc.compile(trained, "fuse, quantize", x, calibration=[x])
    small.save(tmp_path / "int8.fxc")
    assert torch.equal(fxc.load(tmp_path / "int8.fxc")(x), small(x))


def test_a_graph_too_large_for_the_format_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "_LONGEST", 100)
    compact = fxc.compile(Small(), [], torch.randn(4, 1, 6, 6))
    with pytest.raises(ArtifactError, match="too large to be saved"):
        compact.save(tmp_path / "model.fxc")
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_named(saved: Path) -> None:
    assert fxc.load(saved, device="meta").get_parameter("conv.weight").is_meta
    with pytest.raises(UnsupportedError, match="cannot load to device 'nowhere'"):
        fxc.load(saved, device="nowhere")


def test_loading_needs_no_class_and_leaves_random_numbers_alone(saved: Path) -> None:
    state = torch.get_rng_state()
    expected = fxc.load(saved)(torch.ones(1, 1, 6, 6))
    assert torch.equal(state, torch.get_rng_state())
    script = (
        f"import torch, fxcompress; y = fxcompress.load({str(saved)!r})(torch.ones(1, 1, 6, 6)); "
        "print(*y.flatten().tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(fxc.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=saved.parent, env=environment
    )
    assert done.stdout.split() == [str(number) for number in expected.flatten().tolist()]


def test_a_loaded_module_does_not_follow_its_file(saved: Path) -> None:
    loaded = fxc.load(saved)
    before = copy.deepcopy(loaded.state_dict())
    saved.write_bytes(b"\xff" * saved.stat().st_size)  # in place, as an editor or a broken copy would
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())


def test_the_same_module_gives_the_same_bytes(tmp_path: Path) -> None:
    compact = _compact(Mixed(), torch.randn(2, 3, 9, 9))
    for name in ("a", "b"):
        compact.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_other_tools_can_read_the_state_dict(saved: Path) -> None:
    expected = fxc.load(saved).state_dict()
    found = safetensors.torch.load_file(saved)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_failed_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    module = fxc.load(saved)

    def fail(path: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(artifact, "_stamp", fail)
    with pytest.raises(ArtifactError, match="disk full"):
        module.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    with pytest.raises(ArtifactError, match="cannot write"):
        module.save(saved.parent / "no" / "such" / "folder.fxc")


# The tables


@pytest.mark.parametrize("known", [*ops.MODULE_KINDS, *ops.STATELESS_MODULES, *ops.PADDING_MODULES])
def test_every_layer_of_the_operator_table_can_be_described(known: type[nn.Module]) -> None:
    vocabulary = Vocabulary.of(None, None)
    module = _make(known)
    record = json.loads(json.dumps(encode(vocabulary.describe_module(module, "layer")["config"])))
    name = vocabulary.describe_module(module, "layer")["type"]
    rebuilt = vocabulary.build_module(name, decode(record), "layer")
    assert type(rebuilt) is known
    assert rebuilt.extra_repr() == module.extra_repr()
    assert {n: t.shape for n, t in rebuilt.state_dict().items()} == {n: t.shape for n, t in module.state_dict().items()}


def _make(known: type[nn.Module]) -> nn.Module:
    """Make a layer with arguments unlike the defaults where one letter of its signature allows it."""
    candidates: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((4, 6, 3), {"stride": 2, "padding": 1, "dilation": 2, "groups": 2, "bias": False}),
        ((4,), {"eps": 1e-3, "affine": True, "momentum": None, "track_running_stats": True}),
        ((2, 4), {"eps": 1e-3, "affine": False}),
        ((4,), {"eps": 1e-3, "bias": False}),
        ((4, 6), {"num_layers": 2, "bias": False, "bidirectional": True}),
        ((4, 2), {"bias": False, "batch_first": True, "add_bias_kv": True}),
        ((4, 6), {"bias": False}),
        ((4, 6), {"padding_idx": 1}),
        ((4, 6), {"eps": 1e-3}),
        ((), {"size": 5, "mode": "bilinear", "align_corners": True}),
        ((0.25,), {"mode": "batch"}),
        ((0.25, 0.5), {"inplace": True}),
        ((1,), {"value": 2.5}),
        ((3,), {"stride": 2, "padding": 1, "ceil_mode": True}),
        ((2,), {}),
        ((4, 2), {}),
        ((), {}),
    ]
    for args, kwargs in candidates:
        try:
            return known(*args, **kwargs)
        except (TypeError, ValueError, AssertionError):
            continue
    raise AssertionError(f"no arguments fit {known}")


def test_no_two_functions_share_a_name() -> None:
    names = Vocabulary.of(None, None).functions
    assert set(ops.BY_FUNCTION) <= set(names.values())
    assert len({id(function) for function in names.values()}) == len(names)


LITERALS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.complex_numbers()
    | st.sampled_from([torch.float16, torch.int8, torch.device("cpu"), torch.channels_last, torch.strided, ...]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
        | st.builds(slice, inner, inner, inner)
    ),
    max_leaves=12,
)


@given(LITERALS)
def test_every_literal_survives(literal: Any) -> None:
    found = decode(json.loads(json.dumps(encode(literal), allow_nan=False)))
    assert repr(found) == repr(literal)
    assert type(found) is type(literal)


# What cannot be saved


class Opaque(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Gain(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain * self.weight

    def config(self) -> dict[str, Any]:
        return {"gain": self.gain}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Gain:
        return cls(config["gain"])


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def _calling(target: Any) -> fxc.CompactModule:
    graph, root = fx.Graph(), nn.Module()
    x = graph.placeholder("x")
    if isinstance(target, nn.Module):
        root.layer = target
        graph.output(graph.call_module("layer", (x,)))
    else:
        graph.output(graph.call_function(target, (x,)))
    return fxc.CompactModule(root, graph)


def test_what_needs_code_of_the_user_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"layer 'layer' is a .*Opaque.*config\(\) and from_config"):
        _calling(Opaque()).save(tmp_path / "m.fxc")
    with pytest.raises(ArtifactError, match=r"node 'double' calls .*double.*functions="):
        _calling(double).save(tmp_path / "m.fxc")
    graph = fx.Graph()
    graph.output(graph.call_method("backward", (graph.placeholder("x"),)))
    with pytest.raises(ArtifactError, match=r"calls the method 'backward'"):
        fxc.CompactModule(nn.Module(), graph).save(tmp_path / "m.fxc")
    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ArtifactError, match="layer 'layer' has hooks"):
        _calling(hooked).save(tmp_path / "m.fxc")
    graph = fx.Graph()
    graph.output(graph.call_function(F.relu, (torch.ones(1),)))
    with pytest.raises(ArtifactError, match=r"node 'relu': a Tensor cannot stand in a file"):
        fxc.CompactModule(nn.Module(), graph).save(tmp_path / "m.fxc")
    assert list(tmp_path.iterdir()) == []


def test_the_caller_may_add_functions_and_layers(tmp_path: Path) -> None:
    x = torch.randn(2, 3)
    _calling(double).save(tmp_path / "f.fxc", functions={"double": double})
    assert torch.equal(fxc.load(tmp_path / "f.fxc", functions={"double": double})(x), x * 2)
    with pytest.raises(ArtifactError, match=r"calls 'double'.*functions="):
        fxc.load(tmp_path / "f.fxc")
    _calling(Gain(2.5)).save(tmp_path / "g.fxc", modules={"Gain": Gain})
    assert torch.equal(fxc.load(tmp_path / "g.fxc", modules={"Gain": Gain})(x), x * 2.5)
    with pytest.raises(ArtifactError, match=r"of type 'Gain'.*modules="):
        fxc.load(tmp_path / "g.fxc")
    with pytest.raises(ArtifactError, match="config"):
        fxc.load(tmp_path / "g.fxc", modules={"Opaque": Opaque})
    with pytest.raises(ArtifactError, match=r"torch\.relu"):
        fxc.load(tmp_path / "g.fxc", functions={"torch.relu": double})


# Bad files


def _split(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fxcompress"]), safetensors.torch.load_file(path)


def _join(path: Path, document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a file as its format says, with a checksum that fits: what somebody with bad intentions would do."""
    document["sha256"] = "0" * 64
    safetensors.torch.save_file(tensors, path, metadata={"fxcompress": json.dumps(document)})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1))


def _node(document: dict[str, Any], op: str) -> dict[str, Any]:
    found: dict[str, Any] = next(node for node in document["nodes"] if node["op"] == op)
    return found


def test_the_format_is_what_its_description_says(saved: Path) -> None:
    document, tensors = _split(saved)
    _join(saved, document, tensors)
    assert fxc.load(saved)(torch.ones(1, 1, 6, 6)).shape == (1, 3)


@settings(max_examples=300)
@given(st.data())
def test_every_flipped_byte_is_noticed(data: st.DataObject) -> None:
    content, path = _content(), _path()
    position = data.draw(st.integers(0, len(content) - 1))
    flipped = data.draw(st.integers(1, 255))
    path.write_bytes(content[:position] + bytes([content[position] ^ flipped]) + content[position + 1 :])
    with pytest.raises(ArtifactError):
        fxc.load(path)


@settings(max_examples=60)
@given(st.data())
def test_every_truncated_or_longer_file_is_noticed(data: st.DataObject) -> None:
    content, path = _content(), _path()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ArtifactError):
        fxc.load(path)
    path.write_bytes(content + data.draw(st.binary(min_size=1, max_size=20)))
    with pytest.raises(ArtifactError):
        fxc.load(path)


@functools.cache
def _path() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp()) / "model.fxc"


@functools.cache
def _content() -> bytes:
    _compact(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.randn(2, 3)).save(_path())
    return _path().read_bytes()


def test_files_that_are_no_artefacts(tmp_path: Path, saved: Path) -> None:
    others: dict[str, Callable[[Path], object]] = {
        "missing": lambda path: None,
        "empty": lambda path: path.write_bytes(b""),
        "folder": lambda path: path.mkdir(),
        "pickle": lambda path: torch.save({"a": torch.ones(2)}, path),
        "weights": lambda path: safetensors.torch.save_file({"a": torch.ones(2)}, path),
        "length": lambda path: path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
    }
    for name, write in others.items():
        write(tmp_path / name)
        with pytest.raises(ArtifactError, match=f"cannot load '.*{name}'"):
            fxc.load(tmp_path / name)


def test_a_file_of_a_newer_version_says_so(saved: Path) -> None:
    document, tensors = _split(saved)
    document["format_version"] = artifact.FORMAT_VERSION + 1
    document["nodes"] = "in a form that nobody knows yet"
    _join(saved, document, tensors)
    with pytest.raises(ArtifactError, match="install a newer fxcompress"):
        fxc.load(saved)


HOSTILE_NAMES = [
    HARM, f"x); {HARM}; (x", f"x\n    {HARM}", f'a"); {HARM}; ("', f"x={HARM}", "lambda", "self", "torch", "getattr",
    "__class__", "", "a b", "a.b", "1a", "a\n", "é", "x:=1", "*a", "a=1", None, 3, ["a"], "slice",
]  # fmt: skip


PLACES: dict[str, Callable[[dict[str, Any], Any], Any]] = {
    "node": lambda document, name: document["nodes"][1].update(name=name),
    "input": lambda document, name: document["nodes"][0].update(target=name),
    "called layer": lambda document, name: _node(document, "call_module").update(target=name),
    "attribute": lambda document, name: _node(document, "call_module").update(op="get_attr", target=name, args=[]),
    "function": lambda document, name: _node(document, "call_function").update(target=name),
    "method": lambda document, name: _node(document, "call_function").update(op="call_method", target=name),
    "op": lambda document, name: _node(document, "call_function").update(op=name),
    "keyword": lambda document, name: _node(document, "call_function").update(kwargs={str(name): 1}),
    "reference": lambda document, name: _node(document, "call_function").update(args=[{"node": name}]),
    "class": lambda document, name: document.update(class_name=name),
    "layer": lambda document, name: document["modules"].update({str(name): {"type": "Module"}, "conv": {}}),
    "tensor": lambda document, name: document["tensors"].update(
        {str(name): {"tied_to": "conv.weight"}, "conv.bias": {}}
    ),
    "type": lambda document, name: document["modules"]["conv"].update(type=name),
    "all layers": lambda document, name: document.update(modules=name),
    "all tensors": lambda document, name: document.update(tensors=name),
    "all nodes": lambda document, name: document.update(nodes=name),
    "mask": lambda document, name: document.update(masks={str(name): [1]}),
    "stage": lambda document, name: document.update(stage=name),
}


@pytest.mark.parametrize(
    ("place", "name"),
    [(place, name) for place in PLACES for name in HOSTILE_NAMES if (place, name) != ("input", "*a")],  # is *args
    ids=repr,
)
def test_hostile_names_never_reach_the_source(saved: Path, place: str, name: Any) -> None:
    document, tensors = _split(saved)
    PLACES[place](document, name)
    _join(saved, document, tensors)
    with pytest.raises(ArtifactError, match="cannot load"):
        fxc.load(saved)
    assert CANARY not in os.environ


@pytest.mark.parametrize(
    ("name", "harmless"),
    [("new", True), ("7", True), ("layer-1 b", True), (HARM, False),
     ('a") or exec("raise SystemExit") or getattr(self, "a', False),
     ('x"', False), ("a\n", False), ("lambda", False), ("__class__", False), ("", False), ("{x}", False),
     ("forward", False)],
)  # fmt: skip
def test_hostile_paths_are_refused(saved: Path, name: str, harmless: bool) -> None:
    """A layer renamed everywhere in a file: nothing but the look of the name can be the reason to refuse it."""
    document, tensors = _split(saved)
    document["modules"][name] = document["modules"].pop("conv")
    for leaf in ("weight", "bias"):
        document["tensors"][f"{name}.{leaf}"] = document["tensors"].pop(f"conv.{leaf}")
        tensors[f"{name}.{leaf}"] = tensors.pop(f"conv.{leaf}")
    _node(document, "call_module")["target"] = name
    _join(saved, document, tensors)
    if harmless:
        assert fxc.load(saved)(torch.ones(1, 1, 6, 6)).shape == (1, 3)
    else:
        with pytest.raises(ArtifactError, match="cannot load"):
            fxc.load(saved)
    assert CANARY not in os.environ


def test_hostile_strings_stay_strings(saved: Path) -> None:
    """String arguments become source through repr; a default of an input as well."""
    document, tensors = _split(saved)
    document["nodes"][0]["args"] = [f"'); {HARM}; ('"]
    _join(saved, document, tensors)
    loaded = fxc.load(saved)
    assert loaded(torch.ones(1, 1, 6, 6)).shape == (1, 3)
    with pytest.raises(Exception, match=r"conv2d|Tensor|str"):
        loaded()
    assert CANARY not in os.environ


def _second(document: dict[str, Any], op: str, target: str, *args: Any) -> None:
    """Make the second node do something else, under its own name."""
    document["nodes"][1].update(op=op, target=target, args=list(args), kwargs={})


def _first(document: dict[str, Any]) -> dict[str, str]:
    return {"node": document["nodes"][0]["name"]}


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


HOSTILE_CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "reads attributes of the module": lambda d: _second(d, "get_attr", "forward.__globals__"),
    "reads attributes of a tensor": lambda d: _second(d, "call_function", "builtins.getattr", _first(d), "__class__"),
    "getattr with a default": lambda d: _second(d, "call_function", "builtins.getattr", _first(d), "shape", 1),
    "evaluates": lambda d: _second(d, "call_function", "builtins.eval", "1"),
    "loads a pickle": lambda d: _second(d, "call_function", "torch.load", "x"),
    "calls a callable": lambda d: _second(d, "call_method", "apply_", _first(d), 1),
    "method of a string": lambda d: _second(d, "call_method", "sum", "{0.x}"),
    "needs no list": lambda d: d.update(other_mode=3),
    "an operator with keywords": lambda d: d["nodes"][1].update(op="call_function", target="operator.add", args=[],
                                                               kwargs={"a": 1, "b": 2}),
    "output in the middle": lambda d: d["nodes"].insert(
        1, {"op": "output", "name": "o", "target": "output", "args": [1]}
    ),
    "two outputs": lambda d: d["nodes"].append(d["nodes"][-1]),
    "no output": lambda d: d["nodes"].pop(),
    "no nodes": lambda d: d.update(nodes=[]),
    "name twice": lambda d: d["nodes"][1].update(name=d["nodes"][0]["name"]),
    "input after the start": lambda d: d["nodes"].insert(2, {"op": "placeholder", "name": "late", "target": "late"}),
    "later node": lambda d: d["nodes"][1].update(args=[{"node": "output"}]),
    "unknown literal": lambda d: d["nodes"][1].update(args=[{"eval": "1"}]),
    "two tags": lambda d: d["nodes"][1].update(args=[{"tuple": [], "dict": []}]),
    "unknown dtype": lambda d: d["nodes"][1].update(args=[{"dtype": "load"}]),
    "dtype no string": lambda d: d["nodes"][1].update(args=[{"dtype": ["float32"]}]),
    "dict with list keys": lambda d: d["nodes"][1].update(args=[{"dict": [[[1], 2]]}]),
    "unknown field": lambda d: d["nodes"][1].update(code="1"),
    "shapes that are none": lambda d: d["nodes"][1].update(info={"value": {"tensor": [["a"], {"dtype": "int8"}, 1]}}),
    "layer that is no text": lambda d: d["nodes"][1].update(info={"layer": 3}),
    "layer of another size": lambda d: d["modules"]["conv"]["config"]["dict"][1].__setitem__(1, 3),
    "negative size": lambda d: d["modules"]["conv"]["config"]["dict"][0].__setitem__(1, -1),
    "stride of nothing": lambda d: d["modules"]["conv"]["config"]["dict"][3].__setitem__(1, {"tuple": [0, 0]}),
    "unknown argument": lambda d: d["modules"]["conv"]["config"]["dict"].append(["device", "cpu"]),
    "lacking argument": lambda d: d["modules"]["conv"]["config"]["dict"].pop(),
    "layer without parent": lambda d: d["modules"].update({"a.b": {"type": "Module"}}),
    "container as alias": lambda d: d["modules"].update({"a": {"type": "Module"}, "b": {"same_as": "a"}}),
    "root as alias": lambda d: d["modules"].update({"a": {"same_as": ""}}),
    "any torch class": lambda d: d["modules"]["conv"].update(type="Sequential", config={"dict": []}),
    "dunder class": lambda d: d["modules"]["conv"].update(type="__builtins__", config={"dict": []}),
    "endless layers": lambda d: d["modules"].update({"rnn": {"type": "GRU", "config": {"dict": [
        ["input_size", 1], ["hidden_size", 1], ["num_layers", 1 << 40], ["bias", True], ["batch_first", True],
        ["dropout", 0.0], ["bidirectional", False]]}}}),
    "shadowed method": lambda d: (d["modules"].update(forward={"type": "Module"})),
    "shadowed attribute": lambda d: d["tensors"].update(training=d["tensors"].pop("conv.weight")),
    "tied to nothing": lambda d: d["tensors"].update({"conv.weight": {"tied_to": "linear.weight"}}),
    "lacking tensor": lambda d: d["tensors"].pop("conv.weight"),
    "tensor not in the file": lambda d: d["tensors"].update(other={"parameter": True}),
    "tensor of a layer that has none": lambda d: d["tensors"].update({"conv.extra": {"tied_to": "conv.bias"}}),
    "strides beyond the memory": lambda d: d["tensors"]["conv.weight"].update(strides=[1 << 40, 1, 1, 1]),
    "strides that overlap": lambda d: d["tensors"]["conv.weight"].update(strides=[0, 0, 0, 0]),
    "strides that are none": lambda d: d["tensors"]["conv.weight"].update(strides=[9.0, 9, 3, 1]),
    "mask of nothing": lambda d: d.update(masks={"conv.other": [1]}),
    "mask without bits": lambda d: d.update(masks={"conv.weight": [2, 1, 3, 3]}),
    "report of another kind": lambda d: d.update(report={"dict": [["model", 1]]}),
    "report that is code": lambda d: d.update(report=HARM),
    "version as text": lambda d: d.update(format_version="1"),
    "no version": lambda d: d.pop("format_version"),
    "no nodes at all": lambda d: d.pop("nodes"),
    "deep nesting": lambda d: d["nodes"][1].update(args=[_nested(900)]),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_CHANGES)
def test_hostile_files_are_refused(saved: Path, name: str) -> None:
    document, tensors = _split(saved)
    HOSTILE_CHANGES[name](document)
    _join(saved, document, tensors)
    with pytest.raises(ArtifactError, match="cannot load"):
        fxc.load(saved)
    assert CANARY not in os.environ


def test_a_document_nested_beyond_the_stack_is_refused(saved: Path) -> None:
    _, tensors = _split(saved)
    depth = 200_000
    text = '{"format_version": 1, "sha256": "' + "0" * 64 + '", "nodes": ' + "[" * depth + "]" * depth + "}"
    safetensors.torch.save_file(tensors, saved, metadata={"fxcompress": text})
    with pytest.raises(ArtifactError):
        fxc.load(saved)


@settings(max_examples=150)
@given(st.randoms(use_true_random=False), st.sampled_from([*HOSTILE_NAMES, -1, 1.5, True, {"tuple": []}, {}, []]))
def test_any_change_to_a_document_loads_or_is_refused(choice: random.Random, replacement: Any) -> None:
    """Put something else in a random place: whatever happens, it is a module or one kind of error."""
    path = _path()
    path.write_bytes(_content())
    document, tensors = _split(path)
    spot: Any = document
    while True:
        keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
        if not keys:
            return
        key = choice.choice(keys)
        if isinstance(spot[key], (dict, list)) and choice.random() < 0.8:
            spot = spot[key]
            continue
        spot[key] = replacement
        break
    _join(path, document, tensors)
    with contextlib.suppress(ArtifactError):
        assert isinstance(fxc.load(path), fxc.CompactModule)
    assert CANARY not in os.environ


# The module itself


def test_copies_and_pickles_are_whole() -> None:
    torch.manual_seed(0)
    compact = _compact(Mixed(), torch.randn(2, 3, 9, 9)).eval()
    compact.stem.get_submodule("1").train()  # type: ignore[union-attr]
    compact.report = Report("Mixed", Totals(5, 6, 7, 8), Totals(1, 2, 3, 4))
    graph_info(compact).stage = Stage.QDQ
    x = torch.randn(2, 3, 9, 9)
    expected = _leaves(copy.deepcopy(compact)(x))
    for twin in (copy.deepcopy(compact), copy.copy(compact), pickle.loads(pickle.dumps(compact))):
        assert isinstance(twin, fxc.CompactModule)
        assert type(twin).__name__ == "CompactMixed"
        assert str(twin.report) == str(compact.report)
        assert graph_info(twin).stage is Stage.QDQ
        assert twin.code == compact.code
        assert [info(node) for node in twin.graph.nodes] == [info(node) for node in compact.graph.nodes]
        assert [m.training for m in twin.modules()] == [m.training for m in compact.modules()]
        assert twin.get_parameter("tied.weight") is twin.get_parameter("head.weight")
        assert all(torch.equal(a, b) for a, b in zip(_leaves(copy.deepcopy(twin)(x)), expected, strict=True))
    assert set(compact.state_dict()) == set(Mixed().state_dict())


def test_functions_that_torch_cannot_pickle_are_pickled() -> None:
    compact = _compact(nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2)), torch.randn(1, 1, 8, 8))
    x = torch.randn(1, 1, 8, 8)
    graph = fx.Graph()
    graph.output(graph.call_function(F.max_pool2d, (graph.placeholder("x"), 2)))
    direct = fxc.CompactModule(nn.Module(), graph)
    for module in (compact, direct):
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
