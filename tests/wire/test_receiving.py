"""Where the reader wants its bytes: scatter lists, views, addresses, and how far it reads ahead."""

from __future__ import annotations

import contextlib
import ctypes
import random
import socket

import pytest

from postcopyd.wire import stream_writer as writer
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import Message, Pages, Ping, RamSectionEnd, ZeroPages
from postcopyd.wire.stream_reader import StreamReader
from tests.wire.streams import (
    PAGE,
    RAM,
    SECTION_ID,
    VGA,
    Event,
    flat,
    page_content,
    put,
    until_pages,
)

UNIT = PAGE + 8


class Source:
    """A reader at its first page record, and what the source sends to it."""

    def __init__(self) -> None:
        self.ram = writer.StreamWriter(SECTION_ID)
        self.reader = StreamReader()
        list(self.reader.feed(until_pages(self.ram)))

    def pages(self, offsets: list[int], block: str = RAM.name) -> bytes:
        headers = self.ram.page_headers(block, offsets)
        return b"".join(
            header + page_content(offset // PAGE)
            for header, offset in zip(headers, offsets, strict=True)
        )

    def send(self, data: bytes) -> list[Message]:
        """Send what fits into one receive; all of it must."""
        assert put(self.reader, memoryview(data)) == len(data)
        return list(self.reader.received(len(data)))

    def warm_up(self) -> None:
        """Make the reader expect pages."""
        self.send(self.pages([0, PAGE]))

    def offered(self) -> int:
        return sum(map(len, self.reader.buffers()))


@pytest.fixture
def source() -> Source:
    return Source()


def batches(messages: list[Message]) -> list[Pages]:
    assert all(isinstance(message, Pages) for message in messages)
    return [message for message in messages if isinstance(message, Pages)]


def check_contents(batch: Pages) -> None:
    """The address, the stride and the view tell of the same memory, and it holds the pages."""
    for place, offset in enumerate(batch.offsets):
        content = ctypes.string_at(batch.address + place * batch.stride, PAGE)
        assert content == page_content(offset // PAGE) == bytes(batch.payload(place))
    assert ctypes.string_at(batch.address, len(batch.data)) == bytes(batch.data)
    assert batch.page_size == PAGE


@pytest.mark.parametrize(
    "pages",
    [range(100, 150), [7, 5, 90, 91, 3, 20, 40]],
    ids=["neighbours", "scattered"],
)
@pytest.mark.parametrize("most", [1, 3, 16, 64])
def test_the_parts_of_a_message_hold_its_pages_in_order(
    source: Source, pages: range | list[int], most: int
) -> None:
    source.warm_up()
    offsets = [page * PAGE for page in pages]
    (batch,) = batches(source.send(source.pages(offsets)))
    parts = list(batch.parts(most))
    assert [offset for part in parts for offset in part.offsets] == offsets
    assert max(map(len, parts)) == min(most, len(offsets))
    for part in parts:
        check_contents(part)
        assert isinstance(part.offsets, range) == isinstance(batch.offsets, range)


def test_expected_pages_land_side_by_side_and_neighbours_come_as_one_run(source: Source) -> None:
    source.warm_up()
    offsets = [(100 + place) * PAGE for place in range(100)]
    (batch,) = batches(source.send(source.pages(offsets)))
    assert batch.offsets == range(100 * PAGE, 200 * PAGE, PAGE)
    assert batch.stride == PAGE
    check_contents(batch)


def test_the_first_pages_are_handed_out_where_they_were_received(source: Source) -> None:
    offsets = [9 * PAGE, 4 * PAGE, 6 * PAGE]
    named, following = batches(source.send(source.pages(offsets)))
    assert [*named.offsets, *following.offsets] == offsets
    assert following.stride == UNIT
    check_contents(named)
    check_contents(following)


def test_pages_that_are_no_neighbours_come_as_one_batch_side_by_side(source: Source) -> None:
    source.warm_up()
    offsets = [place * PAGE for place in random.Random(3).sample(range(4000), 100)]
    (batch,) = batches(source.send(source.pages(offsets)))
    assert list(batch.offsets) == offsets
    assert batch.stride == PAGE
    check_contents(batch)


def test_a_jump_in_the_background_scan_gives_two_runs(source: Source) -> None:
    source.warm_up()
    offsets = [place * PAGE for place in (*range(50, 90), *range(700, 730))]
    first, second = batches(source.send(source.pages(offsets)))
    assert first.offsets == range(50 * PAGE, 90 * PAGE, PAGE)
    assert second.offsets == range(700 * PAGE, 730 * PAGE, PAGE)
    check_contents(first)
    check_contents(second)


def test_a_page_that_comes_twice_in_one_receive_comes_twice_in_order(source: Source) -> None:
    source.warm_up()
    header = writer.page_word(5 * PAGE, 0x28)
    (batch,) = batches(source.send(header + bytes(PAGE) + header + b"\1" * PAGE))
    assert list(batch.offsets) == [5 * PAGE, 5 * PAGE]
    assert [bytes(batch.payload(place))[0] for place in range(2)] == [0, 1]


def test_whole_pages_are_handed_out_as_they_come_and_a_part_waits(source: Source) -> None:
    source.warm_up()
    data = source.pages([place * PAGE for place in range(10, 14)])
    assert len(batches(source.send(data[: 2 * UNIT + 1000]))[0]) == 2
    assert source.send(data[2 * UNIT + 1000 : 3 * UNIT - 1]) == []
    (last,) = batches(source.send(data[3 * UNIT - 1 :]))
    assert last.offsets == range(12 * PAGE, 14 * PAGE, PAGE)
    check_contents(last)


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 12, PAGE, UNIT - 1])
def test_a_wrong_guess_loses_nothing(source: Source, cut: int) -> None:
    """A zero page, a page of another block and the end, where pages were expected."""
    source.warm_up()
    ram = source.ram
    data = source.pages([30 * PAGE, 31 * PAGE])
    data += ram.zero_page(RAM.name, 0) + source.pages([PAGE], VGA.name) + ram.ram_footer()
    data += writer.ping(99)
    events: list[Event] = []
    for start in range(0, len(data), cut):
        events += flat(source.send(data[start : start + cut]))
    assert events[-2:] == [RamSectionEnd("part"), Ping(99)]
    assert [event[:3] for event in events if isinstance(event, tuple)] == [
        ("page", RAM.name, 30 * PAGE),
        ("page", RAM.name, 31 * PAGE),
        ("zero", RAM.name, 0),
        ("page", VGA.name, PAGE),
    ]
    contents = [event[3] for event in events if isinstance(event, tuple) and event[0] == "page"]
    assert contents == [page_content(30), page_content(31), page_content(1)]


