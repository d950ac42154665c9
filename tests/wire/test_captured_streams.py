"""Streams of real QEMU sources, read to the last byte and written again."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable

import pytest

from postcopyd.wire import messages as m
from postcopyd.wire import stream_writer as writer
from postcopyd.wire.package import parse_package
from postcopyd.wire.stream_reader import StreamReader
from tests.wire.reference_parser import ReferenceParser
from tests.wire.streams import CAPTURES, PAGE, Event, captured, read, receive

SPLITS: dict[str, Callable[[], Iterable[int]]] = {
    "byte by byte": lambda: (1 for _ in range(1 << 20)),
    "in primes": lambda: (4099 for _ in range(1 << 20)),
    "at random": lambda: (random.Random(7).choice((1, 8, 9, 4104, 9000)) for _ in range(1 << 20)),
    "at once": lambda: (),
}


@pytest.mark.parametrize("name", CAPTURES)
@pytest.mark.parametrize("split", SPLITS)
def test_a_real_stream_is_read_to_the_last_byte_however_it_is_split(name: str, split: str) -> None:
    data = captured(name)
    reader = StreamReader()
    outcome = receive(reader, data, SPLITS[split]())
    assert outcome.error is None
    assert reader.position == len(data)
    assert reader.ended
    reader.connection_lost()
    assert outcome.events == ReferenceParser(data).events


@pytest.mark.parametrize(
    ("name", "precopy", "postcopy", "section_id", "switchover"),
    [
        ("qemu-7.2-postcopy", {"page": 3, "zero": 16}, {"page": 20, "zero": 4139}, 2, 0),
        ("qemu-10.0-postcopy", {}, {"page": 23, "zero": 4155}, 1, 1),
    ],
)
def test_a_real_stream_holds_what_its_description_says(
    name: str,
    precopy: dict[str, int],
    postcopy: dict[str, int],
    section_id: int,
    switchover: int,
) -> None:
    reader = StreamReader()
    events = read(captured(name), reader)
    package = next(event for event in events if isinstance(event, m.Package))
    border = events.index(package)
    for part, counts in ((events[:border], precopy), (events[border:], postcopy)):
        assert Counter(event[0] for event in part if isinstance(event, tuple)) == counts
    assert len(package.data) == 32558
    assert parse_package(package.data).pings == (3,)
    assert reader.resume_state().section_id == section_id
    assert sum(isinstance(event, m.SwitchoverStart) for event in events) == switchover
    pings = [event.value for event in events if isinstance(event, m.Ping)]
    assert pings == [1, 2, 4]


@pytest.mark.parametrize("name", CAPTURES)
def test_every_page_of_every_block_came_and_has_its_content(name: str) -> None:
    events = read(captured(name))
    blocks = next(event for event in events if isinstance(event, m.BlockList))
    came = {event[1:3] for event in events if isinstance(event, tuple)}
    every = {
        (block.name, offset) for block in blocks.blocks for offset in range(0, block.length, PAGE)
    }
    assert came == every
    page = [event for event in events if isinstance(event, tuple) and event[2] == 0x10000]
    content = next(event[3] for event in reversed(page) if event[1] == "pc.ram")
    numbers = ((0x1234 + 7 * place) % 65536 for place in range(PAGE // 2))
    assert content == b"".join(number.to_bytes(2, "little") for number in numbers)


@pytest.mark.parametrize("name", CAPTURES)
def test_the_writer_writes_a_real_stream_again_byte_for_byte(name: str) -> None:
    data = captured(name)
    reader = StreamReader()
    events = read(data, reader)
    assert write_again(events, reader.resume_state().section_id) == data


def write_again(events: list[Event], section_id: int) -> bytes:
    """Encode what a source said, with the same choices that QEMU makes."""
    ram = writer.StreamWriter(section_id)
    parts: list[bytes] = []
    section: list[bytes] = []
    for event in events:
        match event:
            case ("page", str(block), int(offset), bytes(content)):
                section += (ram.page(block, offset), content)
            case ("zero", str(block), int(offset), _):
                section.append(ram.zero_page(block, offset))
            case m.RamSectionEnd("start"):
                pass
            case m.RamSectionEnd(kind):
                opening = ram.ram_part() if kind == "part" else ram.ram_end()
                parts += (opening, *section, ram.ram_footer())
                section.clear()
            case m.Configuration():
                parts.append(writer.configuration(event.machine, uuid=event.uuid))
                assert parts[-1] == event.raw
            case m.OpenReturnPath():
                parts.append(writer.open_return_path())
            case m.Ping(value):
                parts.append(writer.ping(value))
            case m.Advise(page_sizes, target_page_size):
                parts.append(writer.advise(page_sizes, target_page_size))
            case m.BlockList(_, blocks):
                parts.append(ram.ram_start(blocks))
            case m.SwitchoverStart():
                parts.append(writer.switchover_start())
            case m.Discard(block, ranges):
                parts.append(writer.discard(block, ranges))
            case m.Package(data):
                contents = parse_package(data)
                parts.append(writer.package(contents.device_state, contents.pings))
                ram.forget_block()
            case m.EndOfStream():
                parts.append(writer.END_OF_STREAM)
            case _:
                raise AssertionError(f"unexpected in a captured stream: {event}")
    return b"".join(parts)
