"""The reader and a slow, plain second reader agree: on right streams, wrong ones, any split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import example, given, settings
from hypothesis import strategies as st

from postcopyd.wire import stream_writer as writer
from postcopyd.wire.stream_reader import StreamReader
from tests.wire.reference_parser import ReferenceParser
from tests.wire.streams import (
    BLOCKS,
    CAPTURES,
    DEVICES,
    PAGE,
    SECTION_ID,
    captured,
    head,
    page_content,
    receive,
)

EXAMPLES = settings(max_examples=150, deadline=None)


@dataclass(frozen=True)
class Mixture:
    """A stream, and the sizes of the receives that bring it."""

    data: bytes
    sizes: list[int]
    read_ahead: int

    def __repr__(self) -> str:
        return f"Mixture({len(self.data)} bytes, sizes={self.sizes}, ahead={self.read_ahead})"


def _records(ram: writer.StreamWriter, draw: Callable[[st.SearchStrategy[int]], int]) -> bytes:
    """Some records of one kind in one block."""
    block = BLOCKS[draw(st.integers(0, len(BLOCKS) - 1))]
    pages = min(block.length // PAGE, 512)
    count = draw(st.sampled_from((1, 1, 2, 3, 5, 17, 40, 150, 300)))
    first = draw(st.integers(0, pages - 1))
    step = draw(st.sampled_from((0, 1, 1, 1, 3, 7)))
    offsets = [(first + place * step) % pages * PAGE for place in range(count)]
    if draw(st.integers(0, 3)) == 0:
        ram.forget_block()
    if draw(st.booleans()):
        return ram.zero_pages(block.name, offsets)
    headers = ram.page_headers(block.name, offsets)
    return b"".join(
        header + page_content(offset // PAGE)
        for header, offset in zip(headers, offsets, strict=True)
    )


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    """Arbitrary records in arbitrary sections, with commands in between."""
    ram = writer.StreamWriter(SECTION_ID)
    parts = [head(), ram.ram_start(BLOCKS)]
    for _ in range(draw(st.integers(0, 4))):
        between = draw(st.integers(0, 5))
        if between == 1:
            parts.append(writer.ping(draw(st.integers(0, 0xFFFFFFFF))))
        elif between == 2:
            start = draw(st.integers(0, 7)) * PAGE
            parts.append(writer.discard("vga.vram", [(start, PAGE), (0, 16 * PAGE)]))
        elif between == 3:
            parts.append(writer.package(DEVICES, draw(st.sampled_from(((), (3,), (3, 0x42))))))
        elif between == 4:
            parts.append(writer.switchover_start() + writer.received_bitmap_request("big"))
        parts.append(ram.ram_part())
        parts += (_records(ram, draw) for _ in range(draw(st.integers(0, 6))))
        parts.append(ram.ram_footer())
    end = draw(st.integers(0, 3))
    if end == 1:
        parts.append(DEVICES + b"anything")
    elif end >= 2:
        parts += (ram.ram_end(), ram.ram_footer(), writer.END_OF_STREAM)
        if end == 3:
            parts.append(writer.vm_description(b"{}"))
    sizes = st.lists(
        st.one_of(
            st.integers(1, 30),
            st.sampled_from((8, 9, 4095, 4096, 4104, 4105, 8208)),
            st.integers(1, 600_000),
        ),
        max_size=40,
    )
    return Mixture(b"".join(parts), draw(sizes), draw(st.sampled_from((1, 2, 16, 128, 1000))))


def check(mixture: Mixture) -> None:
    """Compare the readers: same messages, same place of the mistake if there is one."""
    reference = ReferenceParser(mixture.data)
    reader = StreamReader()
    reader.read_ahead_pages = mixture.read_ahead
    outcome = receive(reader, mixture.data, mixture.sizes)
    wrong_at = outcome.error.position if outcome.error else None
    assert wrong_at == reference.wrong_at, outcome.error
    assert outcome.events == reference.events


@EXAMPLES
@given(mixtures())
def test_any_mixture_in_any_split_gives_the_same_messages(mixture: Mixture) -> None:
    check(mixture)


@EXAMPLES
@given(mixtures(), st.data())
def test_a_mistake_anywhere_is_found_at_the_same_place_behind_the_same_messages(
    mixture: Mixture, data: st.DataObject
) -> None:
    wrong = bytearray(mixture.data)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(wrong) - 1))
        change = data.draw(st.sampled_from(("bit", "byte", "cut", "insert", "stop")))
        if change == "bit":
            wrong[at] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "byte":
            wrong[at] = data.draw(st.integers(0, 255))
        elif change == "cut":
            del wrong[at : at + data.draw(st.integers(1, 20))]
        elif change == "insert":
            wrong[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        else:
            del wrong[max(at, 1) :]
        if not wrong:
            wrong += b"Q"
    check(Mixture(bytes(wrong), mixture.sizes, mixture.read_ahead))


@EXAMPLES
@given(
    st.sampled_from([captured(name) for name in CAPTURES]),
    st.integers(0, 400),
    st.binary(min_size=1, max_size=12),
    st.lists(st.integers(1, 5000), max_size=20),
)
@example(captured(CAPTURES[0]), 0, b"QEVN", [])
def test_a_mistake_in_a_real_stream_is_found_at_the_same_place(
    stream: bytes, at: int, change: bytes, sizes: list[int]
) -> None:
    """The first 400 bytes hold everything but pages: headers, commands, the block list."""
    wrong = stream[:at] + change + stream[at + len(change) :]
    check(Mixture(wrong[:20_000], sizes, 128))
