"""Which pages are asked for around a fault."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.incoming.fault_around import FaultAround, missing_runs
from postcopyd.ram.block import BlockTable, RamBlock
from postcopyd.ram.page_map import PageMap

PAGE = 4096
PAGES = 1000
BLOCK = RamBlock("pc.ram", PAGES * PAGE, PAGE, 1 << 30, 0)
OTHER = RamBlock("more", PAGES * PAGE, PAGE, 1 << 31, 1)
SOON = 1_000_000
"""Nanoseconds between two faults of a guest that goes from page to page."""
LATER = 1_000_000_000


def faults(*pages: int, step: int = SOON, block: RamBlock = BLOCK) -> list[list[int]]:
    """What is asked for by faults on these pages, one after the other."""
    around = FaultAround()
    return [list(around.window(block, page, number * step)) for number, page in enumerate(pages, 1)]


def test_a_fault_alone_asks_for_its_page_alone() -> None:
    assert faults(500) == [[500]]


def test_faults_spread_over_the_memory_ask_for_their_pages_alone() -> None:
    assert faults(0, 300, 600, 900) == [[0], [300], [600], [900]]


def test_a_fault_close_to_the_last_asks_for_the_pages_around_it_and_each_next_for_more() -> None:
    assert [len(asked) for asked in faults(500, 490, 480, 470, 460)] == [1, 4, 8, 16, 16]


def test_a_window_is_aligned_so_that_neighbours_share_it() -> None:
    assert faults(10, 21)[-1] == faults(10, 22)[-1] == [20, 21, 22, 23]


def test_faults_in_several_places_in_turn_are_each_close_to_their_own() -> None:
    assert [len(asked) for asked in faults(0, 900, 1, 901, 2, 902)] == [1, 1, 4, 4, 8, 8]


def test_the_same_pages_of_another_block_are_not_close() -> None:
    around = FaultAround()
    around.window(BLOCK, 500, SOON)
    assert list(around.window(OTHER, 501, 2 * SOON)) == [501]


def test_what_was_long_ago_is_not_close() -> None:
    assert faults(500, 501, 502, step=LATER) == [[500], [501], [502]]


def test_a_window_ends_with_its_block() -> None:
    block = RamBlock("rom", 6 * PAGE, PAGE, 1 << 30, 0)
    assert faults(0, 5, block=block)[-1] == [4, 5]


def test_huge_pages_are_asked_for_one_by_one() -> None:
    block = RamBlock("huge", 64 << 20, 2 << 20, 1 << 30, 0)
    assert faults(1, 2, 3, block=block) == [[1], [2], [3]]


@given(st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(0, 30_000_000)), max_size=60))
def test_every_window_holds_its_page_stays_in_the_block_and_is_no_longer_than_a_round_trip(
    history: list[tuple[int, int]],
) -> None:
    around = FaultAround()
    now = 0
    for page, passed in history:
        now += passed
        window = around.window(BLOCK, page, now)
        assert page in window
        assert 0 <= window.start < window.stop <= PAGES
        assert len(window) <= 16


def test_only_so_many_places_are_remembered() -> None:
    big = RamBlock("big", 1 << 40, PAGE, 1 << 40, 0)
    around = FaultAround()
    for place in range(300):
        around.window(big, place * 1000, SOON)
    assert len(around.window(big, 1, SOON)) == 1  # the first place is forgotten
    assert len(around.window(big, 299 * 1000 + 1, SOON)) == 4


@pytest.fixture(scope="module")
def page_map() -> Iterator[PageMap]:
    found = PageMap(BlockTable([BLOCK]))
    yield found
    found.close()


@given(
    st.sets(st.integers(0, 63)), st.sets(st.integers(0, 63)), st.integers(0, 63), st.integers(1, 20)
)
def test_only_what_is_neither_here_nor_asked_for_is_missing(
    page_map: PageMap, received: set[int], requested: set[int], first: int, length: int
) -> None:
    maps = page_map[0]
    maps.received.setall(0)
    maps.requested.setall(0)
    for page in received:
        maps.received[page] = 1
    for page in requested:
        maps.requested[page] = 1
    window = range(first, first + length)
    runs = list(missing_runs(maps, window))
    assert [page for run in runs for page in run] == [
        page for page in window if page not in received | requested
    ]
    assert all(one.stop < other.start for one, other in pairwise(runs))
