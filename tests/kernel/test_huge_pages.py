"""The pools of huge pages."""

from __future__ import annotations

from collections.abc import Callable

from postcopyd.kernel.huge_pages import free_huge_pages, huge_page_sizes
from postcopyd.kernel.memory import Mapping
from tests.kernel.watched import HUGE


def test_the_sizes_of_this_machine_are_found() -> None:
    sizes = huge_page_sizes()
    assert HUGE in sizes
    assert sizes == sorted(sizes)


def test_pages_that_are_promised_are_not_free(huge_pages: Callable[[int], None]) -> None:
    huge_pages(3)
    before = free_huge_pages(HUGE)
    assert before >= 3
    with Mapping.anonymous(2 * HUGE, HUGE) as mapping:
        assert free_huge_pages(HUGE) == before - 2
        mapping.view[0] = 1
        assert free_huge_pages(HUGE) == before - 2
    assert free_huge_pages(HUGE) == before


def test_of_a_size_that_there_is_not_none_is_free() -> None:
    assert free_huge_pages(12345) == 0
