"""Quantize: the forms of calibration data, errors, observers from elsewhere, CPUs without VNNI, the ledger."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils.data import DataLoader, TensorDataset

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.errors import InputError, OptionError, PassOrderError, UnsupportedError
from fxcompress.graph import ops

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)
    ).eval()


def compiled(calibration: object, **options: object) -> fxc.CompactModule:
    return fxc.compile(model(), [P.Fuse(), P.Quantize(calibration, **options)], X[:2])  # type: ignore[arg-type]


class Stream:
    """An iterable without a length."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from X.split(4)


@pytest.mark.parametrize(
    "data",
    [
        X,
        (X,),
        [X[:4], X[4:]],
        [(X[:4],), (X[4:],)],
        DataLoader(TensorDataset(X, torch.zeros(8)), batch_size=4),
        Stream(),
        (batch for batch in X.split(4)),
        {"input": X},
    ],
    ids=["tensor", "tuple", "list", "tuples", "loader", "stream", "generator", "dict"],
)
def test_every_form_of_data_gives_the_same_scales(data: object) -> None:
    if isinstance(data, dict):
        compact = fxc.compile(model(), [P.Fuse(), P.Quantize(data)], {"input": X[:2]})
    else:
        compact = compiled(data)
    reference = compiled(X)
    assert torch.equal(compact(input=X), reference(X))


class FromMapping(nn.Module):
    def __init__(self, keyword: bool) -> None:
        super().__init__()
        self.inner, self.keyword = model(), keyword

    def forward(self, batch: Any) -> torch.Tensor:
        return self.inner(batch if self.keyword else batch["image"])  # type: ignore[no-any-return]


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("form", ["one", "list", "with targets", "with more entries"])
def test_batches_that_are_dicts_do_where_the_example_is_one(keyword: bool, form: str) -> None:
    def wrapped(x: torch.Tensor) -> Any:
        return {"batch": x} if keyword else {"image": x}

    more = {"label": torch.zeros(4)} if keyword else {}
    data: dict[str, Any] = {
        "one": wrapped(X),
        "list": [wrapped(X[:4]), wrapped(X[4:])],
        "with targets": [(wrapped(X[:4]), torch.zeros(4)), (wrapped(X[4:]), torch.zeros(4))],
        "with more entries": [{**wrapped(X[:4]), **more}, {**wrapped(X[4:]), **more}],
    }
    example = wrapped(X[:2]) if keyword else (wrapped(X[:2]),)
    compact = fxc.compile(FromMapping(keyword).eval(), [P.Fuse(), P.Quantize(data[form])], example)
    assert torch.equal(compact(X if keyword else {"image": X}), compiled(X)(X))


def test_batches_that_are_dicts_are_explained_where_the_example_is_none() -> None:
    with pytest.raises(InputError, match=r"keywords input, but .* 1 positional input; give batches as tuples"):
        compiled([{"input": X}])
    with pytest.raises(InputError, match=r"keywords image, but .* keywords input; it lacks input"):
        fxc.compile(model(), [P.Quantize([{"image": X}])], {"input": X[:2]})


