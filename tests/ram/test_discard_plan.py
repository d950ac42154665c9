"""The source's discard plan."""

from __future__ import annotations

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.ram.discard_plan import discard_plan

PAGE = 4096
HUGE = 2 << 20


def test_a_clean_block_gets_no_command() -> None:
    assert list(discard_plan(bitarray(64), PAGE)) == []


@pytest.mark.parametrize("page_size", [PAGE, HUGE])
def test_a_block_never_sent_is_one_range_from_end_to_end(page_size: int) -> None:
    dirty = bitarray(100)
    dirty.setall(1)
    assert list(discard_plan(dirty, page_size)) == [((0, 100 * page_size),)]


def test_64_lone_pages_are_five_commands_of_12_and_one_of_4() -> None:
    # What real sources sent for 64 dirty pages: five of 12 ranges, one of 4 (qemu-wire, 2).
    commands = list(discard_plan(bitarray("10" * 64), PAGE))
    assert [len(command) for command in commands] == [12, 12, 12, 12, 12, 4]
    assert commands[1][0] == (24 * PAGE, PAGE)


def test_twelve_ranges_are_one_command_and_nothing_behind_it() -> None:
    assert [len(command) for command in discard_plan(bitarray("10" * 12), PAGE)] == [12]


def test_ranges_of_a_huge_page_block_are_whole_huge_pages() -> None:
    assert list(discard_plan(bitarray("0110001"), HUGE)) == [((HUGE, 2 * HUGE), (6 * HUGE, HUGE))]


@given(st.lists(st.booleans(), min_size=1, max_size=400), st.sampled_from([PAGE, HUGE]))
def test_exactly_the_dirty_pages_are_forgotten_in_as_few_ranges_as_can_be(
    pages: list[bool], page_size: int
) -> None:
    forgotten = [False] * len(pages)
    last_end = -1
    for command in discard_plan(bitarray(pages), page_size):
        assert 1 <= len(command) <= 12
        for start, length in command:
            assert start % page_size == 0
            assert length % page_size == 0
            assert start > last_end, "two ranges touch: they should have been one"
            last_end = start + length
            for page in range(start // page_size, last_end // page_size):
                forgotten[page] = True
    assert forgotten == pages
