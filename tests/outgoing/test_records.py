"""Batches of RAM records."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from postcopyd.outgoing.records import BATCH_BYTES, BATCH_RECORDS, PART_BYTES, RamRecords
from postcopyd.outgoing.report import Counts
from postcopyd.wire.stream_writer import StreamWriter

PAGE = 4096


def content(offset: int) -> bytes:
    return (offset + 1).to_bytes(8, "big") * (PAGE // 8)


def expected_record(block: str, offset: int, *, zero: bool, named: bool) -> bytes:
    """A record written out by hand (qemu-wire, 3)."""
    word = offset | (0x02 if zero else 0x08) | (0 if named else 0x20)
    name = bytes((len(block),)) + block.encode() if named else b""
    return word.to_bytes(8, "big") + name + (b"\0" if zero else content(offset))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["pc.ram", "rom"]),
            st.lists(st.tuples(st.integers(0, 1 << 30), st.booleans()), min_size=1, max_size=12),
        ),
        max_size=8,
    )
)
def test_records_are_in_the_order_given_and_as_long_as_counted(
    additions: list[tuple[str, list[tuple[int, bool]]]],
) -> None:
    counts = Counts()
    records = RamRecords(StreamWriter(7), counts)
    expected = b""
    last = ""
    for block, pages in additions:
        offsets = [number * PAGE for number, _ in pages]
        zero = bytes(is_zero for _, is_zero in pages)
        records.add(block, offsets, [content(offset) for offset in offsets], zero)
        for offset, is_zero in zip(offsets, zero, strict=True):
            expected += expected_record(block, offset, zero=bool(is_zero), named=block != last)
            last = block
    if additions:
        records.close_section()
        expected = (
            bytes.fromhex("02 00000007") + expected + bytes.fromhex("0000000000000010 7e 00000007")
        )
    assert records.size == len(expected)
    assert b"".join(records.take()) == expected
    assert records.size == 0
    zeros = sum(is_zero for _, pages in additions for _, is_zero in pages)
    assert counts.zero_pages == zeros
    assert counts.pages == sum(len(pages) for _, pages in additions) - zeros


def test_a_batch_is_full_of_bytes_or_of_records() -> None:
    records = RamRecords(StreamWriter(2), Counts())
    for offset in range(0, BATCH_BYTES, PAGE):
        assert not records.full
        records.add("ram", [offset], [content(offset)], b"\0")
    assert records.full
    records.take()
    assert not records.full
    for _ in range(BATCH_RECORDS // 64):
        assert not records.full
        records.add("ram", range(0, 64 * PAGE, PAGE), [], b"\1" * 64)
    assert records.full


def test_a_section_is_long_over_many_batches_until_it_is_closed() -> None:
    records = RamRecords(StreamWriter(2), Counts())
    pages = 0
    while not records.section_long:
        records.add("ram", [0], [content(0)], b"\0")
        records.take()
        pages += 1
    assert pages == PART_BYTES // (PAGE + 8) + 1
    records.close_section()
    assert not records.section_long