def test_the_end_of_a_section_is_told_at_once_where_a_page_was_expected(source: Source) -> None:
    source.warm_up()
    assert source.send(source.ram.ram_footer()) == [RamSectionEnd("part")]


def test_a_run_of_zero_pages_comes_as_ranges_of_at_most_256(source: Source) -> None:
    messages = source.send(source.ram.zero_pages(RAM.name, range(0, 600 * PAGE, PAGE)))
    assert all(isinstance(message, ZeroPages) for message in messages)
    offsets = [message.offsets for message in messages if isinstance(message, ZeroPages)]
    assert all(isinstance(part, range) and len(part) <= 256 for part in offsets)
    assert [offset for part in offsets for offset in part] == list(range(0, 600 * PAGE, PAGE))


@pytest.mark.parametrize("pages", [1, 16, 128])
def test_read_ahead_bounds_what_is_offered_in_both_ways_of_receiving(
    source: Source, pages: int
) -> None:
    source.reader.read_ahead_pages = pages
    assert source.offered() == min(pages * UNIT, 64 << 10)
    data = source.pages([0, PAGE])
    for start in range(0, len(data), 4000):
        source.send(data[start : start + 4000])
    assert source.offered() == pages * UNIT


def test_read_ahead_is_never_less_than_a_page_nor_more_than_the_layout(source: Source) -> None:
    source.warm_up()
    source.reader.read_ahead_pages = 0
    assert source.offered() == UNIT
    source.reader.read_ahead_pages = 1 << 30
    assert source.offered() == 128 * UNIT


