"""Streams for the tests of the reader, and ways to bring their bytes to it."""

from __future__ import annotations

import gzip
import itertools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from postcopyd.wire import stream_writer as writer
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import BlockEntry, Message, Opaque, Pages, ZeroPages
from postcopyd.wire.preempt_reader import PreemptReader
from postcopyd.wire.stream_reader import StreamReader

PAGE = 4096
HUGE = 2 << 20
RAM = BlockEntry("pc.ram", 64 << 20, PAGE)
VGA = BlockEntry("vga.vram", 16 * PAGE, PAGE)
BIG = BlockEntry("big", 2 * HUGE, HUGE)
BLOCKS = (RAM, VGA, BIG)
PAGE_SIZES = PAGE | HUGE
SECTION_ID = 2
DEVICES = writer.device_section(7, "cpu", b"registers", version=12)

PageEvent: TypeAlias = tuple[str, str, int, bytes]
"""("page", block, offset, content), or ("zero", block, offset, b"")."""
Event: TypeAlias = Message | PageEvent


def page_content(number: int) -> bytes:
    """Content that tells which page it is, with words in it that look like records."""
    return (number.to_bytes(8, "big") + writer.page_word(PAGE, 0x28)) * (PAGE // 16)


def head(page_sizes: int = PAGE_SIZES) -> bytes:
    """Everything in front of the first section."""
    return (
        writer.configuration("pc-q35-7.2")
        + writer.open_return_path()
        + writer.ping(1)
        + writer.advise(page_sizes, PAGE)
    )


def until_pages(ram: writer.StreamWriter | None = None) -> bytes:
    """Everything in front of the first page record."""
    ram = ram or writer.StreamWriter(SECTION_ID)
    return head() + ram.ram_start(BLOCKS) + ram.ram_part()


def captured(name: str) -> bytes:
    """A stream as a real QEMU sent it."""
    path = Path(__file__).parents[1] / "data" / f"{name}.stream.gz"
    return gzip.decompress(path.read_bytes())


CAPTURES = ("qemu-7.2-postcopy", "qemu-10.0-postcopy")


def flat(messages: Iterable[Message]) -> Iterator[Event]:
    """Take batches apart and copy what is only valid for a while."""
    for message in messages:
        if isinstance(message, Pages):
            assert len(message) == len(message.offsets) > 0
            for place, offset in enumerate(message.offsets):
                yield "page", message.block, offset, bytes(message.payload(place))
        elif isinstance(message, ZeroPages):
            assert len(message) == len(message.offsets) > 0
            for offset in message.offsets:
                yield "zero", message.block, offset, b""
        elif isinstance(message, Opaque):
            yield Opaque(memoryview(bytes(message.data)))
        else:
            yield message


def joined(events: Iterable[Event]) -> list[Event]:
    """Join neighbouring opaque bytes: how they are cut depends on how they came."""
    result: list[Event] = []
    for event in events:
        if isinstance(event, Opaque) and result and isinstance(result[-1], Opaque):
            event = Opaque(memoryview(bytes(result.pop().data) + bytes(event.data)))  # type: ignore[union-attr]
        result.append(event)
    return result


@dataclass
class Outcome:
    """What came of a stream."""

    events: list[Event]
    error: ProtocolError | None


def put(reader: StreamReader | PreemptReader, data: memoryview) -> int:
    """Write as much of `data` as the reader has room for, as recvmsg_into does."""
    rest = data
    for place in reader.buffers():
        length = min(len(place), len(rest))
        place[:length] = rest[:length]
        rest = rest[length:]
    return len(data) - len(rest)


def receive(
    reader: StreamReader | PreemptReader, data: bytes, sizes: Iterable[int] = ()
) -> Outcome:
    """Bring `data` to the reader, in receives of these sizes and then as large as they fit."""
    rest = memoryview(data)
    events: list[Event] = []
    wanted = itertools.chain(sizes, itertools.repeat(len(data)))
    try:
        while rest:
            count = put(reader, rest[: next(wanted)])
            assert count > 0
            rest = rest[count:]
            for message in reader.received(count):
                events += flat((message,))
    except ProtocolError as error:
        return Outcome(joined(events), error)
    return Outcome(joined(events), None)


def read(data: bytes, reader: StreamReader | None = None) -> list[Event]:
    """Read a stream in which nothing may be wrong."""
    outcome = receive(reader or StreamReader(), data)
    assert outcome.error is None, outcome.error
    return outcome.events


def refusal(data: bytes, reader: StreamReader | None = None) -> str:
    """As `mistake`; return what was said about it."""
    return str(mistake(data, reader))


def ram_start(listed: bytes, total: int, *, version: int = 4, instance: int = 0) -> bytes:
    """A first section with this block list."""
    return (
        b"\x01" + struct.pack(">I", SECTION_ID) + b"\x03ram" + struct.pack(">II", instance, version)
        + writer.page_word(total, 0x04)
        + listed
        + writer.StreamWriter(SECTION_ID).ram_footer()
    )  # fmt: skip


def entry(name: bytes, length: int) -> bytes:
    """One block of a block list."""
    return bytes((len(name),)) + name + struct.pack(">Q", length)


def command(number: int, payload: bytes = b"") -> bytes:
    """Any command, right or wrong."""
    return struct.pack(">BHH", 8, number, len(payload)) + payload


def word(offset: int, flags: int) -> bytes:
    """The word of any record, right or wrong."""
    return struct.pack(">Q", offset | flags)


def mistake(data: bytes, reader: StreamReader | None = None) -> ProtocolError:
    """Read a stream in which something must be wrong; return what was raised."""
    error = receive(reader or StreamReader(), data).error
    assert error is not None, "the stream was accepted"
    return error
