"""What is still to be sent after a break, made of what the destination says that it has."""

from __future__ import annotations

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.outgoing.recovery import Recovery, missing_pages
from postcopyd.outgoing.schedule import SendSchedule
from postcopyd.ram.block import BlockTable, RamBlock
from postcopyd.ram.page_map import PageMap, received_bitmap
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import BlockEntry
from postcopyd.wire.return_path import ReceivedBitmap, ReturnPathReader, ReturnPathWriter

PAGE = 4096
SIZES = (PAGE, 4 * PAGE, 2 << 20)


def test_all_blocks_are_asked_about_at_once() -> None:
    blocks = [BlockEntry("pc.ram", 8 * PAGE, PAGE), BlockEntry("rom", PAGE, PAGE)]
    assert Recovery(blocks).requests() == (
        bytes.fromhex("08 000a 0007 06") + b"pc.ram" + bytes.fromhex("08 000a 0004 03") + b"rom"
    )


def test_answers_may_come_in_any_order_and_each_once() -> None:
    blocks = [BlockEntry("a", 3 * PAGE, PAGE), BlockEntry("b", 2 * PAGE, PAGE)]
    recovery = Recovery(blocks)
    recovery.take("b", b"\1" + bytes(7))
    assert not recovery.complete
    recovery.take("a", b"\5" + bytes(7))
    assert recovery.complete
    assert recovery.missing() == [bitarray("010"), bitarray("01")]
    with pytest.raises(ProtocolError, match="a second received bitmap of block 'a'"):
        recovery.take("a", bytes(8))


def test_a_host_page_of_which_any_part_is_missing_is_sent_as_a_whole() -> None:
    block = BlockEntry("a", 3 * 4 * PAGE, 4 * PAGE)
    # Target pages, from the right: all four, three of four, none.
    assert missing_pages(block, (0b0000_0111_1111).to_bytes(8, "little")) == bitarray("011")


@st.composite
def received(draw: st.DrawFn) -> list[tuple[int, list[bool]]]:
    """For each block its host page size, and which host pages are here."""
    block = st.tuples(st.sampled_from(SIZES), st.lists(st.booleans(), min_size=1, max_size=80))
    return draw(st.lists(block, min_size=1, max_size=3))


def blocks_of(here: list[tuple[int, list[bool]]]) -> list[BlockEntry]:
    return [BlockEntry(f"b{n}", len(pages) * size, size) for n, (size, pages) in enumerate(here)]


@given(received(), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 79)), max_size=30))
def test_exactly_what_the_destination_has_not_got_is_sent_once_whatever_it_asks_for(
    here: list[tuple[int, list[bool]]], requests: list[tuple[int, int]]
) -> None:
    blocks = blocks_of(here)
    answers = b""
    for block, (size, pages) in zip(blocks, here, strict=True):
        bits = bitarray(endian="little")
        for is_here in pages:
            bits.extend([is_here] * (size // PAGE))
        bitmap = bits.tobytes()
        answers += ReturnPathWriter().received_bitmap(block.name, bitmap + bytes(-len(bitmap) % 8))

    recovery = Recovery(blocks)
    for message in ReturnPathReader(blocks).feed(answers):
        assert isinstance(message, ReceivedBitmap)
        recovery.take(message.block, message.bitmap)
    schedule = SendSchedule(recovery.missing(), [size for size, _ in here])

    for number, page in requests:
        if number < len(here) and page < len(here[number][1]):
            schedule.request(number, page)
    sent: list[tuple[int, int]] = []
    while run := schedule.take_requested() or schedule.take_scanned(3 * PAGE):
        sent += [(run.block, page) for page in range(run.first, run.first + run.pages)]
    assert sorted(sent) == [
        (number, page)
        for number, (_, pages) in enumerate(here)
        for page, is_here in enumerate(pages)
        if not is_here
    ]


@given(received())
def test_it_is_the_opposite_of_what_our_own_destination_says(
    here: list[tuple[int, list[bool]]],
) -> None:
    table = BlockTable(
        [
            RamBlock(block.name, block.length, block.page_size, (number + 1) << 40, number)
            for number, block in enumerate(blocks_of(here))
        ]
    )
    page_map = PageMap(table)
    for number, (block, (_, pages)) in enumerate(zip(table, here, strict=True)):
        page_map[number].received[: len(pages)] = bitarray(pages)
        entry = BlockEntry(block.name, block.length, block.page_size)
        missing = missing_pages(entry, received_bitmap(block, page_map[number], PAGE))
        assert missing == ~bitarray(pages)
    page_map.close()
