"""Names with options: `"sgd(momentum=0.8)"`, as losses, optimisers, schedules and metrics are written."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from fxcompress.errors import OptionError, did_you_mean

_CALL = re.compile(r"\s*(?P<name>[\w-]+)\s*(?:\((?P<options>.*)\))?\s*", flags=re.DOTALL)


def read_call(text: object, known: Mapping[str, Callable[..., Any]], kind: str) -> tuple[str, dict[str, Any]]:
    """Read a name with keyword options, and compare them with what the function of that name takes.

    Args:
        text: for example "adam", "sgd(momentum=0.8, nesterov=False)".
        known: functions or classes by name.
        kind: what they are, for messages: "loss", "optimiser".

    Raises:
        OptionError: it cannot be read, or the name or an option is unknown; the nearest known one is suggested.
    """
    match = _CALL.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise OptionError(f"the {kind} must be a name such as {next(iter(known))!r}, not {text!r}")
    name = match["name"]
    if name not in known:
        raise OptionError(f"there is no {kind} named {name!r}{did_you_mean(name, known)}; or give a function")
    options = _read_options(text, match["options"] or "", kind)
    taken = [parameter.name for parameter in inspect.signature(known[name]).parameters.values()]
    for option in options:
        if option not in taken:
            raise OptionError(f"the {kind} {name!r} has no option {option!r}{did_you_mean(option, taken)}")
    return name, options


def _read_options(text: object, options: str, kind: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"call({options})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("options have names")
        return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords if word.arg is not None}
    except (SyntaxError, ValueError) as error:
        raise OptionError(
            f"the {kind} {text!r} cannot be read: options are written as name=value, for example 'sgd(momentum=0.9)'"
        ) from error