def test_data_can_be_given_to_compile() -> None:
    compact = fxc.compile(model(), "int8", X[:2], calibration=X)
    assert torch.equal(compact(X), compiled(X)(X))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"Calibrate needs data: .*calibration=\.\.\."),
        ([], "empty: it yields no batch"),
        (iter([]), "empty: it yields no batch"),
        (X[:0], r"calibration batch 1 is empty"),
        ([X, X[:, :2]], r"calibration batch 2 \(\(8, 2, 8, 8\) float32 on cpu\) does not fit the model"),
        ([X, X[0]], "calibration batch 2 .* does not fit the example inputs"),
        ([X.double()], "calibration batch 1 .* dimensions and dtypes must be the same"),
        ([X, X * float("nan")], "calibration batch 2 holds NaN or infinity"),
        (X / 0, "calibration batch 1 holds NaN or infinity"),
        (["photo.jpg"], "calibration batch 1 is a str"),
        ("photos/", "must be a tensor, a tuple, an iterable of batches or a DataLoader, not str"),
        (7, "not int"),
    ],
)
def test_data_that_does_not_do_is_refused(data: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compiled(data)


def test_the_form_with_pairs_is_plain_torch() -> None:
    kept: dict[str, fx.GraphModule] = {}

    def keep(name: str, graph_module: fx.GraphModule) -> None:
        if name == "convert-observed":
            kept[name] = graph_module

    layer = nn.Sequential(nn.Linear(3, 2, bias=False)).eval()
    with torch.no_grad():
        layer.get_parameter("0.weight").copy_(torch.tensor([[1.0, 0.5, -1.0], [0.25, 0.125, 0.0]]))
    data = torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.25, 1.5]])
    fxc.compile(layer, [P.FuseActivation(), *P.Quantize(data, activation="minmax").parts()[1:4]], data, dump=keep)
    graph = kept["convert-observed"]
    kinds = [ops.kind(node) for node in graph.graph.nodes]
    assert sorted(kinds) == sorted(
        ["placeholder", "fake_quantize", *["get_attr"] * 4, "fake_quantize_channel", "linear_function", "output"]
    )  # fmt: skip
    exported = torch.export.export(graph, (data,))
    assert any("fake_quantize" in str(node.target) for node in exported.graph.nodes)


def test_layers_are_ignored_on_request_and_the_ledger_says_so() -> None:
    compact = compiled(X, ignore=("3",))
    assert type(compact.get_submodule("3")).__name__ != "Int8Conv"
    assert compact.report is not None
    notes = {line.layer: line.notes for line in compact.report.layers}
    assert "float: ignored on request" in notes["3"]
    assert "int8" in notes["0"]
    with pytest.raises(OptionError, match="ignore='9' matches no layer"):
        compiled(X, ignore=("9",))


def test_observers_and_configs_of_torch_ao_take_part() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torch.ao.quantization")
        mapping = quantization.get_default_qconfig_mapping("x86")
        config = quantization.QConfig(
            activation=quantization.HistogramObserver.with_args(reduce_range=False),
            weight=quantization.default_per_channel_weight_observer,
        )
        expected = model()(X)
        for qconfig in (mapping, config):
            found = compiled(X, qconfig=qconfig)(X)
            assert (found - expected).norm() < 0.05 * expected.norm()
        found = compiled(X, activation=quantization.MinMaxObserver)(X)
        assert (found - expected).norm() < 0.05 * expected.norm()


def test_without_vnni_weights_have_seven_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXCOMPRESS_CPU", "avx2")
    compact = compiled(X)
    weights = [tensor for tensor in compact.state_dict().values() if tensor.dtype == torch.int8]
    assert weights
    assert max(int(weight.abs().max()) for weight in weights) <= 64
    expected = model()(X)
    assert (compact(X) - expected).norm() < 0.05 * expected.norm()
    assert "weights in 7 bits" in str(compact.report)


def test_without_any_kernels_the_same_numbers_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compiled(X, reduced_range=True)(X)
    monkeypatch.setenv("FXCOMPRESS_CPU", "plain")
    compact = compiled(X, reduced_range=True)
    assert (compact(X) - expected).norm() < 0.01 * expected.norm()
    assert compact.report is not None
    notes = {line.layer: line.notes for line in compact.report.layers}
    assert "int8 numbers in float arithmetic: this machine has no int8 kernels" in notes["0"]


def test_stages_keep_the_passes_in_order() -> None:
    with pytest.raises(PassOrderError, match=r"calibrate\) takes a graph of stage OBSERVED, but would meet FLOAT"):
        fxc.compile(model(), [P.Calibrate(X)], X)
    with pytest.raises(
        PassOrderError, match=r"takes a graph of stage FLOAT, but would meet LOWERED.*This order would do"
    ):
        fxc.compile(model(), [P.Quantize(X), P.PruneChannels(0.5)], X)


def test_there_are_no_int8_kernels_for_other_targets_yet() -> None:
    with pytest.raises(UnsupportedError, match="target 'cuda'"):
        fxc.compile(model(), [P.Quantize(X)], X, target="cuda")
