"""Presets: names for whole pipelines, and the reading of whatever a user gives as `passes=`."""

from __future__ import annotations

from collections.abc import Iterable

from fxcompress.errors import OptionError
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


def _not_a_pass(item: object) -> str:
    if isinstance(item, type) and issubclass(item, Pass):
        return f"{item.__name__} is a class; make a pass of it: {item.__name__}(...)"
    return f"passes must be fxcompress.Pass objects or pipeline text, not {type(item).__name__}: {item!r}"
