"""Pipeline text: `"prune-channels{ratio=0.5, scope=layer}, fuse, quantize"`, parsed and printed.

Grammar:

    pipeline := pass ("," pass)*
    pass     := NAME [ "{" option ("," option)* "}" ]
    option   := NAME "=" value
    value    := Python literal | WORD | "[" [ value ("," value)* ] "]" | NAME "{" [ option ("," option)* ] "}"

A word that is no literal is a string; a value with braces is a pass, for passes made of others. Printing and parsing
round-trip.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

from fxcompress.errors import OptionError, PipelineTextError, did_you_mean
from fxcompress.pipeline import registry
from fxcompress.pipeline.base import Pass

_TOKEN = re.compile(
    r"\s*(?:(?P<string>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")|(?P<word>[\w.+\-:*/]+)|(?P<mark>[{}\[\]=,]))"
)


_FLOATS = ("inf", "-inf", "nan")  # floats that are no Python literals


def parse(text: str) -> list[Pass]:
    """Read pipeline text into passes.

    Raises:
        PipelineTextError: a syntax error, or an unknown pass or option; the nearest known one is suggested.
    """
    return _Parser(text).pipeline()


def print_pass(item: Pass) -> str:
    """Return the text of one pass: its name, and the options that differ from their defaults."""
    options = [
        f"{field.name}={_print_value(getattr(item, field.name))}"
        for field in dataclasses.fields(item)
        if not field.metadata.get("data") and getattr(item, field.name) != _default(field)
    ]
    return item.name + (f"{{{', '.join(options)}}}" if options else "")


def print_pipeline(passes: list[Pass]) -> str:
    """Return the text of a list of passes."""
    return ", ".join(print_pass(item) for item in passes)


def options(pass_class: type[Pass]) -> dict[str, tuple[str, Any]]:
    """Return the options of a pass: name -> (type as written, default; `dataclasses.MISSING` if there is none)."""
    return {field.name: (str(field.type), _default(field)) for field in dataclasses.fields(pass_class)}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _print_value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_print_value(item) for item in value) + "]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_][\w.\-:*/]*", value) and value not in ("None", "True", "False", *_FLOATS)
        return value if plain else repr(value)
    if dataclasses.is_dataclass(value):  # a budget, which reads its own text
        return str(value)
    return repr(value)


class _Parser:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        position = 0
        while position < len(text.rstrip()):
            match = _TOKEN.match(text, position)
            if match is None:
                raise self._error(f"unexpected character {text[position:].strip()[:1]!r}", position)
            kind = str(match.lastgroup)
            self.tokens.append((kind, match[kind], match.start(kind)))
            position = match.end()
        self.index = 0

    def pipeline(self) -> list[Pass]:
        passes = [self._pass()]
        while self._accept(","):
            passes.append(self._pass())
        if self.index < len(self.tokens):
            raise self._error(f"expected ',' before {self.tokens[self.index][1]!r}")
        return passes

    def _pass(self) -> Pass:
        name = self._word("the name of a pass")
        return self._with_options(name, self._accept("{"))

    def _with_options(self, name: str, braces: bool) -> Pass:
        """Read the options of a pass, if there are any; the opening brace has been read."""
        pass_class = registry.find(name)
        given: dict[str, Any] = {}
        if braces and not self._accept("}"):
            while True:
                self._option(pass_class, given)
                if self._accept("}"):
                    break
                self._expect(",")
        try:
            return pass_class(**given)
        except TypeError as error:
            raise PipelineTextError(f"{name}: {str(error).rpartition('() ')[2]}") from error
        except OptionError as error:
            named = re.match(
                rf"{pass_class.__name__}\b(.*)", str(error), re.DOTALL
            )  # here it is known by its other name
            raise PipelineTextError(f"{name}{named[1]}" if named else f"{name}: {error}") from error

    def _option(self, pass_class: type[Pass], given: dict[str, Any]) -> None:
        key = self._word("the name of an option")
        known = [field.name for field in dataclasses.fields(pass_class) if not field.metadata.get("data")]
        if key not in known:
            raise PipelineTextError(f"{pass_class.name} has no option {key!r}{did_you_mean(key, known)}")
        if key in given:
            raise self._error(f"option {key!r} is given twice")
        self._expect("=")
        given[key] = self._value()

    def _value(self) -> Any:
        if self._accept("["):
            items: list[Any] = []
            while not self._accept("]"):
                if items:
                    self._expect(",")
                items.append(self._value())
            return tuple(items)
        kind, value, _ = self._next("a value")
        if kind == "mark":
            raise self._error(f"expected a value, found {value!r}")
        if kind == "word" and self._accept("{"):
            return self._with_options(value, True)
        if kind == "word" and value in _FLOATS:
            return float(value)
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value

    def _next(self, wanted: str) -> tuple[str, str, int]:
        if self.index >= len(self.tokens):
            raise self._error(f"expected {wanted}, found the end", len(self.text))
        self.index += 1
        return self.tokens[self.index - 1]

    def _word(self, wanted: str) -> str:
        kind, value, position = self._next(wanted)
        if kind != "word":
            raise self._error(f"expected {wanted}, found {value!r}", position)
        return value

    def _accept(self, mark: str) -> bool:
        found = self.index < len(self.tokens) and self.tokens[self.index][:2] == ("mark", mark)
        self.index += found
        return found

    def _expect(self, mark: str) -> None:
        kind, value, position = self._next(repr(mark))
        if (kind, value) != ("mark", mark):
            raise self._error(f"expected {mark!r}, found {value!r}", position)

    def _error(self, reason: str, position: int | None = None) -> PipelineTextError:
        if position is None:
            position = self.tokens[self.index][2] if self.index < len(self.tokens) else len(self.text)
        return PipelineTextError(f"pipeline text: {reason}, at position {position}: {self.text!r}")
