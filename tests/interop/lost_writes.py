"""Writes that a QEMU under TCG loses by itself, and how tests with pre-copy rounds bear that.

Under TCG a processor marks a page as dirty and then writes to it. When the migration thread takes
the mark in between, and the page, the write is lost: the destination gets a page that is one write
behind. QEMU commit 9458a9a1df1a ("memory: fix race between TCG and accesses to dirty bitmap") tells
of the race and mends a part. QEMU's own post-copy shows it on a busy machine, too
(`test_no_page_is_bad_after_native_post_copy`), about once in a hundred times, and at times twice in
a row. So such a test is made again when the only thing wrong is a page or two that are one write
behind.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

_BAD: Final = re.compile(
    r"BAD page=(?P<page>\d+) word=(?P<word>\d+)"
    r" expected=(?P<expected>[0-9a-f]{16}) found=(?P<found>[0-9a-f]{16})"
)
_MOST_PAGES: Final = 2
_TRIES: Final = 4
_MOST_WRITES: Final = 1 << 16
"""Writes of one page in the life of a guest, far more than there are."""
_MASK: Final = (1 << 64) - 1


class WriteLost(AssertionError):
    """A page or two are one write behind, and nothing else is wrong."""


def pattern(page: int, generation: int, word: int) -> int:
    """Return what guest/checker.c writes there with its write number `generation`."""
    number = (page << 32 | generation) * 0x9E3779B97F4A7C15 & _MASK
    return (number ^ number >> 29) + word * 0xBF58476D1CE4E5B9 & _MASK


def is_one_write_behind(line: str) -> bool:
    """Tell whether a line about a bad page says that its last write is missing."""
    found = _BAD.fullmatch(line)
    if found is None:
        return False
    page, word = int(found["page"]), int(found["word"])
    before = 0  # a page that was never written holds zeros
    for generation in range(1, _MOST_WRITES):
        now = pattern(page, generation, word)
        if now == int(found["expected"], 16):
            return int(found["found"], 16) == before
        before = now
    return False


def check(bad_pages: list[str]) -> None:
    """Fail if there is a bad page.

    :raise WriteLost: if a lost write is all that is wrong.
    :raise AssertionError: otherwise.
    """
    if 0 < len(bad_pages) <= _MOST_PAGES and all(map(is_one_write_behind, bad_pages)):
        raise WriteLost(bad_pages)
    assert not bad_pages, bad_pages[:10]


Test = Callable[..., Awaitable[None]]


def again_after_a_lost_write(test: Test) -> Test:
    """Make a test, which has a `tmp_path`, again if its source has lost a write."""

    @functools.wraps(test)
    async def until_none_is_lost(*arguments: Any, tmp_path: Path, **options: Any) -> None:
        for number in range(1, _TRIES):
            directory = tmp_path / f"try-{number}"
            directory.mkdir()
            with contextlib.suppress(WriteLost):
                return await test(*arguments, tmp_path=directory, **options)
        return await test(*arguments, tmp_path=tmp_path, **options)

    return until_none_is_lost
