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
    SECTION_ID,
    command,
    entry,
    head,
    mistake,
    put,
    ram_start,
    read,
    receive,
    refusal,
    until_pages,
    word,
)

START = writer.StreamWriter(SECTION_ID).ram_start(BLOCKS)
CONFIGURATION = writer.configuration("pc")


HEADS = {
    "bad magic": (b"QEVN\0\0\0\3", r"not a migration stream: it begins with 51 45 56 4e"),
    "version 2": (b"QEVM\0\0\0\2\7", "stream version 2; only 3"),
    "version 4": (b"QEVM\0\0\0\4\7", "stream version 4; only 3"),
    "no configuration": (b"QEVM\0\0\0\3\1", "the configuration is missing: section type 0x01"),
    "multifd channel": (b"\x11\x22\x33\x44\0\0\0\1", "multifd channel; switch"),
    "TLS": (b"\x16\x03\x01\x02\x00", "TLS handshake"),
    "preempt channel": (b"\0\0\0\0\0\x10\0\2", "as a preempt channel does; the main"),
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
        raise mistake(data)


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
    "discard before the list": (command(6, b"\0\x06pc.ram" + bytes(17)), "not listed"),
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
    error = mistake(head() + data)
    assert begin <= (error.position or 0) <= begin + len(data)
    with pytest.raises(ProtocolError, match=why):
        raise error


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
        raise mistake(head() + ram_start(listed, total), reader)


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


def test_a_page_size_that_advise_does_not_name_is_refused() -> None:
    listed = entry(b"a", 1 << 30) + struct.pack(">Q", 1 << 30)
    assert "a block name that is empty" in refusal(head() + ram_start(listed, 2 << 30))


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
        raise mistake(head() + data)


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
        raise mistake(data, reader)


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
