"""The order of passes: whether a list can run, and what would do where it cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from fxcompress.errors import FxCompressError, PassOrderError
from fxcompress.graph.metadata import Stage
from fxcompress.pipeline import registry
from fxcompress.pipeline.base import Contract, Pass


def flatten(item: Pass) -> list[Pass]:
    """Return the passes that run where a pass is written: itself, or the parts of a group."""
    parts = item.parts()
    return [item] if parts == (item,) else [leaf for part in parts for leaf in flatten(part)]


def check_order(passes: Sequence[Pass], stage: Stage) -> None:
    """Walk the stages through a list of passes, as the user wrote it.

    Args:
        passes: passes and groups of passes.
        stage: of the graph that the first one meets.

    Raises:
        PassOrderError: a pass does not take the stage that it would meet. The message says which order would do, if
            there is one; it has been walked through.
    """
    met, maker = stage, ""
    for index, item in enumerate(passes):
        after = _through(item, met)
        if after is None:
            problem = f"pass {index + 1} ({item}) {_refusal(item, met)}{maker}."
            raise PassOrderError(f"{problem} {_advice(passes, index, stage)}")
        if after is not met:
            met, maker = after, f", as {str(item)!r} left it"


def _through(item: Pass, stage: Stage) -> Stage | None:
    """The stage behind a pass; None where it, or a part of it, does not take what it meets."""
    for leaf in flatten(item):
        if stage not in leaf.requires:
            return None
        stage = leaf.produces or stage
    return stage


def _refusal(item: Pass, met: Stage) -> str:
    accepted = [stage for stage in Stage if _through(item, stage) is not None]
    if accepted:
        return f"takes a graph of stage {' or '.join(sorted(map(str, accepted)))}, but would meet {met}"
    for leaf in flatten(item):
        if met not in leaf.requires:
            wanted = " or ".join(sorted(map(str, leaf.requires)))
            return f"cannot run: its part {leaf} takes a graph of stage {wanted}, but would meet {met} there"
        met = leaf.produces or met
    return "cannot run"


def _advice(passes: Sequence[Pass], index: int, stage: Stage) -> str:
    for remark, candidates in _alternatives(list(passes), index):
        order = _order(candidates, stage)
        if order:
            return f"{remark} order would do: {', '.join(map(str, order))}"
    return "No order of these passes would do"


def _alternatives(passes: list[Pass], index: int) -> Iterator[tuple[str, list[Pass]]]:
    """Other lists of passes that do what the user may have meant, the nearest first, with the words for them."""
    item = passes[index]
    yield "This", passes
    groups = sorted(_groups(), key=lambda known: any(part.contract is Contract.TRAINS for part in known[1]))
    for group, parts in groups:
        kinds = {type(part) for part in parts}
        if type(item) in kinds:
            rest = [one for one in passes if type(one) not in kinds]
            position = sum(type(one) not in kinds for one in passes[:index])
            yield f"With {group}, which {item} is a part of, this", [*rest[:position], group, *rest[position:]]
    for _, parts in groups:
        for end in range(1, len(parts) + 1):
            text = ", ".join(map(str, parts[:end]))
            yield f"With {text} before it, this", [*passes[:index], *parts[:end], *passes[index:]]
    for left_out in (index, *reversed(range(len(passes)))):
        yield f"Without pass {left_out + 1} ({passes[left_out]}), this", [*passes[:left_out], *passes[left_out + 1 :]]


def _groups() -> Iterator[tuple[Pass, list[Pass]]]:
    """The known groups of passes that need no options, and their parts."""
    for name in registry.names():
        try:
            group = registry.find(name)()
        except (ImportError, TypeError, FxCompressError):  # it needs options, or an extra
            continue
        parts = flatten(group)
        if len(parts) > 1:
            yield group, parts


def _order(passes: list[Pass], stage: Stage) -> list[Pass] | None:
    """The first order, with what was written first tried first, in which every pass takes what it meets."""
    effects = [tuple(_through(item, one) for one in Stage) for item in passes]
    columns = {one: column for column, one in enumerate(Stage)}
    failed: set[object] = set()
    chosen: list[int] = []

    def complete(met: Stage) -> bool:
        if len(chosen) == len(passes):
            return True
        left = [index for index in range(len(passes)) if index not in chosen]
        state = (met, frozenset(Counter(effects[index] for index in left).items()))
        if state in failed:
            return False
        for index in left:
            after = effects[index][columns[met]]
            if after is not None:
                chosen.append(index)
                if complete(after):
                    return True
                chosen.pop()
        failed.add(state)
        return False

    return [passes[index] for index in chosen] if complete(stage) else None
