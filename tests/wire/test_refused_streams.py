"""What a hostile or unsupported source can send (docs/qemu-wire.md, 7), and how it is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from postcopyd.wire import stream_writer as writer
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import (
    BlockEntry,
    BlockList,
    Configuration,
    DeviceState,
    Discard,
    EndOfStream,
    Opaque,
    PostcopyResume,
    RamSectionEnd,
    ReceivedBitmapRequest,
    VmDescription,
)
from postcopyd.wire.stream_reader import ResumeState, StreamLimits, StreamReader
from tests.wire.streams import (
    BLOCKS,
    DEVICES,
    HUGE,
    PAGE,
    PAGE_SIZES,
    RAM,
    SECTION_ID,
    VGA,
    head,
    put,
    read,
    receive,
    refusal,
    until_pages,
)

START = writer.StreamWriter(SECTION_ID).ram_start(BLOCKS)
CONFIGURATION = writer.configuration("pc")


def ram_start(listed: bytes, total: int, *, version: int = 4, instance: int = 0) -> bytes:
    """A first section with this block list."""
    return (
        b"\x01" + struct.pack(">I", SECTION_ID) + b"\x03ram" + struct.pack(">II", instance, version)
        + writer.page_word(total, 0x04)
        + listed
        + writer.StreamWriter(SECTION_ID).ram_footer()
    )  # fmt: skip


def entry(name: bytes, length: int) -> bytes:
    return bytes((len(name),)) + name + struct.pack(">Q", length)


def command(number: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BHH", 8, number, len(payload)) + payload


def discard(payload: bytes) -> bytes:
    return command(6, payload)


def word(offset: int, flags: int) -> bytes:
    return struct.pack(">Q", offset | flags)


NAME = b"\x06pc.ram"

HEADS = {
    "bad magic": (b"QEVN\0\0\0\3", r"not a migration stream: it begins with 51 45 56 4e"),
    "version 2": (b"QEVM\0\0\0\2\7", "stream version 2; only 3"),
    "version 4": (b"QEVM\0\0\0\4\7", "stream version 4; only 3"),
    "no configuration": (b"QEVM\0\0\0\3\1", "the configuration is missing: section type 0x01"),
    "multifd channel": (b"\x11\x22\x33\x44\0\0\0\1", "multifd channel; switch"),
    "TLS": (b"\x16\x03\x01\x02\x00", "TLS handshake"),
    "preempt channel": (b"\0\0\0\0\0\x10\0\2", "as a preempt channel does; switch"),
    "resumed": (b"\x08\x00\x0a\x00\x07", "as a resumed migration does"),
    "machine type of 4 GiB": (
        b"QEVM\0\0\0\3\7\xff\xff\xff\xff",
        "machine type of 4294967295 bytes; 1 to 255",
    ),
    "empty machine type": (b"QEVM\0\0\0\3\7\0\0\0\0", "machine type of 0 bytes"),
    "machine type not UTF-8": (b"QEVM\0\0\0\3\7\0\0\0\2\xff\xfe", "machine name that is not UTF-8"),
    "x-ignore-shared": (
        writer.configuration("pc", capabilities=["x-ignore-shared"]),
        "capability x-ignore-shared is not supported: switch it off",
    ),
    "mapped-ram": (
        writer.configuration("pc", capabilities=["mapped-ram"]),
        "capability mapped-ram is not supported",
    ),
    "unknown subsection": (
        CONFIGURATION + b"\x05\x05other\0\0\0\1",
        "unknown subsection 'other'",
    ),
    "subsection version": (
        CONFIGURATION + b"\x05\x12configuration/uuid\0\0\0\2",
        "version 2 of the subsection 'configuration/uuid'",
    ),
    "subsection twice": (
        writer.configuration("pc", uuid=bytes(16)) + b"\x05\x12configuration/uuid\0\0\0\1",
        "'configuration/uuid' comes twice",
    ),
    "silly target pages": (
        writer.configuration("pc", target_page_bits=0xFFFFFFFF) + b"\0",
        "4096, 8192, 16384, 32768, 65536 are supported",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_wrong_head_is_refused_by_name(case: str) -> None:
    data, why = HEADS[case]
    with pytest.raises(ProtocolError, match=why):
        raise _error(data)


COMMANDS = {
    "command 0": (command(0), "unknown command 0"),
    "command 12": (command(12), "unknown command 12"),
    "command 65535": (command(65535), "unknown command 65535"),
    "PING too long": (command(2, bytes(5)), "command PING has 5 bytes, it must have 4"),
    "OPEN_RETURN_PATH with payload": (command(1, b"\0"), "has 1 bytes, it must have 0"),
    "ADVISE of 8": (command(3, bytes(8)), "POSTCOPY_ADVISE has 8 bytes, it must have 16"),
    "ADVISE for bitmaps": (command(3), "dirty bitmaps only"),
    "ADVISE twice": (writer.advise(PAGE, PAGE), "ADVISE came twice"),
    "ADVISE without sizes": (writer.advise(0, PAGE), "host page sizes 0x0"),
    "ADVISE with odd target pages": (writer.advise(PAGE, 4097), "target pages of 4097 bytes"),
    "ADVISE with tiny target pages": (writer.advise(PAGE, 1024), "target pages of 1024 bytes"),
    "ADVISE with host pages below target": (writer.advise(PAGE, 8192), "at least one target page"),
    "LISTEN outside": (command(4), "POSTCOPY_LISTEN outside a device package"),
    "RUN outside": (command(5), "POSTCOPY_RUN outside a device package"),
    "COLO": (command(8), "COLO is not supported"),
    "PACKAGED of 4 GiB": (command(7, b"\xff" * 4), "package of 4294967295 bytes; the limit"),
    "nested PACKAGED": (
        writer.package(writer.package(DEVICES) + DEVICES),
        r"command 7 \(PACKAGED\) in the package",
    ),
    "PING in front in the package": (
        writer.package(writer.ping(3) + DEVICES),
        r"command 2 \(PING\) in the package",
    ),
    "package without LISTEN": (command(7, b"\0\0\0\5") + command(5), "not with POSTCOPY_LISTEN"),
    "package without RUN": (command(7, b"\0\0\0\5") + command(4), "not with POSTCOPY_RUN"),
    "empty package": (command(7, bytes(4)), "begins with nothing"),
    "bitmap of no block": (command(10), "block name does not fill it"),
    "bitmap with a long name": (command(10, b"\x06pc.ramx"), "block name does not fill it"),
    "bitmap of an unknown block": (command(10, b"\x02no"), "RAM block 'no', which is not listed"),
    "discard before the list": (discard(b"\0" + NAME + bytes(17)), "not listed"),
    "section type 0x09": (b"\x09", "section type 0x09 where a section or command begins"),
    "subsection outside": (b"\x05", "section type 0x05"),
    "second configuration": (b"\x07", "section type 0x07"),
    "footer outside": (b"\x7e", "section type 0x7e"),
    "description before the end": (b"\x06", "section type 0x06"),
    "PART with unknown id": (b"\x02\0\0\0\x07", r"section 7 \(PART\) was never started"),
    "END with unknown id": (b"\x03\0\0\0\x07", r"section 7 \(END\) was never started"),
    "section without name": (b"\x01\0\0\0\1\0" + bytes(8), "a section without a name"),
    "RAM in one piece": (b"\x04\0\0\0\1\x03ram\0\0\0\0\0\0\0\4", "RAM in one piece"),
    "RAM version": (ram_start(b"", 0, version=5), "instance 0 and version 5"),
    "RAM instance": (ram_start(b"", 0, instance=1), "instance 1 and version 4"),
    "no block list": (
        b"\x01\0\0\0\2\x03ram\0\0\0\0\0\0\0\4" + word(0, 0x10),
        "has no list of RAM blocks",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command_or_section_is_refused_by_name(case: str) -> None:
    data, why = COMMANDS[case]
    begin = len(head())
    error = _error(head() + data)
    assert begin <= (error.position or 0) <= begin + len(data)
    with pytest.raises(ProtocolError, match=why):
        raise error


def _error(data: bytes, reader: StreamReader | None = None) -> ProtocolError:
    error = receive(reader or StreamReader(), data).error
    assert error is not None, "the stream was accepted"
    return error


def test_a_ping_without_return_path_is_refused() -> None:
    assert "PING 9 came before a return path was opened" in refusal(CONFIGURATION + writer.ping(9))


BLOCK_LISTS = {
    "lengths beyond the total": (
        entry(b"a", PAGE) + entry(b"b", 2 * PAGE),
        2 * PAGE,
        "'b' has 0x2000 bytes, only 0x1000 of the total",
    ),
    "block of no bytes": (entry(b"a", 0), PAGE, "'a' has no bytes"),
    "block twice": (entry(b"a", PAGE) * 2, 2 * PAGE, "'a' is listed twice"),
    "no name": (entry(b"", PAGE), PAGE, "block name that is empty"),
    "NUL in a name": (entry(b"a\0b", PAGE), PAGE, "block name that is empty or has a NUL"),
    "name not UTF-8": (entry(b"\xff", PAGE), PAGE, "block name that is not UTF-8"),
    "part of a page": (entry(b"a", PAGE - 1), PAGE, "not whole pages of 0x1000"),
    "part of a huge page": (
        entry(b"a", PAGE) + struct.pack(">Q", HUGE),
        PAGE,
        "not whole pages of 0x200000",
    ),
    "too many": (
        b"".join(entry(b"%d" % number, PAGE) for number in range(5)),
        5 * PAGE,
        "more than 4 RAM blocks",
    ),
    "4 GiB of names": (entry(b"a", PAGE) + b"\xff" * 600, 1 << 60, "not UTF-8"),
}


@pytest.mark.parametrize("case", BLOCK_LISTS)
def test_a_wrong_block_list_is_refused_by_name(case: str) -> None:
    listed, total, why = BLOCK_LISTS[case]
    reader = StreamReader(StreamLimits(blocks=4))
    with pytest.raises(ProtocolError, match=why):
        raise _error(head() + ram_start(listed, total), reader)


def test_a_block_of_small_pages_is_refused_when_advise_names_only_huge_ones() -> None:
    text = refusal(head(HUGE) + ram_start(entry(b"a", HUGE), HUGE))
    assert "'a' has host pages of 0x1000 bytes, ADVISE names only 0x200000" in text


def test_the_size_of_huge_pages_is_told_from_what_follows_by_advise() -> None:
    """Nothing flags it: a name that begins like a page size, a list that ends behind one."""
    listed = (
        entry(b"big", HUGE) + struct.pack(">Q", HUGE)
        + entry(b"\x20\x00"[:1] + b"small", PAGE)
        + entry(b"last", HUGE) + struct.pack(">Q", HUGE)
    )  # fmt: skip
    events = read(head() + ram_start(listed, 2 * HUGE + PAGE))
    (blocks,) = [event for event in events if isinstance(event, BlockList)]
    assert blocks.blocks == (
        BlockEntry("big", HUGE, HUGE),
        BlockEntry(" small", PAGE, PAGE),
        BlockEntry("last", HUGE, HUGE),
    )
    assert events[-1] == RamSectionEnd("start")


def test_without_advise_no_page_size_is_looked_for() -> None:
    events = read(CONFIGURATION + ram_start(entry(b"a", PAGE), PAGE))
    assert BlockList(PAGE, (BlockEntry("a", PAGE, PAGE),)) in events


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
    error = _error(until_pages() + data)
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


def test_a_page_size_that_advise_does_not_name_is_refused() -> None:
    listed = entry(b"a", 1 << 30) + struct.pack(">Q", 1 << 30)
    assert "a block name that is empty" in refusal(head() + ram_start(listed, 2 << 30))


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
        raise _error(head() + START + discard(payload))


def test_a_discard_of_as_many_ranges_as_fit_is_accepted() -> None:
    payload = b"\0" + NAME + b"\0" + struct.pack(">QQ", PAGE, PAGE) * 4094
    message = read(head() + START + discard(payload))[-1]
    assert message == Discard("pc.ram", ((PAGE, PAGE),) * 4094)


ORDERS = {
    "RAM begins twice": (START + START, "'ram' begins a second time"),
    "RAM goes on": (
        START + b"\x03\0\0\0\2" + writer.StreamWriter(2).ram_footer() + b"\x02\0\0\0\2",
        "section 2 'ram' goes on behind its end",
    ),
    "ADVISE behind the list": (START + writer.advise(PAGE, PAGE), "ADVISE came after the list"),
    "end without RAM END": (START + b"\0", "the stream ends, but section 2 'ram' has not ended"),
    "bytes behind the end": (b"\0\x01", "bytes behind the end"),
    "bytes behind the description": (b"\0\x06\0\0\0\2{}\0", "bytes behind the end"),
    "description of 4 GiB": (b"\0\x06\xff\xff\xff\xff", "a description of 4294967295 bytes"),
}


@pytest.mark.parametrize("case", ORDERS)
def test_a_wrong_order_is_refused_by_name(case: str) -> None:
    data, why = ORDERS[case]
    with pytest.raises(ProtocolError, match=why):
        raise _error(head() + data)


def test_target_pages_of_advise_must_be_those_of_the_configuration() -> None:
    begin = writer.configuration("virt", target_page_bits=16)
    assert "ADVISE says target pages of 4096 bytes, the configuration 65536" in refusal(
        begin + writer.advise(1 << 16, PAGE)
    )
    read(begin + writer.advise(1 << 16, 1 << 16))


def test_a_limit_that_is_just_met_is_accepted() -> None:
    limits = StreamLimits(package=len(writer.package(DEVICES)) - 9, vm_description=2)
    data = head() + writer.package(DEVICES) + b"\0" + writer.vm_description(b"{}")
    events = read(data, StreamReader(limits))
    assert events[-2:] == [EndOfStream(), VmDescription(2)]
    larger = head() + writer.package(DEVICES + DEVICES)
    assert "the limit is" in refusal(larger, StreamReader(limits))


def test_a_uuid_is_told_and_the_head_is_kept_byte_for_byte() -> None:
    begin = writer.configuration("pc-i440fx-9.1", capabilities=[], uuid=bytes(range(16)))
    (configuration,) = read(begin + b"\0")[:1]
    assert configuration == Configuration("pc-i440fx-9.1", (), bytes(range(16)), begin)


@pytest.mark.parametrize("make", [lambda: DEVICES, lambda: b"\x01" + DEVICES[1:]])
def test_everything_from_the_first_section_that_is_not_ram_is_opaque(
    make: Callable[[], bytes],
) -> None:
    begin = head() + START
    rest = make() + b"\0\x06\0\0\0\2{}" + bytes(100_000)
    events = read(begin + rest)
    state, opaque = events[-2:]
    assert state == DeviceState(len(begin))
    assert isinstance(opaque, Opaque)
    assert bytes(opaque.data) == rest


def test_a_resumed_connection_goes_on_where_the_broken_one_was() -> None:
    first = StreamReader()
    read(until_pages(), first)
    state = first.resume_state()
    assert state == ResumeState(BLOCKS, SECTION_ID, PAGE)
    ram = writer.StreamWriter(SECTION_ID)
    data = (
        b"".join(writer.received_bitmap_request(block.name) for block in BLOCKS)
        + writer.postcopy_resume()
        + writer.ping(5)
        + ram.ram_end()
        + ram.zero_page("vga.vram", PAGE)
        + ram.ram_footer()
        + writer.END_OF_STREAM
    )
    events = read(data, StreamReader(resume=state))
    assert events[:3] == [ReceivedBitmapRequest(block.name) for block in BLOCKS]
    assert events[3] == PostcopyResume()
    assert events[5:] == [("zero", "vga.vram", PAGE, b""), RamSectionEnd("end"), EndOfStream()]


RESUMED = {
    "a new migration": (head(), "begins with a command, not with 0x51"),
    "pages at once": (b"\x02\0\0\0\2", "begins with a command, not with 0x02"),
    "another section id": (command(9) + b"\x02\0\0\0\3", r"section 3 \(PART\) was never started"),
    "the block list again": (command(9) + START, "'ram' begins a second time"),
    "ADVISE": (writer.advise(PAGE_SIZES, PAGE), "ADVISE came after the list"),
    "CONTINUE first": (
        command(9) + b"\x02\0\0\0\2" + word(0, 0x28),
        "CONTINUE before any that names a block",
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_wrong_resumed_connection_is_refused_by_name(case: str) -> None:
    data, why = RESUMED[case]
    reader = StreamReader(resume=ResumeState(BLOCKS, SECTION_ID, PAGE))
    with pytest.raises(ProtocolError, match=why):
        raise _error(data, reader)


def test_what_has_no_block_list_cannot_be_resumed() -> None:
    reader = StreamReader()
    assert put(reader, memoryview(head())) == len(head())
    list(reader.received(len(head())))
    with pytest.raises(ValueError, match="cannot be resumed"):
        reader.resume_state()


def test_larger_target_pages_are_read_with_their_own_flags_and_layout() -> None:
    size = 1 << 16
    ram = writer.StreamWriter(3)
    offsets = [place * size for place in range(20)]
    data = (
        writer.configuration("virt", target_page_bits=16)
        + writer.advise(size, size)
        + ram_64k_start(ram, size)
        + ram.ram_part()
        + b"".join(header + bytes((7,)) * size for header in ram.page_headers("mem", offsets))
        + ram.zero_page("mem", 5 * size)
        + ram.ram_footer()
    )
    for sizes in ((), (70_000,) * 30, (500,) * 3000):
        events = receive(StreamReader(), data, sizes).events
        pages = [event for event in events if isinstance(event, tuple)]
        assert [event[2] for event in pages] == [*offsets, 5 * size]
        assert all(event[3] == bytes((7,)) * size for event in pages[:-1])
        assert events[-1] == RamSectionEnd("part")


def ram_64k_start(ram: writer.StreamWriter, size: int) -> bytes:
    return ram.ram_start([BlockEntry("mem", 32 * size, size)])
