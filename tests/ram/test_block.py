"""RAM blocks and the table that finds them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.ram.block import BlockTable, RamBlock

PAGE = 4096
HUGE = 2 << 20


def block(
    name: str, address: int, pages: int = 4, page_size: int = PAGE, index: int = 0
) -> RamBlock:
    return RamBlock(name, pages * page_size, page_size, address, index)


@pytest.mark.parametrize(
    ("length", "page_size", "address", "complaint"),
    [
        (PAGE, 3000, PAGE, "page size 3000 is not a power of two"),
        (PAGE + 1, PAGE, PAGE, "length 0x1001"),
        (0, PAGE, PAGE, "length 0x0"),
        (PAGE, PAGE, PAGE + 8, "address 0x1008"),
        (PAGE, HUGE, HUGE, "length 0x1000"),
        (HUGE, HUGE, PAGE, "address 0x1000"),
    ],
)
def test_a_block_of_parts_of_pages_is_refused_by_name(
    length: int, page_size: int, address: int, complaint: str
) -> None:
    with pytest.raises(ValueError, match=r"'pc\.ram'") as refusal:
        RamBlock("pc.ram", length, page_size, address, 0)
    assert complaint in str(refusal.value)


def test_two_blocks_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two blocks have the name 'a'"):
        BlockTable([block("a", PAGE), block("a", 64 * PAGE)])


def test_overlapping_blocks_are_refused_and_both_named() -> None:
    with pytest.raises(ValueError, match="'a' and 'b' overlap"):
        BlockTable([block("b", 3 * PAGE), block("a", PAGE)])


def test_neighbouring_blocks_do_not_overlap() -> None:
    table = BlockTable([block("a", PAGE), block("b", 5 * PAGE, index=1)])
    assert [entry.name for entry in table] == ["a", "b"]


def test_page_sizes_are_the_or_of_all_blocks() -> None:
    table = BlockTable([block("a", PAGE), block("h", HUGE, 1, HUGE, 1)])
    assert table.page_sizes == 0x201000


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 3)), min_size=1, max_size=12),
    st.integers(0, 200 * PAGE),
)
def test_an_address_is_found_in_its_block_and_nowhere_else(
    layout: list[tuple[int, int]], address: int
) -> None:
    blocks = []
    place = PAGE
    for index, (pages, gap) in enumerate(layout):
        place += gap * PAGE
        blocks.append(block(f"b{index}", place, pages, index=index))
        place += pages * PAGE
    table = BlockTable(list(reversed(blocks)))
    expected = [entry for entry in blocks if entry.address <= address < entry.end]
    found = table.block_at(address)
    assert ([found] if found else []) == expected
