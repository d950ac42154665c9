"""The preempt channel: pages without a frame around them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopyd.wire import stream_writer as writer
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import PreemptEnd
from postcopyd.wire.preempt_reader import FIRST_BYTE, PreemptReader
from postcopyd.wire.stream_format import EOS
from tests.wire.streams import BLOCKS, HUGE, PAGE, RAM, VGA, Event, page_content, receive, word

END = writer.page_word(0, EOS)
pages = st.lists(
    st.tuples(st.sampled_from((RAM, VGA)), st.integers(0, 15), st.booleans()), max_size=30
)


def reader() -> PreemptReader:
    return PreemptReader(BLOCKS, PAGE)


def channel(records: list[tuple[str, int, bool]]) -> tuple[bytes, list[Event]]:
    """The bytes of these pages, and what is to be read from them."""
    ram = writer.StreamWriter(0)
    said, meant = b"", []
    for block, offset, zero in records:
        if zero:
            said += ram.zero_page(block, offset)
            meant.append(("zero", block, offset, b""))
        else:
            content = page_content(offset // PAGE)
            said += ram.page(block, offset) + content
            meant.append(("page", block, offset, content))
    return said, [*meant]


@settings(deadline=None)
@given(pages, st.booleans(), st.lists(st.integers(1, 9000), max_size=30))
def test_pages_come_as_they_were_written_however_they_are_split(
    records: list[tuple[object, int, bool]], ended: bool, sizes: list[int]
) -> None:
    said, meant = channel([(block.name, page * PAGE, zero) for block, page, zero in records])  # type: ignore[attr-defined]
    if ended:
        said, meant = said + END, [*meant, PreemptEnd()]
    urgent = reader()
    outcome = receive(urgent, said, sizes)
    assert outcome.error is None
    assert outcome.events == meant
    assert urgent.ended is ended
    assert urgent.position == len(said)
    urgent.connection_lost()


def test_the_example_of_a_real_source_is_read() -> None:
    """Three zero pages that a QEMU 7.2 was asked for, and its end (qemu-wire, 5.4)."""
    said = bytes.fromhex(
        "0000000000100002 06 70632e72616d 00  0000000000001022 00  0000000000205022 00"
        "0000000000000010"
    )
    assert said[0] == FIRST_BYTE
    outcome = receive(reader(), said, itertools.repeat(1, len(said)))
    assert outcome.events == [
        ("zero", "pc.ram", 0x100000, b""),
        ("zero", "pc.ram", 0x1000, b""),
        ("zero", "pc.ram", 0x205000, b""),
        PreemptEnd(),
    ]


def test_a_huge_page_comes_as_its_records() -> None:
    offsets = range(HUGE, 2 * HUGE, PAGE)
    said, meant = channel([("big", offset, False) for offset in offsets])
    outcome = receive(reader(), said)
    assert outcome.error is None
    assert outcome.events == meant


WRONG = {
    "a block that is not there": (writer.StreamWriter(0).page("pc.rom", 0), "is not listed", 0),
    "an offset outside its block": (
        writer.StreamWriter(0).page(VGA.name, VGA.length) + bytes(PAGE),
        "which has 0x10000",
        0,
    ),
    "CONTINUE first": (word(0, 0x28), "CONTINUE before any", 0),
    "a block list": (word(PAGE, 0x04), "a list of RAM blocks on the preempt channel", 0),
    "flags that contradict": (word(0, 0x0A), "contradicting flags", 0),
    "something behind the end": (END + b"\0", "behind the end of the preempt channel", 8),
    "a zero page that is none": (
        word(0, 0x02) + b"\x06pc.ram\x01",
        "filled with 0x01",
        0,
    ),
}


@pytest.mark.parametrize(("said", "reason", "position"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named_with_its_place(said: bytes, reason: str, position: int) -> None:
    urgent = reader()
    error = receive(urgent, said).error
    assert error is not None and reason in error.what
    assert error.position == position
    with pytest.raises(ProtocolError):
        urgent.received(0)


def test_what_came_before_a_mistake_counts() -> None:
    said, meant = channel([("pc.ram", 0, False)])
    outcome = receive(reader(), said + word(0, 0x40))
    assert outcome.events == meant
    assert outcome.error is not None


@pytest.mark.parametrize("length", [1, 7, 8, 15, 16, 4000])
def test_a_channel_that_stops_in_a_page_is_told_from_one_that_closes(length: int) -> None:
    urgent = reader()
    said, _ = channel([("pc.ram", 0, False)])
    assert receive(urgent, said[:length]).error is None
    with pytest.raises(ProtocolError, match="stops in the middle of a page"):
        urgent.connection_lost()
