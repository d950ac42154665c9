"""Which pages are asked for around a fault."""

from __future__ import annotations

import random
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
BIG = RamBlock("big", 1 << 40, PAGE, 1 << 40, 2)


def faults(*pages: int, block: RamBlock = BLOCK) -> list[list[int]]:
    """What is asked for by faults on these pages, one after the other."""
    around = FaultAround()
    return [list(around.window(block, page)) for page in pages]


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
    around.window(BLOCK, 500)
    assert list(around.window(OTHER, 501)) == [501]


@pytest.mark.parametrize(("others", "length"), [(15, 4), (16, 1)])
def test_a_fault_is_close_as_long_as_few_others_were_in_between(others: int, length: int) -> None:
    around = FaultAround()
    around.window(BIG, 0)
    for place in range(1, others + 1):
        around.window(BIG, place * 1000)
    assert len(around.window(BIG, 1)) == length


def test_faults_at_random_over_a_big_memory_are_hardly_ever_close() -> None:
    around = FaultAround()
    chance = random.Random(5)
    asked = [len(around.window(BIG, chance.randrange(300 << 8))) for _ in range(2000)]
    assert asked.count(1) > 1900


def test_a_window_ends_with_its_block() -> None:
    block = RamBlock("rom", 6 * PAGE, PAGE, 1 << 30, 0)
    assert faults(0, 5, block=block)[-1] == [4, 5]


def test_huge_pages_are_asked_for_one_by_one() -> None:
    block = RamBlock("huge", 64 << 20, 2 << 20, 1 << 30, 0)
    assert faults(1, 2, 3, block=block) == [[1], [2], [3]]


@given(st.lists(st.integers(0, PAGES - 1), max_size=60))
def test_every_window_holds_its_page_and_stays_short_and_inside_the_block(
    pages: list[int],
) -> None:
    for page, asked in zip(pages, faults(*pages), strict=True):
        assert page in asked
        assert asked == list(range(asked[0], asked[-1] + 1))
        assert 0 <= asked[0] <= asked[-1] < PAGES
        assert len(asked) <= 16


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
