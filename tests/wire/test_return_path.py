"""The return path: exact bytes, any split, and everything that must be refused."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import BlockEntry
from postcopyd.wire.return_path import (
    PageRequest,
    Pong,
    ReceivedBitmap,
    ResumeAck,
    ReturnMessage,
    ReturnPathReader,
    ReturnPathWriter,
    Shut,
    SwitchoverAck,
)
from tests.wire.streams import BIG, BLOCKS, HUGE, PAGE, RAM, VGA


def test_requests_have_the_bytes_that_real_destinations_send() -> None:
    writer = ReturnPathWriter()
    first = writer.request_pages("pc.ram", 0xF00000, PAGE)
    assert first == bytes.fromhex("0003 0013 0000000000f00000 00001000 06") + b"pc.ram"
    second = writer.request_pages("pc.ram", 0xE01000, PAGE)
    assert second == bytes.fromhex("0004 000c 0000000000e01000 00001000")


def test_the_other_messages_have_the_bytes_of_the_captured_return_path() -> None:
    writer = ReturnPathWriter()
    said = b"".join(map(writer.pong, (1, 2, 3, 4))) + writer.shut(0)
    assert said == bytes.fromhex(
        "0002 0004 00000001 0002 0004 00000002 0002 0004 00000003 0002 0004 00000004"
        "0001 0004 00000000"
    )
    assert writer.resume_ack() == bytes.fromhex("0006 0004 00000001")
    assert writer.switchover_ack() == bytes.fromhex("0007 0000")
    assert writer.received_bitmap("a", b"\1" + bytes(7)) == bytes.fromhex(
        "0005 0002 01 61 0000000000000008 0100000000000000 0123456789abcdef"
    )


def test_the_block_is_named_first_after_another_one_and_on_a_new_connection() -> None:
    writer = ReturnPathWriter()
    kinds = []
    for block in ("a", "a", "b", "a", None, "a", "a"):
        if block is None:
            writer.new_connection()
        else:
            kinds.append(writer.request_pages(block, 0, PAGE)[1])
    assert kinds == [3, 4, 3, 3, 3, 4]


@pytest.mark.parametrize(
    "make",
    [
        lambda writer: writer.pong(1 << 32),
        lambda writer: writer.shut(-1),
        lambda writer: writer.request_pages("a", 1 << 64, PAGE),
        lambda writer: writer.request_pages("", 0, PAGE),
        lambda writer: writer.request_pages("a" * 256, 0, PAGE),
        lambda writer: writer.received_bitmap("a", bytes(7)),
    ],
)
def test_what_does_not_fit_is_refused_and_does_not_count_as_named(
    make: Callable[[ReturnPathWriter], bytes],
) -> None:
    writer = ReturnPathWriter()
    with pytest.raises(ValueError, match=r"fit|must have|whole 8 bytes"):
        make(writer)
    assert writer.request_pages("a", 0, PAGE)[1] == 3


def bitmap_of(block: BlockEntry, seed: int) -> bytes:
    pages = block.length // PAGE
    bits = (seed * 0x9E3779B97F4A7C15) & ((1 << pages) - 1)
    return bits.to_bytes((pages + 63) // 64 * 8, "little")


blocks = st.sampled_from(BLOCKS)
messages = st.one_of(
    st.builds(Shut, st.integers(0, 0xFFFFFFFF)),
    st.builds(Pong, st.integers(0, 0xFFFFFFFF)),
    st.builds(ResumeAck),
    st.builds(SwitchoverAck),
    st.builds(
        lambda block, page: PageRequest(
            block.name, page % (block.length // block.page_size) * block.page_size, block.page_size
        ),
        blocks,
        st.integers(0, 1 << 20),
    ),
    st.builds(
        lambda block, seed: ReceivedBitmap(block.name, bitmap_of(block, seed)),
        blocks,
        st.integers(0, 1 << 30),
    ),
)


def encode(writer: ReturnPathWriter, message: ReturnMessage) -> bytes:
    match message:
        case Shut(status):
            return writer.shut(status)
        case Pong(value):
            return writer.pong(value)
        case ResumeAck():
            return writer.resume_ack()
        case SwitchoverAck():
            return writer.switchover_ack()
        case PageRequest(block, offset, length):
            return writer.request_pages(block, offset, length)
        case ReceivedBitmap(block, bitmap):
            return writer.received_bitmap(block, bitmap)


@settings(deadline=None)
@given(st.lists(messages, max_size=20), st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_what_is_written_is_read_however_it_is_split(
    said: list[ReturnMessage], sizes: list[int]
) -> None:
    writer = ReturnPathWriter()
    data = b"".join(encode(writer, message) for message in said)
    reader = ReturnPathReader(BLOCKS)
    read: list[ReturnMessage] = []
    start = turn = 0
    while start < len(data):
        size = sizes[turn % len(sizes)]
        read += reader.feed(data[start : start + size])
        start, turn = start + size, turn + 1
    assert read == said
    reader.connection_lost()


def request(offset: int, length: int, name: bytes = b"\x06pc.ram") -> bytes:
    return struct.pack(">HHQI", 3, 12 + len(name), offset, length) + name


def bitmap(size: int, content: bytes, end: int = 0x0123456789ABCDEF) -> bytes:
    return b"\0\5\0\x09\x08vga.vram" + struct.pack(">Q", size) + content + struct.pack(">Q", end)


WRONG = {
    "type 0": (b"\0\0\0\0", "unknown return path message 0"),
    "type 8": (b"\0\x08\0\0", "unknown return path message 8"),
    "PONG too long": (b"\0\2\0\5", "PONG has 5 bytes, it must have 4"),
    "SHUT too short": (b"\0\1\0\3", "SHUT has 3 bytes, it must have 4"),
    "REQ_PAGES with a name": (b"\0\4\0\x13", "REQ_PAGES has 19 bytes, it must have 12"),
    "SWITCHOVER_ACK with payload": (b"\0\7\0\1", "SWITCHOVER_ACK has 1 bytes"),
    "more than 512 bytes": (b"\0\3\2\1", "REQ_PAGES_ID has 513 bytes, more than 512"),
    "REQ_PAGES first": (struct.pack(">HHQI", 4, 12, 0, PAGE), "before a REQ_PAGES_ID"),
    "request without name": (struct.pack(">HHQI", 3, 12, 0, PAGE), "does not fill its message"),
    "request shorter than its numbers": (b"\0\3\0\3abc", "does not fill its message"),
    "name longer than the message": (request(0, PAGE, b"\x09pc.ram"), "does not fill"),
    "name shorter than the message": (request(0, PAGE, b"\x02pc.ram"), "does not fill"),
    "unknown block": (request(0, PAGE, b"\x02no"), "RAM block 'no', which is not being migrated"),
    "name not UTF-8": (request(0, PAGE, b"\x01\xff"), "not UTF-8"),
    "offset not aligned": (request(1, PAGE), "not whole host pages of 0x1000"),
    "length not aligned": (request(0, 1), "not whole host pages of 0x1000"),
    "length 0": (request(0, 0), "not whole host pages of 0x1000"),
    "part of a huge page": (request(0, PAGE, b"\x03big"), "not whole host pages of 0x200000"),
    "huge page not aligned": (request(PAGE, HUGE, b"\x03big"), "not whole host pages"),
    "beyond the block": (request(RAM.length, PAGE), "is beyond its length 0x4000000"),
    "end beyond the block": (request(RAM.length - PAGE, 2 * PAGE), "is beyond its length"),
    "overflow": (request((1 << 64) - PAGE, PAGE), "is beyond its length"),
    "bitmap of an unknown block": (b"\0\5\0\3\x02no", "not being migrated"),
    "bitmap without a name": (b"\0\5\0\0", "does not fill its message"),
    "bitmap too long": (bitmap(16, bytes(16)), "has 16 bytes, not 8"),
    "bitmap too short": (bitmap(0, b""), "has 0 bytes, not 8"),
    "bitmap of exabytes": (bitmap((1 << 64) - 1, b""), "has 18446744073709551615 bytes, not 8"),
    "bitmap end marker": (bitmap(8, bytes(8), 1), "does not end with its marker"),
    "bits behind the block": (bitmap(8, bytes((0, 0, 1)) + bytes(5)), "bits behind the block"),
    "RESUME_ACK 0": (struct.pack(">HHI", 6, 4, 0), "RESUME_ACK says 0, it must say 1"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_a_wrong_message_is_refused_by_name_behind_the_right_ones(case: str, step: int) -> None:
    data, why = WRONG[case]
    data = ReturnPathWriter().pong(7) + data
    reader = ReturnPathReader(BLOCKS)
    came: list[ReturnMessage] = []
    with pytest.raises(ProtocolError, match=why) as refusal:
        for start in range(0, len(data), step):
            came.extend(reader.feed(data[start : start + step]))
    assert came == [Pong(7)]
    assert refusal.value.position == 8
    with pytest.raises(ProtocolError, match=why):
        reader.feed(b"")


def test_a_full_bitmap_of_a_block_of_few_pages_is_accepted() -> None:
    reader = ReturnPathReader(BLOCKS)
    (message,) = reader.feed(bitmap(8, b"\xff\xff" + bytes(6)))
    assert message == ReceivedBitmap(VGA.name, b"\xff\xff" + bytes(6))


def test_a_return_path_that_stops_in_the_middle_is_told() -> None:
    reader = ReturnPathReader(BLOCKS)
    assert list(reader.feed(ReturnPathWriter().pong(1) + b"\0\2\0")) == [Pong(1)]
    with pytest.raises(ProtocolError, match=r"at byte 8: .* 3 bytes into it"):
        reader.connection_lost()


def test_a_new_connection_forgets_half_a_message_the_block_and_a_mistake() -> None:
    reader = ReturnPathReader(BLOCKS)
    writer = ReturnPathWriter()
    reader.feed(writer.request_pages(BIG.name, 0, HUGE) + b"\0\2")
    reader.new_connection()
    with pytest.raises(ProtocolError, match="before a REQ_PAGES_ID"):
        reader.feed(writer.request_pages(BIG.name, 0, HUGE))
    reader.new_connection()
    writer.new_connection()
    assert list(reader.feed(writer.request_pages(BIG.name, 0, HUGE))) == [
        PageRequest(BIG.name, 0, HUGE)
    ]
    reader.connection_lost()


def test_a_bitmap_takes_memory_only_as_far_as_its_bytes_have_come() -> None:
    huge = BlockEntry("huge", 1 << 50, PAGE)
    reader = ReturnPathReader([huge])
    size = huge.length // PAGE // 8
    tracemalloc.start()
    try:
        assert list(reader.feed(b"\0\5\0\5\x04huge" + struct.pack(">Q", size))) == []
        for _ in range(100):
            assert list(reader.feed(bytes(1000))) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@settings(max_examples=300)
@given(st.binary(max_size=200), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_any_bytes_are_read_or_refused(data: bytes, sizes: list[int]) -> None:
    reader = ReturnPathReader(BLOCKS)
    start = 0
    try:
        for size in sizes * (len(data) // min(sizes) + 1):
            list(reader.feed(data[start : start + size]))
            start += size
        reader.connection_lost()
    except ProtocolError as error:
        assert error.position is not None
        assert error.position <= len(data)
