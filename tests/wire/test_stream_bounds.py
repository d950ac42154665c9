"""What a source can make the reader allocate, and how long it can keep it busy."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable

import pytest

from postcopyd.wire import stream_writer as writer
from postcopyd.wire.messages import BlockEntry, Discard, Message
from postcopyd.wire.stream_reader import StreamLimits, StreamReader
from tests.wire.streams import PAGE, RAM, SECTION_ID, VGA, head, put, receive, until_pages

MESSAGES = 12 << 20
"""What the messages of one `received` may take, as the reader's docstring says."""
FIXED = 1 << 20
"""The reader itself, without the memory maps that tracemalloc does not see."""


def peak(data: bytes, reader: Callable[[], StreamReader] = StreamReader) -> int:
    """Most memory that was allocated at once while `data` was read, in receives as they fit."""
    rest = memoryview(data)
    tracemalloc.start()
    try:
        one = reader()
        while rest:
            count = put(one, rest)
            rest = rest[count:]
            list(one.received(count))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def alternating() -> bytes:
    """The shortest records that do not join: zero pages of two blocks."""
    ram = writer.StreamWriter(SECTION_ID)
    data = until_pages(ram)
    pair = ram.zero_page(RAM.name, 0) + ram.zero_page(VGA.name, 0)
    return data + pair * 40_000


def one_by_one_behind_a_guess() -> bytes:
    """As much as can be received at once: pages were expected, short records come."""
    ram = writer.StreamWriter(SECTION_ID)
    data = until_pages(ram)
    data += b"".join(header + bytes(PAGE) for header in ram.page_headers(RAM.name, [0, PAGE]))
    data += ram.ram_footer() + (ram.ram_part() + ram.ram_footer()) * 40_000
    return data


SHORT: dict[str, Callable[[], bytes]] = {
    "zero pages of two blocks": alternating,
    "zero pages at random": lambda: (
        until_pages(ram := writer.StreamWriter(SECTION_ID))
        + ram.zero_pages(RAM.name, [place * 7919 % 16384 * PAGE for place in range(100_000)])
    ),
    "pings": lambda: head() + writer.ping(1 << 31) * 60_000,
    "openings of the return path": lambda: head() + writer.open_return_path() * 110_000,
    "empty sections behind a guess": one_by_one_behind_a_guess,
    "discards": lambda: (
        until_pages(ram := writer.StreamWriter(SECTION_ID))
        + ram.ram_footer()
        + writer.discard(VGA.name, [(0, PAGE)] * 12) * 3000
    ),
}


@pytest.mark.parametrize("case", SHORT)
def test_short_messages_take_bounded_memory(case: str) -> None:
    assert peak(SHORT[case]()) < MESSAGES + FIXED


def test_a_full_scatter_list_of_zero_pages_takes_bounded_memory() -> None:
    """The most that one receive can bring: 128 pages were expected, short records come."""
    ram = writer.StreamWriter(SECTION_ID)
    reader = StreamReader()
    blocks = [BlockEntry("a", 1 << 40, PAGE), BlockEntry("b", 1 << 40, PAGE)]
    data = head(PAGE) + ram.ram_start(blocks) + ram.ram_part()
    data += b"".join(header + bytes(PAGE) for header in ram.page_headers("a", [0, PAGE]))
    list(reader.feed(data))
    room = sum(map(len, reader.buffers()))
    assert room == 128 * (PAGE + 8)
    offset = 1 << 39
    zeros = (ram.zero_page("b", offset) + ram.zero_page("a", offset)) * (room // 22)
    tracemalloc.start()
    try:
        count = put(reader, memoryview(zeros))
        messages = list(reader.received(count))
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count > room - 22
    assert len(messages) == count // 11
    assert used < MESSAGES + FIXED


def test_a_package_takes_memory_only_as_far_as_it_has_come() -> None:
    promised = head() + writer.package(bytes(8 << 20))[:9]
    assert peak(promised + bytes(100_000)) < FIXED


def test_a_package_is_held_twice_at_most() -> None:
    size = 8 << 20
    section = writer.device_section(1, "cpu", bytes(size - 100))
    assert peak(head() + writer.package(section)) < 2.3 * size + FIXED


def test_a_description_behind_the_end_is_dropped_as_it_comes() -> None:
    data = head() + writer.END_OF_STREAM + writer.vm_description(bytes(8 << 20))
    assert peak(data) < FIXED


def test_a_block_list_is_bounded_by_its_limit() -> None:
    names = [b"%0254d" % number for number in range(100)]
    listed = b"".join(b"\xfe" + name + struct.pack(">Q", PAGE) for name in names)
    data = head() + b"\x01\0\0\0\2\x03ram" + struct.pack(">II", 0, 4)
    data += writer.page_word(1 << 50, 0x04) + listed
    assert peak(data, lambda: StreamReader(StreamLimits(blocks=100))) < FIXED


def test_a_command_that_comes_byte_by_byte_is_read() -> None:
    reader = StreamReader()
    list(reader.feed(until_pages() + writer.StreamWriter(SECTION_ID).ram_footer()))
    payload = b"\0\x06pc.ram\0" + struct.pack(">QQ", 0, PAGE) * 4094
    data = struct.pack(">BHH", 8, 6, len(payload)) + payload
    messages: list[Message] = []
    for start in range(len(data)):
        assert put(reader, memoryview(data)[start : start + 1]) == 1
        messages += reader.received(1)
    assert messages == [Discard(RAM.name, ((0, PAGE),) * 4094)]


def test_a_mistake_is_placed_right_after_the_buffer_was_moved() -> None:
    """Commands that are cut at each receive leave a tail behind, again and again."""
    reader = StreamReader()
    begin = until_pages() + writer.StreamWriter(SECTION_ID).ram_footer()
    list(reader.feed(begin))
    payload = b"\0\x06pc.ram\0" + struct.pack(">QQ", 0, PAGE) * 4000
    data = (struct.pack(">BHH", 8, 6, len(payload)) + payload) * 40
    outcome = receive(reader, data + b"\x09", [60_001] * 100)
    assert outcome.events == [Discard(RAM.name, ((0, PAGE),) * 4000)] * 40
    assert outcome.error is not None
    assert outcome.error.position == len(begin) + len(data)
    assert reader.position == len(begin) + len(data)
