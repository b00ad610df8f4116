"""Every exception that fxcompress raises on purpose.

All of them derive from `FxCompressError`, so that one `except` clause catches them all. A message says what is wrong,
where, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxCompressError(Exception):
    """Base class of all errors of fxcompress."""


class CaptureError(FxCompressError):
    """The model could not be traced into a graph. The message names the file and line that stopped the tracer."""


class InputError(FxCompressError):
    """Example inputs, calibration data or training data are missing or do not fit the model."""


class OptionError(FxCompressError, ValueError):
    """An option of a pass or function has a value that makes no sense."""


class PipelineTextError(OptionError):
    """Pipeline text cannot be read: a syntax error, or a pass, preset or option of an unknown name."""


class PassOrderError(FxCompressError):
    """A list of passes cannot run in the order given. Raised before the first pass runs."""


class PassError(FxCompressError):
    """A pass failed. The message names the pass and those that ran before it; the cause is chained."""


class VerificationError(FxCompressError):
    """A graph broke a rule, or an `exact` pass changed the outputs. The message names the first node that differs."""


class BudgetError(FxCompressError):
    """A budget in parameters, MACs, bytes or milliseconds cannot be met."""


class UnsupportedError(FxCompressError):
    """The operation is not possible for this graph, target or machine."""


class ArtifactError(FxCompressError):
    """A saved module cannot be written, or a file cannot be read: truncated, altered, too new or not an artefact."""


class CheckpointError(FxCompressError):
    """A checkpoint cannot be written or read, or it is of another run. The message names what differs."""


class ProcessError(FxCompressError):
    """The processes of a run do not do the same, or one of them has ended."""


class MissingExtraError(FxCompressError, ImportError):
    """An optional dependency is not installed. The message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f"install it with: pip install 'fxcompress[{extra}]'"
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known word nearest to `word`, or a list of the known words."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(words)}" if words else ""
