"""The page map: a memory file that a successor process reads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.ram.block import BlockTable, RamBlock
from postcopyd.ram.page_map import PageMap, received_bitmap

PAGE = 4096
HUGE = 2 << 20


def table(*pages: int) -> BlockTable:
    blocks = []
    address = PAGE
    for index, count in enumerate(pages):
        blocks.append(RamBlock(f"b{index}", count * PAGE, PAGE, address, index))
        address += count * PAGE
    return BlockTable(blocks)


def test_a_new_map_has_every_bit_clear() -> None:
    page_map = PageMap(table(3, 65))
    for maps in (page_map[0], page_map[1]):
        for bits in (maps.received, maps.requested, maps.staged, maps.zero):
            assert not bits.any()
    page_map.close()


def test_a_successor_process_finds_the_bits_by_the_descriptor_alone() -> None:
    blocks = table(3, 100)
    page_map = PageMap(blocks)
    page_map[1].received[97:100] = 1
    page_map[0].zero[2] = 1
    successor = """
import sys
from postcopyd.ram.block import BlockTable, RamBlock
from postcopyd.ram.page_map import PageMap
blocks = BlockTable([RamBlock("b0", 3 * 4096, 4096, 4096, 0),
                     RamBlock("b1", 100 * 4096, 4096, 4 * 4096, 1)])
page_map = PageMap(blocks, int(sys.argv[1]))
assert page_map[1].received.find(1) == 97 and page_map[1].received.count() == 3
assert page_map[0].zero[2] and not page_map[0].received.any()
page_map[1].requested[5] = 1
"""
    subprocess.run(
        [sys.executable, "-c", successor, str(page_map.descriptor)],
        pass_fds=[page_map.descriptor],
        check=True,
        timeout=30,
    )
    assert page_map[1].requested[5] == 1
    page_map.close()


def test_a_map_of_another_size_is_refused_and_its_descriptor_released() -> None:
    page_map = PageMap(table(3))
    other = os.dup(page_map.descriptor)
    with pytest.raises(ValueError, match=r"page map has 32 bytes, the blocks need 64"):
        PageMap(table(3, 3), other)
    with pytest.raises(OSError):
        os.fstat(other)
    page_map.close()


def test_closing_twice_is_harmless() -> None:
    page_map = PageMap(table(3))
    descriptor = page_map.descriptor
    page_map.close()
    page_map.close()
    with pytest.raises(OSError):
        os.fstat(descriptor)


@given(st.integers(1, 200), st.sets(st.integers(0, 199)))
def test_the_received_bitmap_has_one_bit_a_page_in_whole_words(
    pages: int, received: set[int]
) -> None:
    blocks = table(pages)
    page_map = PageMap(blocks)
    members = {page for page in received if page < pages}
    for page in members:
        page_map[0].received[page] = 1
    bitmap = received_bitmap(blocks[0], page_map[0], PAGE)
    page_map.close()
    assert len(bitmap) == (pages + 63) // 64 * 8
    bits = bitarray(endian="little")
    bits.frombytes(bitmap)
    assert {place for place, bit in enumerate(bits) if bit} == members


def test_all_bits_of_a_received_huge_page_are_set_in_the_bitmap() -> None:
    blocks = BlockTable([RamBlock("huge", 3 * HUGE, HUGE, HUGE, 0)])
    page_map = PageMap(blocks)
    page_map[0].received[1] = 1
    bitmap = received_bitmap(blocks[0], page_map[0], PAGE)
    page_map.close()
    assert bitmap == bytes(64) + b"\xff" * 64 + bytes(64)
