"""Finds what is wrong with a configuration: every mistake at once, each with its line.

tomllib tells no lines of keys, and msgspec stops at the first mistake. So the table is walked along
the types of the settings here, and a line is looked for only when there is something to say of it.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import msgspec

Key = tuple[str | int, ...]
"""Where a value is: keys and places in arrays, from the outermost in."""

_POSITION: Final = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)\Z")


class Problem(msgspec.Struct, frozen=True):
    """One mistake."""

    line: int | None
    """Counted from 1; None when it is about the whole file."""
    what: str


class ConfigurationError(Exception):
    """The configuration is wrong; the text has one line for each mistake."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        super().__init__(source, problems)
        self.problems = tuple(problems)
        self._source = source

    def __str__(self) -> str:
        return "\n".join(
            f"{self._source}{'' if problem.line is None else f':{problem.line}'}: {problem.what}"
            for problem in self.problems
        )


class Check(msgspec.Struct, frozen=True):
    """Stands in a setting's annotation: what must hold beyond the type."""

    function: Callable[[Any], None]
    """Raises ValueError with the reason."""


class Lines:
    """Tells on which line of a TOML text a key stands."""

    def __init__(self, text: str) -> None:
        """Take the text, which must be valid."""
        self._lines = text.splitlines(keepends=True)

    def of(self, key: Key) -> int | None:
        """Return the line, counted from 1; None if the key is not there.

        A text that is cut between two statements is valid itself. The key's statement is the one
        with which the key comes to be.
        """
        name = next(part for part in reversed(key) if isinstance(part, str))
        for number, line in enumerate(self._lines, 1):
            if name in line and self._has(key, number):
                return number
        return None

    def _has(self, key: Key, number: int) -> bool:
        """Tell whether the key is there at the end of the statement that line `number` is in."""
        for end in range(number, len(self._lines) + 1):
            try:
                value: Any = tomllib.loads("".join(self._lines[:end]))
            except tomllib.TOMLDecodeError:
                continue
            try:
                for part in key:
                    value = value[part]
            except (KeyError, IndexError):
                return False
            return True
        return False


def line_of_syntax_error(error: tomllib.TOMLDecodeError) -> tuple[int | None, str]:
    """Return the line that `error` names, None for the end of the text, and what is wrong."""
    text = str(error)
    position = _POSITION.search(text)
    if position is None or position[1] is None:
        return None, text
    return int(position[1]), text[: position.start()]


def find_problems(kind: type[msgspec.Struct], table: dict[str, Any], lines: Lines) -> list[Problem]:
    """Return every mistake in `table`, which is to be a `kind`."""
    return list(_Walk(kind, lines).table(kind, table, ()))


class _Walk:
    def __init__(self, root: type[msgspec.Struct], lines: Lines) -> None:
        self._root = root
        self._lines = lines

    def table(
        self, kind: type[msgspec.Struct], table: dict[str, Any], path: Key
    ) -> Iterator[Problem]:
        hints = get_type_hints(kind, include_extras=True)
        for key, value in table.items():
            if key in hints:
                yield from self._value(hints[key], value, (*path, key))
            else:
                yield self._problem((*path, key), self._unknown_key(key, tuple(hints), path))
        for field in msgspec.structs.fields(kind):
            if field.required and field.name not in table:
                yield self._problem(path, f"{_dotted(path)} has no {field.name!r}")

    def _value(self, hint: Any, value: object, path: Key) -> Iterator[Problem]:
        nested = _nested_struct(hint)
        if nested is None:
            yield from self._plain_value(hint, value, path)
        elif nested is hint:
            if isinstance(value, dict):
                yield from self.table(nested, value, path)
            else:
                yield self._problem(path, f"{_dotted(path)} is a table, written [{_dotted(path)}]")
        elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            for number, entry in enumerate(value):
                yield from self.table(nested, entry, (*path, number))
        else:
            name = _dotted(path)
            yield self._problem(path, f"{name} is a list of tables, each written [[{name}]]")

    def _plain_value(self, hint: Any, value: object, path: Key) -> Iterator[Problem]:
        _, *annotations = get_args(hint)
        try:
            converted = msgspec.convert(value, hint)
            # Not a number passes every comparison of msgspec.
            if converted != converted:
                raise msgspec.ValidationError
        except msgspec.ValidationError:
            (expected,) = (
                entry.description for entry in annotations if isinstance(entry, msgspec.Meta)
            )
            yield self._problem(path, f"{_dotted(path)} must be {expected}; it is {value!r}")
            return
        for check in annotations:
            if isinstance(check, Check):
                try:
                    check.function(converted)
                except ValueError as error:
                    yield self._problem(path, f"{_dotted(path)}: {error}")

    def _unknown_key(self, key: str, known: Sequence[str], path: Key) -> str:
        where = f" in [{_dotted(path)}]" if path else ""
        nearest = difflib.get_close_matches(key, known, n=1)
        if nearest:
            return f"there is no setting {key!r}{where}; did you mean {nearest[0]!r}?"
        elsewhere = [other for other in _all_settings(self._root) if other.split(".")[-1] == key]
        if elsewhere:
            return f"there is no setting {key!r}{where}; there is {' and '.join(elsewhere)}"
        return f"there is no setting {key!r}{where}; there are: {', '.join(known)}"

    def _problem(self, path: Key, what: str) -> Problem:
        return Problem(self._lines.of(path), what)


def _all_settings(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(kind, include_extras=True).items():
        nested = _nested_struct(hint)
        if nested is None:
            yield prefix + name
        else:
            yield from _all_settings(nested, f"{prefix}{name}.")


def _nested_struct(hint: Any) -> type[msgspec.Struct] | None:
    """Return the struct that `hint` is, or is a tuple of; None for any other type."""
    if get_origin(hint) is Annotated:
        return None
    for candidate in (hint, *get_args(hint)):
        if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return candidate
    return None


def _dotted(path: Key) -> str:
    return ".".join(part for part in path if isinstance(part, str))
