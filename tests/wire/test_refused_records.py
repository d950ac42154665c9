"""Records and discards that must be refused (docs/qemu-wire.md, 7), and where."""

from __future__ import annotations

import struct

import pytest

from postcopyd.wire import stream_writer as writer
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import Discard
from postcopyd.wire.stream_reader import StreamReader
from tests.wire.streams import (
    BLOCKS,
    PAGE,
    RAM,
    SECTION_ID,
    VGA,
    command,
    head,
    mistake,
    read,
    receive,
    until_pages,
    word,
)

START = writer.StreamWriter(SECTION_ID).ram_start(BLOCKS)
NAME = b"\x06pc.ram"


def discard(payload: bytes) -> bytes:
    return command(6, payload)


RECORDS = {
    "no flag": (word(0, 0), "unknown or contradicting flags 0x000"),
    "PAGE and ZERO": (word(0, 0x0A), "unknown or contradicting flags 0x00a"),
    "PAGE and EOS": (word(0, 0x18), "unknown or contradicting flags 0x018"),
    "EOS with an offset": (word(PAGE, 0x10), "unknown or contradicting flags 0x010"),
    "unknown flag": (word(0, 0x800), "unknown or contradicting flags 0x800"),
    "only CONTINUE": (word(0, 0x20), "unknown or contradicting flags 0x020"),
    "FULL": (word(0, 0x01), r"obsolete RAM record \(FULL\)"),
    "XBZRLE": (word(0, 0x40) + NAME, "XBZRLE pages are not supported: switch"),
    "XBZRLE with CONTINUE": (word(0, 0x60), "XBZRLE pages are not supported"),
    "HOOK": (word(0, 0x80), "RDMA is not supported"),
    "COMPRESS_PAGE": (word(0, 0x100) + NAME, "compressed pages are not supported: switch"),
    "MULTIFD_FLUSH": (word(0, 0x200), "a multifd sync: multifd is not supported"),
    "CONTINUE first": (word(0, 0x28), "CONTINUE before any that names a block"),
    "zero with CONTINUE first": (word(0, 0x22), "CONTINUE before any that names a block"),
    "unknown block": (word(0, 0x08) + b"\x03abc", "a page of RAM block 'abc', which is not listed"),
    "name that is no text": (word(0, 0x08) + b"\x02\xff\n", r"RAM block '\\\\xff\\n', which"),
    "page behind the block": (
        word(RAM.length, 0x08) + NAME,
        "a page at 0x4000000 of block 'pc.ram', which has 0x4000000",
    ),
    "zero behind the block": (word(RAM.length, 0x02) + NAME, "a page at 0x4000000 of block"),
    "page at the end of the world": (
        word((1 << 64) - PAGE, 0x08) + NAME,
        "a page at 0xfffffffffffff000",
    ),
    "zero with a fill byte": (word(PAGE, 0x02) + NAME + b"\x01", "at 0x1000 .* filled with 0x01"),
    "second block list": (word(PAGE, 0x04), "a second list of RAM blocks"),
    "wrong footer id": (word(0, 0x10) + b"\x7e\0\0\0\x09", "not with its footer"),
    "no footer": (word(0, 0x10) + command(1), "not with its footer"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_wrong_record_is_refused_by_name_at_the_byte_where_it_begins(case: str) -> None:
    data, why = RECORDS[case]
    error = mistake(until_pages() + data)
    with pytest.raises(ProtocolError, match=why):
        raise error
    at = len(until_pages()) + (8 if "footer" in case else 0)
    assert error.position == at


ZEROS = writer.StreamWriter(SECTION_ID).zero_pages(RAM.name, range(0, 100 * PAGE, PAGE))
IN_A_RUN = {
    "fill byte": (word(PAGE, 0x22) + b"\x80", "filled with 0x80"),
    "behind the block": (word(RAM.length, 0x22) + b"\0", "a page at 0x4000000"),
    "flags": (word(PAGE, 0x62) + b"\0", "contradicting flags 0x062"),
}


@pytest.mark.parametrize("case", IN_A_RUN)
@pytest.mark.parametrize("behind", [b"", ZEROS[16:]], ids=["last", "in between"])
def test_a_mistake_inside_a_run_of_zero_pages_is_found(case: str, behind: bytes) -> None:
    data, why = IN_A_RUN[case]
    outcome = receive(StreamReader(), until_pages() + ZEROS + data + behind)
    assert sum(isinstance(event, tuple) for event in outcome.events) == 100
    assert outcome.error is not None
    assert outcome.error.position == len(until_pages() + ZEROS)
    with pytest.raises(ProtocolError, match=why):
        raise outcome.error


@pytest.mark.parametrize("offset", [RAM.length, (1 << 64) - PAGE])
def test_a_page_behind_the_block_is_found_where_pages_were_expected(offset: int) -> None:
    ram = writer.StreamWriter(SECTION_ID)
    reader = StreamReader()
    run = b"".join(
        header + bytes(PAGE) for header in ram.page_headers(RAM.name, [0, PAGE, 2 * PAGE])
    )
    # The first part makes the reader expect pages, the second meets the expectation.
    list(reader.feed(until_pages(ram) + run))
    last = word(RAM.length - PAGE, 0x28) + bytes(PAGE)
    outcome = receive(reader, last + word(offset, 0x28) + bytes(PAGE) + last)
    assert [event[2] for event in outcome.events if isinstance(event, tuple)] == [RAM.length - PAGE]
    assert f"a page at {offset:#x} of block 'pc.ram'" in str(outcome.error)


@pytest.mark.parametrize("kind", ["pages where pages were expected", "pages", "zero pages"])
@pytest.mark.parametrize("inside", [1, 2, 5, 9])
def test_a_run_that_crosses_the_end_of_its_block_is_refused_there(kind: str, inside: int) -> None:
    """Neighbours are checked as a run: the last page counts, not only the first."""
    ram = writer.StreamWriter(SECTION_ID)
    reader = StreamReader()
    begin = until_pages(ram) + ram.zero_page(VGA.name, 0)
    if kind == "pages where pages were expected":
        begin += b"".join(
            header + bytes(PAGE) for header in ram.page_headers(VGA.name, [0, PAGE, 2 * PAGE])
        )
    list(reader.feed(begin))
    first = VGA.length - inside * PAGE
    offsets = range(first, first + 12 * PAGE, PAGE)
    if kind == "zero pages":
        run = ram.zero_pages(VGA.name, offsets)
        length = 9
    else:
        run = b"".join(header + bytes(PAGE) for header in ram.page_headers(VGA.name, offsets))
        length = 8 + PAGE
    outcome = receive(reader, run)
    assert [event[2] for event in outcome.events if isinstance(event, tuple)] == list(
        offsets[:inside]
    )
    assert outcome.error is not None
    assert outcome.error.position == len(begin) + inside * length
    assert f"a page at {VGA.length:#x} of block 'vga.vram'" in str(outcome.error)


DISCARDS = {
    "empty": (b"", "a discard of 0 bytes"),
    "version": (b"\x01" + NAME + bytes(17), "a discard of version 1"),
    "missing NUL": (b"\0" + NAME + b"x" + bytes(16), "without NUL"),
    "name longer than the command": (b"\0\xffpc.ram", "without NUL"),
    "unknown block": (b"\0\x02no\0" + bytes(16), "RAM block 'no', which is not listed"),
    "no range": (b"\0" + NAME + b"\0", "0 bytes of ranges"),
    "half a range": (b"\0" + NAME + bytes(9), "8 bytes of ranges"),
    "nothing discarded": (b"\0" + NAME + bytes(17), "is not whole pages"),
    "start not aligned": (b"\0" + NAME + b"\0" + struct.pack(">QQ", 1, PAGE), "not whole pages"),
    "length not aligned": (b"\0" + NAME + b"\0" + struct.pack(">QQ", 0, 1), "not whole pages"),
    "part of a huge page": (
        b"\0\x03big\0" + struct.pack(">QQ", 0, PAGE),
        "not whole pages of 0x200000",
    ),
    "beyond the block": (
        b"\0" + NAME + b"\0" + struct.pack(">QQ", RAM.length - PAGE, 2 * PAGE),
        "beyond block 'pc.ram'",
    ),
    "overflow": (
        b"\0" + NAME + b"\0" + struct.pack(">QQ", PAGE, (1 << 64) - PAGE),
        "beyond block 'pc.ram'",
    ),
    "second range wrong": (
        b"\0" + NAME + b"\0" + struct.pack(">QQQQ", 0, PAGE, RAM.length, PAGE),
        "beyond block 'pc.ram'",
    ),
}


@pytest.mark.parametrize("case", DISCARDS)
def test_a_wrong_discard_is_refused_by_name(case: str) -> None:
    payload, why = DISCARDS[case]
    with pytest.raises(ProtocolError, match=why):
        raise mistake(head() + START + discard(payload))


def test_a_discard_of_as_many_ranges_as_fit_is_accepted() -> None:
    payload = b"\0" + NAME + b"\0" + struct.pack(">QQ", PAGE, PAGE) * 4094
    message = read(head() + START + discard(payload))[-1]
    assert message == Discard("pc.ram", ((PAGE, PAGE),) * 4094)
