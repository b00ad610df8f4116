"""Presets: names for whole pipelines, and the reading of whatever a user gives as `passes=`."""

from __future__ import annotations

from collections.abc import Iterable

from fxcompress.errors import OptionError
from fxcompress.graph.metadata import Stage
from fxcompress.pipeline.base import Pass
from fxcompress.pipeline.text import parse

#: name -> pipeline text
PRESETS: dict[str, str] = {
    "fused": "fuse",
    "int8": "fuse, quantize",
    "int8-dynamic": "fuse, quantize{mode=dynamic}",
    "int8-weight-only": "fuse, quantize{mode=weight-only}",
    "half-channels": "prune-channels{ratio=0.5, round_to=8}, fuse",
    "small-int8": "prune-channels{ratio=0.5, round_to=8}, fuse, quantize",
}


def read_passes(given: object) -> list[Pass]:
    """Return a list of passes from a preset's name, pipeline text, one pass, or a list that may mix passes and text.

    Raises:
        PipelineTextError: text that cannot be read.
        OptionError: something that is no pass.
    """
    if isinstance(given, Pass):
        return [given]
    if isinstance(given, str):
        return parse(PRESETS.get(given.strip(), given)) if given.strip() else []
    if not isinstance(given, Iterable):
        raise OptionError(_not_a_pass(given))
    passes: list[Pass] = []
    for item in given:
        if isinstance(item, str):
            passes.extend(parse(item))
        elif isinstance(item, Pass):
            passes.append(item)
        else:
            raise OptionError(_not_a_pass(item))
    return passes


def passes_for(given: object, target: str, dtype: str | None) -> list[Pass]:
    """Return the passes to run for a target, with those behind them that choose what a GPU computes with.

    Args:
        given: as `read_passes` takes it; None for a default.
        target: "cpu" or "cuda".
        dtype: "fp16", "bf16", "int8", "fp8", or None: fp16 unless the passes quantise.
    """
    if target != "cuda":
        return read_passes("int8" if given is None else given)
    passes = read_passes("fuse" if given is None else given)
    made = [part.produces for item in passes for part in item.parts()]
    if Stage.LOWERED in made:
        if dtype not in (None, "int8") and Stage.QDQ in made:
            raise OptionError(
                f"these passes quantise to int8, but dtype={dtype!r} was asked for; leave one of both out"
            )
        return passes
    if Stage.QDQ in made:
        return [*passes, *parse("lower")]
    if not any(item.name == "fuse" for item in passes):
        passes += parse("fuse")
    return passes + parse("quantize" if dtype == "int8" else "lower-float")


def _not_a_pass(item: object) -> str:
    if isinstance(item, type) and issubclass(item, Pass):
        return f"{item.__name__} is a class; make a pass of it: {item.__name__}(...)"
    return f"passes must be fxcompress.Pass objects or pipeline text, not {type(item).__name__}: {item!r}"
