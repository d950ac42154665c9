"""Mutations: what is right is made wrong in one place or a few, and stays right everywhere else.

Random bytes do not get far: the first check refuses them. What is hostile keeps the structure.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final, TypeVar

_T = TypeVar("_T")

ODD_NUMBERS: Final = (
    *(0, 1, 2, 7, 8, 15, 16, 127, 128, 255, 256, 511, 512, 4095, 4096, 4097, 8192, 0xFFFF),
    *(1 << 16, 1 << 20, 2 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40),
    *((1 << 63) - 4096, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1),
)
"""Numbers at which something ends or wraps around."""

ODD_TEXTS: Final = (
    *("", "\0", "a\0b", " ", "\n", "x\ny", "\x7f", "é", "\U0001f600", "\u202e", "..", "/", "%00"),
    *("pc.ram", "vm0", "x" * 255, "x" * 256, "ü" * 128, "x" * 5000),
)

_ODD_JSON: Final[tuple[Any, ...]] = (
    *(None, True, False, -1, 0.5, 1e308, -0.0, [], {}, [[]], {"": {}}, "0", 1 << 70, -(1 << 63)),
    *ODD_NUMBERS,
    *ODD_TEXTS,
)
_ODD_FRAGMENTS: Final = (
    *(b"NaN", b"Infinity", b"-", b"1e999", b'"\\ud800"', b'"\\ud800\\udc00"', b'"\\x"', b"nul"),
    *(
        b"[" * 300,
        b"{" * 300,
        b'{"a":' * 60,
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\\",
        b'"',
    ),
)


def changed_bytes(numbers: Random, data: bytes) -> bytes:
    """Return `data` with one to three changes of a fuzzer's usual kinds."""
    changed = bytearray(data)
    for _ in range(numbers.choice((1, 1, 1, 2, 3))):
        place = numbers.randrange(len(changed) + 1)
        numbers.choice(_BYTE_CHANGES)(numbers, changed, place)
    return bytes(changed)


def _flip(numbers: Random, data: bytearray, place: int) -> None:
    if place < len(data):
        data[place] ^= 1 << numbers.randrange(8)


def _set(numbers: Random, data: bytearray, place: int) -> None:
    if place < len(data):
        data[place] = numbers.randrange(256)


def _set_number(numbers: Random, data: bytearray, place: int) -> None:
    size = numbers.choice((1, 2, 4, 8))
    number = numbers.choice(ODD_NUMBERS) % (1 << 8 * size)
    data[place : place + size] = number.to_bytes(size, numbers.choice(("big", "big", "little")))


def _insert(numbers: Random, data: bytearray, place: int) -> None:
    data[place:place] = numbers.randbytes(numbers.choice((1, 2, 8, 40)))


def _remove(numbers: Random, data: bytearray, place: int) -> None:
    del data[place : place + numbers.choice((1, 2, 8, 40))]


def _repeat(numbers: Random, data: bytearray, place: int) -> None:
    data[place:place] = data[place : place + numbers.choice((1, 5, 9, 40))]


def _cut(numbers: Random, data: bytearray, place: int) -> None:
    del data[place:]


_BYTE_CHANGES: Final[tuple[Callable[[Random, bytearray, int], None], ...]] = (
    *(_flip, _flip, _set, _set_number, _set_number, _insert, _remove, _repeat, _cut),
)


def changed_order(numbers: Random, parts: list[_T], others: Sequence[_T]) -> None:
    """Change which `parts` there are and in which order: one change.

    :param others: parts that may be put in.
    """
    if not parts:
        return
    place, other = numbers.randrange(len(parts)), numbers.randrange(len(parts))
    match numbers.randrange(7):
        case 0:
            parts[place], parts[other] = parts[other], parts[place]
        case 1:
            del parts[place]
        case 2:
            parts.insert(other, parts[place])
        case 3:
            parts.insert(other, parts.pop(place))
        case 4:
            parts[place:place] = [parts[other]] * numbers.choice((2, 5, 40))
        case 5:
            del parts[place + 1 :]
        case 6:
            parts.insert(place, numbers.choice(others))


def changed_json(numbers: Random, value: Any) -> bytes:
    """Return `value`, which is copied, as JSON with one to three changes, most in its values."""
    value = json.loads(json.dumps(value))
    for _ in range(numbers.choice((1, 1, 1, 2, 3))):
        value = _changed_value(numbers, value)
    text = json.dumps(value, ensure_ascii=numbers.random() < 0.5).encode(errors="surrogatepass")
    match numbers.randrange(12):
        case 0:
            return changed_bytes(numbers, text)
        case 1:
            place = numbers.randrange(len(text) + 1)
            return text[:place] + numbers.choice(_ODD_FRAGMENTS) + text[place:]
        case 2:  # the first key comes twice
            return text.replace(b"{", b"{" + text[1 : text.find(b",") + 1], 1)
        case _:
            return text


def _changed_value(numbers: Random, value: Any) -> Any:
    """Return `value` with one change somewhere in it."""
    if isinstance(value, dict) and value and numbers.random() < 0.9:
        key = numbers.choice(list(value))
        match numbers.randrange(10):
            case 0:
                del value[key]
            case 1:
                value[numbers.choice(ODD_TEXTS)] = value[key]
            case 2:
                value[numbers.choice(list(value))] = value[key]
            case _:
                value[key] = _changed_value(numbers, value[key])
        return value
    if isinstance(value, list) and value and numbers.random() < 0.9:
        place = numbers.randrange(len(value))
        match numbers.randrange(8):
            case 0:
                changed_order(numbers, value, (None, {}, 0, *value))
            case 1:
                # Once: what three changes in a row would make is no input, but a wait of a minute.
                value[:] = value * numbers.choice((2, 3, 300) if len(value) < 300 else (2, 3))
            case _:
                value[place] = _changed_value(numbers, value[place])
        return value
    if isinstance(value, int) and numbers.random() < 0.5:
        return value + numbers.choice((-4096, -1, 1, 4095, 4096, 1 << 32, value))
    if isinstance(value, str) and numbers.random() < 0.5:
        return changed_bytes(numbers, value.encode()).decode(errors="replace")
    return copy.deepcopy(numbers.choice(_ODD_JSON))
