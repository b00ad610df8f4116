"""Pipeline text: round trips, suggestions, and users' own passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.errors import OptionError, PipelineTextError
from fxcompress.pipeline import registry
from fxcompress.pipeline.base import data_field
from fxcompress.pipeline.presets import PRESETS, read_passes
from fxcompress.pipeline.text import parse, print_pass, print_pipeline


@dataclass(frozen=True)
class Tag(fxc.Pass):
    """A pass with options of every type."""

    word: str = "plain"
    number: float = 1.0
    count: int = 2
    flag: bool = False
    words: tuple[str, ...] = ()
    nothing: int | None = None
    loader: object = data_field()

    name: ClassVar[str] = "tag-for-tests"

    def run(self, graph_module: fx.GraphModule, context: fxc.PassContext) -> fxc.PassResult:
        return fxc.PassResult(graph_module, modified=False)


registry.register(Tag)

texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)


@given(
    st.builds(
        Tag,
        word=texts,
        number=st.floats(allow_nan=False),
        count=st.integers(),
        flag=st.booleans(),
        words=st.lists(texts, max_size=3).map(tuple),
        nothing=st.none() | st.integers(),
    )
)
def test_printing_and_parsing_round_trip(item: Tag) -> None:
    assert parse(print_pass(item)) == [item]
    assert parse(print_pipeline([item, item])) == [item, item]


def test_options_are_read_by_name() -> None:
    found = parse("prune-channels{ratio=0.5, scope=layer, ignore=[head.*, 'a b']}, fuse")
    assert found == [P.PruneChannels(0.5, scope="layer", ignore=("head.*", "a b")), P.Fuse()]
    assert print_pipeline(found) == "prune-channels{ratio=0.5, scope=layer, ignore=[head.*, 'a b']}, fuse"
    assert parse("prune-channels{budget=macs:0.5}") == [P.PruneChannels(budget=fxc.MACs(0.5))]
    assert str(P.PruneChannels(budget=fxc.MACs(0.5))) == "prune-channels{budget=macs:0.5}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune-chanels{ratio=0.5}", "no pass named 'prune-chanels'; did you mean 'prune-channels'"),
        ("prune-channels{ration=0.5}", "no option 'ration'; did you mean 'ratio'"),
        ("tag-for-tests{loader=3}", "no option 'loader'"),
        ("prune-channels{ratio=2}", "^prune-channels: ratio must be at least 0 and below 1, not 2"),
        ("prune-channels{ratio=0.5", "found the end"),
        ("prune-channels{ratio 0.5}", "expected '=', found '0.5'"),
        ("fuse fuse", "expected ',' before 'fuse'"),
        ("fuse, ", "the name of a pass"),
        ("fuse; fuse", "unexpected character ';'"),
        ("prune-channels{ratio=0.5, ratio=0.6}", "given twice"),
        ("prune-channels{}", "^prune-channels takes either a ratio or a budget"),
    ],
)
def test_errors_say_what_and_where(text: str, message: str) -> None:
    with pytest.raises(PipelineTextError, match=message):
        parse(text)


def test_every_built_in_pass_and_preset_can_be_read() -> None:
    for name in registry.names():
        assert registry.find(name).name == name
    for text in PRESETS.values():
        parse(text)
    assert read_passes("fused") == [P.Fuse()]
    assert read_passes("") == []
    assert read_passes(["fuse", P.Fuse()]) == [P.Fuse(), P.Fuse()]


def test_names_of_built_in_passes_are_taken() -> None:
    class Mine(fxc.Pass):
        name = "fuse"

    with pytest.raises(OptionError, match="name of a built-in pass"):
        registry.register(Mine)
    with pytest.raises(OptionError, match="class attribute `name`"):
        registry.register(type("Nameless", (fxc.Pass,), {}))
