"""The writer: exact bytes where they are known from real sources, and what it refuses to write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.wire import stream_writer as writer
from postcopyd.wire.messages import BlockEntry
from tests.wire.streams import HUGE, PAGE, read, until_pages


def test_the_head_has_the_bytes_of_a_real_source() -> None:
    assert writer.configuration("pc-q35-7.2") == b"QEVM\0\0\0\3\7\0\0\0\x0apc-q35-7.2"


def test_subsections_come_in_their_order() -> None:
    written = writer.configuration("pc", uuid=bytes(16), capabilities=["cap"], target_page_bits=14)
    assert written == (
        b"QEVM\0\0\0\3\7\0\0\0\2pc"
        b"\x05\x1econfiguration/target-page-bits\0\0\0\1\0\0\0\x0e"
        b"\x05\x1aconfiguration/capabilities\0\0\0\1\0\0\0\1\3cap"
        b"\x05\x12configuration/uuid\0\0\0\1" + bytes(16)
    )


def test_commands_have_the_bytes_of_a_real_source() -> None:
    assert writer.discard("pc.ram", [(0x13000, 0xFED000)]) == bytes.fromhex(
        "08 0006 0019 00 06 70632e72616d 00 0000000000013000 0000000000fed000"
    )
    assert writer.package(b"", ()) == bytes.fromhex(
        "08 0007 0004 0000000a 08 0004 0000 08 0005 0000"
    )
    assert writer.package(b"\x04state").endswith(
        b"\x04state" + bytes.fromhex("08 0002 0004 00000003 08 0005 0000")
    )
    assert writer.received_bitmap_request("pc.ram") == bytes.fromhex("08 000a 0007 06") + b"pc.ram"
    assert writer.advise(0x201000, PAGE)[5:] == bytes.fromhex("0000000000201000 0000000000001000")


def test_the_first_section_names_huge_pages_and_only_those() -> None:
    ram = writer.StreamWriter(2)
    blocks = [BlockEntry("a", PAGE, PAGE), BlockEntry("b", HUGE, HUGE)]
    assert ram.ram_start(blocks) == (
        bytes.fromhex("01 00000002 03 72616d 00000000 00000004 0000000000201004")
        + bytes.fromhex("01 61 0000000000001000 01 62 0000000000200000 0000000000200000")
        + bytes.fromhex("0000000000000010 7e 00000002")
    )


def test_a_record_names_its_block_only_when_it_must() -> None:
    ram = writer.StreamWriter(2)
    assert ram.page("pc.ram", PAGE) == bytes.fromhex("0000000000001008 06") + b"pc.ram"
    assert ram.page("pc.ram", 0) == bytes.fromhex("0000000000000028")
    assert ram.zero_page("pc.ram", PAGE) == bytes.fromhex("0000000000001022 00")
    assert ram.zero_page("x", PAGE) == bytes.fromhex("0000000000001002 01 78 00")
    ram.forget_block()
    assert ram.page("x", 0) == bytes.fromhex("0000000000000008 01 78")


@given(
    st.lists(st.tuples(st.sampled_from(("a", "b")), st.lists(st.integers(0, 99), max_size=9))),
    st.booleans(),
)
def test_many_records_at_once_are_the_same_bytes_as_one_by_one(
    runs: list[tuple[str, list[int]]], zeros: bool
) -> None:
    bulk, single = writer.StreamWriter(2), writer.StreamWriter(2)
    for block, pages in runs:
        offsets = [page * PAGE for page in pages]
        if zeros:
            assert bulk.zero_pages(block, offsets) == b"".join(
                single.zero_page(block, offset) for offset in offsets
            )
        else:
            assert bulk.page_headers(block, offsets) == [
                single.page(block, offset) for offset in offsets
            ]


def test_a_new_writer_goes_on_with_the_section_of_an_old_one() -> None:
    ram = writer.StreamWriter(2)
    data = until_pages(ram) + ram.zero_page("pc.ram", 0) + ram.ram_footer()
    again = writer.StreamWriter(2)
    data += again.ram_part() + again.zero_page("pc.ram", PAGE) + again.ram_footer()
    pages = [event for event in read(data) if isinstance(event, tuple)]
    assert pages == [("zero", "pc.ram", 0, b""), ("zero", "pc.ram", PAGE, b"")]


@pytest.mark.parametrize(
    "make",
    [
        lambda: writer.configuration("pc", uuid=bytes(15)),
        lambda: writer.configuration("pc", target_page_bits=1 << 32),
        lambda: writer.configuration("pc", capabilities=["x" * 256]),
        lambda: writer.configuration(""),
        lambda: writer.ping(1 << 32),
        lambda: writer.ping(-1),
        lambda: writer.advise(1 << 64, PAGE),
        lambda: writer.discard("a", []),
        lambda: writer.discard("a", [(0, PAGE)] * 13),
        lambda: writer.discard("a", [(0, 1 << 64)]),
        lambda: writer.discard("", [(0, PAGE)]),
        lambda: writer.received_bitmap_request("a" * 256),
        lambda: writer.StreamWriter(1 << 32),
        lambda: writer.StreamWriter(1).page("a", 1),
        lambda: writer.StreamWriter(1).page("a", 1 << 64),
        lambda: writer.StreamWriter(1).page_headers("a", [0, 8]),
        lambda: writer.StreamWriter(1).zero_pages("a", [0, -PAGE]),
        lambda: writer.device_section(1, "a", b"", version=-1),
    ],
)
def test_what_does_not_fit_its_field_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        make()
