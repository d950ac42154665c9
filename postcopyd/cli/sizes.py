"""Sizes as people write and read them: 4096, 64K, 2M, 1.5G. The units are powers of 1024."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LARGE_UNITS: Final = ("KiB", "MiB", "GiB", "TiB")
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)(?:iB)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return how many bytes `text` says.

    :raise ValueError: if it says none, or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: write bytes, or a number with K, M, G or T")
    size = Fraction(match[1]) * _UNITS[match[2].upper()]
    if size.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


def format_size(size: float) -> str:
    """Return a number of bytes with three or four significant digits: 1.50 GiB, 12.0 KiB, 80 B."""
    if size < 1024:
        return f"{size:.0f} B"
    power = 1
    while size >= 999.5 * 1024**power and power < len(_LARGE_UNITS):
        power += 1
    size /= 1024**power
    return f"{size:.{max(0, 3 - len(str(int(size))))}f} {_LARGE_UNITS[power - 1]}"