def test_while_zero_pages_come_less_is_received_at_once(source: Source) -> None:
    source.send(source.ram.zero_pages(RAM.name, [0, PAGE, 2 * PAGE]))
    assert source.offered() == UNIT + 4 * 128 * 9


def test_after_a_wrong_guess_the_next_one_is_shorter_and_grows_again(source: Source) -> None:
    source.warm_up()
    assert source.offered() == 128 * UNIT
    source.send(
        source.pages([place * PAGE for place in range(6)]) + source.ram.zero_page(RAM.name, 0)
    )
    source.send(source.pages([PAGE, 2 * PAGE]))
    assert source.offered() == 6 * UNIT
    source.send(source.pages([place * PAGE for place in range(6)]))
    assert source.offered() == 12 * UNIT


@pytest.mark.parametrize("largest", [1 << 20, 60_000, 3000])
def test_a_real_socket_fills_the_scatter_list(source: Source, largest: int) -> None:
    numbers = random.Random(largest)
    offsets = [place * PAGE for place in range(300)]
    data = source.pages(offsets)
    events: list[Event] = []
    here, there = socket.socketpair()
    with here, there:
        there.setblocking(False)
        here.settimeout(10)
        sent = 0
        while sent < len(data) or len(events) < len(offsets):
            if sent < len(data):
                with contextlib.suppress(BlockingIOError):
                    sent += there.send(data[sent : sent + numbers.randint(1, largest)])
            count = here.recvmsg_into(source.reader.buffers())[0]
            events += flat(source.reader.received(count))
    assert events == [
        ("page", RAM.name, offset, page_content(offset // PAGE)) for offset in offsets
    ]


def test_messages_in_front_of_a_mistake_are_delivered_before_it_is_raised(source: Source) -> None:
    """A package must not be lost to a mistake behind it: its source cannot take the guest back."""
    data = source.ram.ram_footer() + writer.package(b"") + b"\x55"
    assert put(source.reader, memoryview(data)) == len(data)
    came: list[Message] = []
    with pytest.raises(ProtocolError, match="section type 0x55"):
        came.extend(source.reader.received(len(data)))
    # list.extend keeps what came before the exception.
    assert [type(message).__name__ for message in came] == ["RamSectionEnd", "Package"]
    with pytest.raises(ProtocolError, match="section type 0x55"):
        source.reader.received(1)
    with pytest.raises(ProtocolError, match="section type 0x55"):
        source.reader.connection_lost()


@pytest.mark.parametrize(
    ("cut", "where"),
    [
        (0, "the stream header"),
        (5, "the stream header"),
        (10, "the configuration"),
        (30, "the configuration"),
    ],
)
def test_a_stream_that_stops_early_is_named_by_where_it_stops(cut: int, where: str) -> None:
    reader = StreamReader()
    list(reader.feed(writer.configuration("pc-q35-7.2-and-more")[:cut]))
    with pytest.raises(ProtocolError, match=f"stops in the middle of {where}"):
        reader.connection_lost()


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"", "without having ended"),
        (b"\x08\x00", "in the middle of a command"),
        (b"\x08\x00\x02\x00\x04\0", "in the middle of the command PING"),
        (writer.package(bytes(1000))[:500], "in the middle of the device package of 1019 bytes"),
        (b"\x01\0\0", "in the middle of the head of a section"),
        (b"\x02\0\0\0\2\0", r"in the middle of section 2 'ram' \(PART\)"),
    ],
)
def test_a_stream_that_stops_later_is_named_by_where_it_stops(
    source: Source, data: bytes, where: str
) -> None:
    list(source.reader.feed(source.ram.ram_footer() + data))
    with pytest.raises(ProtocolError, match=where):
        source.reader.connection_lost()
