"""The pass manager: order, checks between passes, and errors that name the pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.errors import OptionError, PassError, PassOrderError, VerificationError
from fxcompress.graph import ops
from fxcompress.graph.metadata import Stage
from fxcompress.pipeline.base import data_field
from fxcompress.pipeline.order import check_order
from fxcompress.pipeline.presets import read_passes
from fxcompress.testing import assert_graph

#: One pass, or group, for each way to go from stage to stage.
NAMES = ("fuse", "train", "insert-observers", "calibrate", "convert-observed", "lower", "quantize")

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Sigmoid()).eval()


@dataclass(frozen=True)
class Edit(fxc.Pass):
    """A pass that calls a function on the graph."""

    edit: Callable[[fx.GraphModule], None] = data_field()

    name: ClassVar[str] = "edit"
    contract: ClassVar[fxc.Contract] = fxc.Contract.EXACT

    def run(self, graph_module: fx.GraphModule, context: fxc.PassContext) -> fxc.PassResult:
        self.edit(graph_module)
        return fxc.PassResult(graph_module, modified=True)


def _relu_to_gelu(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if ops.kind(node) == "relu":
            node.target = F.gelu


def test_a_pass_that_is_not_exact_is_found_with_the_first_node_that_differs() -> None:
    with pytest.raises(
        VerificationError,
        match=r"pass 3 \(edit\), after canonicalize, fold-constants, .*first node that differs is '_1'",
    ):
        fxc.compile(model(), [P.FoldConstants(), Edit(_relu_to_gelu)], X)
    fxc.compile(model(), [P.FoldConstants(), Edit(_relu_to_gelu)], X, verify=False)  # the user's choice


def test_a_malformed_graph_is_found() -> None:
    def unnamed(graph_module: fx.GraphModule) -> None:
        next(n for n in graph_module.graph.nodes if n.op == "call_module").target = "nowhere"

    with pytest.raises(VerificationError, match=r"edit.*nowhere"):
        fxc.compile(model(), [Edit(unnamed)], X)


def test_a_graph_whose_shapes_do_not_fit_is_found() -> None:
    def transpose(graph_module: fx.GraphModule) -> None:
        graph_module.get_submodule("2").weight = nn.Parameter(torch.randn(2, 5, 3, 3))

    with pytest.raises(PassError, match=r"left a graph that does not run: .*node '_2'"):
        fxc.compile(model(), [Edit(transpose)], X)


def test_a_failing_pass_is_named_with_those_before_it() -> None:
    def fail(graph_module: fx.GraphModule) -> None:
        raise KeyError("weights")

    with pytest.raises(
        PassError, match=r"pass 3 \(edit\), after canonicalize, eliminate-dead, failed with KeyError"
    ) as caught:
        fxc.compile(model(), [P.EliminateDead(), Edit(fail)], X)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_pass_must_return_a_result() -> None:
    class Wrong(fxc.Pass):
        name = "wrong"

        def run(self, graph_module: fx.GraphModule, context: fxc.PassContext) -> fxc.PassResult:
            return graph_module  # type: ignore[return-value]

    with pytest.raises(PassError, match="must return a PassResult"):
        fxc.compile(model(), [Wrong()], X)


@dataclass(frozen=True)
class TakesQDQ(fxc.Pass):
    """A pass of a later stage."""

    name: ClassVar[str] = "takes-qdq"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.QDQ})

    def run(self, graph_module: fx.GraphModule, context: fxc.PassContext) -> fxc.PassResult:
        raise RuntimeError("must not run")


def test_order_is_checked_before_anything_runs() -> None:
    seen: list[str] = []
    with pytest.raises(PassOrderError, match=r"pass 2 \(takes-qdq\) takes a graph of stage QDQ, but would meet FLOAT"):
        fxc.compile(model(), [Edit(lambda g: seen.append("ran")), TakesQDQ()], X)
    assert seen == []


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("quantize, prune-channels{ratio=0.5}, fuse", "This order would do: prune-channels{ratio=0.5}, fuse, quantize"),
        (
            "lower, convert-observed, calibrate, insert-observers",
            "This order would do: insert-observers, calibrate, convert-observed, lower",
        ),
        (
            "qat{train=[train{epochs=1}]}, train{epochs=2}, fuse",
            "This order would do: train{epochs=2}, fuse, qat{train=[train{epochs=1}]}",
        ),
        ("calibrate, fuse", "With quantize, which calibrate is a part of, this order would do: fuse, quantize"),
        ("quantize, quantize", "Without pass 2 (quantize), this order would do: quantize"),
    ],
)
def test_an_order_that_is_advised_is_accepted(written: str, advice: str) -> None:
    with pytest.raises(PassOrderError) as caught:
        fxc.compile(model(), written, X)
    assert str(caught.value).endswith(advice)
    order = advice.partition(": ")[2]
    check_order(read_passes(order), Stage.FLOAT)


def test_the_advice_holds_passes_of_the_users_own() -> None:
    with pytest.raises(PassOrderError, match=r"With .*insert-observers, calibrate, convert-observed before it, this"):
        fxc.compile(model(), [TakesQDQ()], X)
    with pytest.raises(PassOrderError, match=r"would do: quantize$"):
        fxc.compile(model(), [P.Quantize(), TakesQDQ()], X)


@settings(deadline=None)  # the first look at the registry imports all passes
@given(st.lists(st.sampled_from(sorted(NAMES)), min_size=1, max_size=5))
def test_every_advice_is_accepted(names: list[str]) -> None:
    try:
        check_order(read_passes(names), Stage.FLOAT)
    except PassOrderError as error:
        order = str(error).partition("order would do: ")[2]
        check_order(read_passes(order), Stage.FLOAT)
        if " This order" in str(error):
            assert sorted(map(str, read_passes(order))) == sorted(map(str, read_passes(names)))
        else:
            assert not any(accepted(tried) for tried in set(itertools.permutations(names)))


def accepted(names: tuple[str, ...]) -> bool:
    stage = Stage.FLOAT
    for leaf in fxc.PassManager(list(names)).passes:
        if stage not in leaf.requires:
            return False
        stage = leaf.produces or stage
    return True


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([lambda g: g], "must be fxcompress.Pass objects or pipeline text, not function"),
        ([P.Fuse], r"Fuse is a class; make a pass of it: Fuse\(\.\.\.\)"),
        (7, "not int"),
    ],
)
def test_what_is_no_pass_is_refused(passes: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fxc.compile(model(), passes, X)


def test_unknown_target_is_refused() -> None:
    with pytest.raises(OptionError, match="target must be one of 'cpu', 'cuda'"):
        fxc.compile(model(), [], X, target="tpu")


def test_rows_tell_what_happened() -> None:
    names: list[str] = []
    compact = fxc.compile(model(), [P.PruneChannels(0.5)], X, dump=lambda name, graph: names.append(name))
    assert names == ["canonicalize", "mask-channels", "remove-channels"]
    assert compact.report is not None
    lines = compact.report.passes
    assert [line.modified for line in lines] == [True, True, True]
    assert lines[2].difference is not None
    assert lines[2].difference < 1e-5
    assert compact.report.after.parameters == sum(p.numel() for p in compact.parameters())
    assert compact.report.before.parameters == sum(p.numel() for p in model().parameters())
    layers = {line.layer: line for line in compact.report.layers}
    assert layers["0"].notes == ("masked 4 -> 2", "pruned 4 -> 2")
    assert layers["2"].notes == ("not masked: output of the model", "not pruned: output of the model")
    assert fxc.Report.from_dict(compact.report.to_dict()) == compact.report
    assert "pruned 4 -> 2" in str(compact.report)


def test_the_text_of_a_graph_is_stable() -> None:
    compact = fxc.compile(model(), [], X)
    expected = """
        stage FLOAT
        %0: f32[2,3,6,6] = placeholder input
        %1: f32[2,4,4,4] = module 0: Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))(%0)
        %2: f32[2,4,4,4] = relu(%1)
        %3: f32[2,2,2,2] = module 2: Conv2d(4, 2, kernel_size=(3, 3), stride=(1, 1))(%2)
        %4: f32[2,2,2,2] = sigmoid(%3)
        %5 = output(%4)
    """
    assert_graph(compact, expected)
    with pytest.raises(AssertionError, match="not as expected"):
        assert_graph(compact, expected.replace("relu", "gelu"))


def test_a_manager_takes_only_traced_graphs() -> None:
    with pytest.raises(OptionError, match=r"make one with fxcompress\.trace"):
        fxc.PassManager([]).run(model(), X)  # type: ignore[arg-type]


@dataclass(frozen=True)
class DeniedEdit(Edit):
    """Edits the graph and says that it did not."""

    name: ClassVar[str] = "denied-edit"

    def run(self, graph_module: fx.GraphModule, context: fxc.PassContext) -> fxc.PassResult:
        self.edit(graph_module)
        return fxc.PassResult(graph_module, modified=False)


def test_a_pass_that_edits_and_denies_it_is_found_out() -> None:
    with pytest.raises(PassError, match=r"denied-edit.*modified=False, but changed node '_1'"):
        fxc.compile(model(), [DeniedEdit(_relu_to_gelu)], X)
