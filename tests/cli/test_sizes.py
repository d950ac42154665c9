"""Sizes as people write them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.cli.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64K", 65536),
        ("64k", 65536),
        ("2M", 2 << 20),
        ("2MiB", 2 << 20),
        ("1.5G", 3 << 29),
        ("3T", 3 << 40),
        (" 7 ", 7),
    ],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "1X", "1MB", "0x10", "1 M", "1e3", "٣", "1,5M"])
def test_what_is_no_size_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text!r} is not a size: write bytes")):
        parse_size(text)


def test_a_part_of_a_byte_is_refused() -> None:
    with pytest.raises(ValueError, match="not a whole number of bytes"):
        parse_size("1.0001K")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (15.5 * 1024, "15.5 KiB"),
        (1 << 20, "1.00 MiB"),
        (256 << 20, "256 MiB"),
        (3 << 29, "1.50 GiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_sizes_are_written_with_three_digits(size: float, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 50))
def test_what_is_written_is_within_one_percent(size: int) -> None:
    number, unit = format_size(size).split()
    factor = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit]
    assert abs(float(number) * factor - size) <= size / 100
