"""Only what QEMU does by itself is borne, and not for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.lost_writes import (
    WriteLost,
    again_after_a_lost_write,
    check,
    is_one_write_behind,
    pattern,
)

SEEN = "BAD page=4586 word=48 expected=4cc6c3b4fde1534d found=ae8f49fa6ee8242e"
"""By QEMU's own post-copy."""


def bad(page: int, expected: int, found: int, word: int = 5) -> str:
    return f"BAD page={page} word={word} expected={expected:016x} found={found:016x}"


def test_a_page_without_its_last_write_is_one_write_behind() -> None:
    assert is_one_write_behind(SEEN)
    assert is_one_write_behind(bad(7, pattern(7, 3, 5), pattern(7, 2, 5)))
    assert is_one_write_behind(bad(7, pattern(7, 1, 5), 0))


@pytest.mark.parametrize(
    "line",
    [
        bad(7, pattern(7, 3, 5), pattern(7, 1, 5)),
        bad(7, pattern(7, 3, 5), pattern(7, 4, 5)),
        bad(7, pattern(7, 3, 5), pattern(8, 2, 5)),
        bad(7, pattern(7, 3, 5), 0),
        bad(7, 0, pattern(7, 3, 5)),
        "BAD",
    ],
)
def test_everything_else_is_not(line: str) -> None:
    assert not is_one_write_behind(line)
    with pytest.raises(AssertionError) as failed:
        check([line])
    assert failed.type is AssertionError


def test_of_many_pages_none_is_excused() -> None:
    with pytest.raises(AssertionError) as failed:
        check([SEEN] * 3)
    assert failed.type is AssertionError


async def test_a_test_is_made_again_and_not_for_ever(tmp_path: Path) -> None:
    made: list[Path] = []

    @again_after_a_lost_write
    async def test(tmp_path: Path) -> None:
        made.append(tmp_path)
        check([SEEN])

    with pytest.raises(WriteLost):
        await test(tmp_path=tmp_path)
    assert made == [*(tmp_path / f"try-{number}" for number in (1, 2, 3)), tmp_path]


async def test_a_test_that_is_good_once_is_good(tmp_path: Path) -> None:
    made: list[Path] = []

    @again_after_a_lost_write
    async def test(tmp_path: Path) -> None:
        made.append(tmp_path)
        check([SEEN] if len(made) == 1 else [])

    await test(tmp_path=tmp_path)
    assert made == [tmp_path / "try-1", tmp_path / "try-2"]
