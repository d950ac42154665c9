"""Streams and return paths whose messages are well formed, or nearly so, and do not fit."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from random import Random

from postcopyd.wire import stream_writer as writer
from postcopyd.wire.messages import BlockEntry
from postcopyd.wire.return_path import ReturnPathWriter
from postcopyd.wire.stream_format import bitmap_size
from tests.fuzz.mutating import ODD_NUMBERS, changed_bytes, changed_order
from tests.wire.streams import DEVICES, PAGE, command, entry, ram_start, word

SECTION = 2
MACHINE = "pc-q35-7.2"
_WHOLE_HUGE_PAGES = 0.02
"""They are 2 MiB each: the others are begun and not completed."""
_COMMANDS = tuple(range(14))
_FLAGS = (0x2, 0x4, 0x8, 0x10, 0x22, 0x28, 0x28, 0x28, 0x1, 0xA, 0x40, 0x80, 0x100, 0x200, 0x800)


class HostileStreams:
    """Makes streams of a source for these blocks."""

    def __init__(self, blocks: Sequence[BlockEntry]) -> None:
        self.blocks = blocks

    def stream(self, numbers: Random) -> list[bytes]:
        """Return a new migration, message by message, wrong in a few places or in none."""
        return self._spoiled(numbers, self._head() + self._precopy(numbers) + self._rest(numbers))

    def resumed(self, numbers: Random) -> list[bytes]:
        """Return what a source says that comes back after a break."""
        parts = [writer.received_bitmap_request(block.name) for block in self.blocks]
        parts += [writer.postcopy_resume(), *self._sections(numbers, 2), *self._end(numbers)]
        return self._spoiled(numbers, parts)

    def preempt(self, numbers: Random) -> list[bytes]:
        """Return a preempt channel, record by record."""
        parts = self._records(numbers, numbers.randrange(5))
        if numbers.random() < 0.7:
            parts.append(word(0, 0x10))
        return self._spoiled(numbers, parts)

    def _spoiled(self, numbers: Random, parts: list[bytes]) -> list[bytes]:
        for _ in range(numbers.choice((0, 1, 1, 1, 2, 4))):
            if numbers.random() < 0.5:
                changed_order(numbers, parts, [self._odd(numbers), *parts])
            elif parts:
                place = numbers.randrange(len(parts))
                parts[place] = changed_bytes(numbers, parts[place])
        return parts

    def _head(self) -> list[bytes]:
        sizes = 0
        for block in self.blocks:
            sizes |= block.page_size
        return [
            writer.configuration(MACHINE),
            writer.open_return_path(),
            writer.ping(1),
            writer.advise(sizes, PAGE),
            writer.StreamWriter(SECTION).ram_start(self.blocks),
        ]

    def _precopy(self, numbers: Random) -> list[bytes]:
        return self._sections(numbers, numbers.randrange(2))

    def _rest(self, numbers: Random) -> list[bytes]:
        discards = [
            writer.discard(block.name, [(0, block.length)])
            for block in self.blocks
            if numbers.random() < 0.7
        ]
        parts = [*discards, writer.ping(2), writer.package(DEVICES), writer.ping(4)]
        return parts + self._sections(numbers, numbers.randrange(3)) + self._end(numbers)

    def _end(self, numbers: Random) -> list[bytes]:
        if numbers.random() < 0.3:
            return []
        head = struct.pack(">BI", 3, SECTION)
        return [head, *self._records(numbers, 1), self._footer(), writer.END_OF_STREAM]

    def _sections(self, numbers: Random, count: int) -> list[bytes]:
        parts = []
        for _ in range(count):
            parts.append(struct.pack(">BI", 2, SECTION))
            parts += self._records(numbers, numbers.randrange(4))
            parts.append(self._footer())
        return parts

    @staticmethod
    def _footer() -> bytes:
        return word(0, 0x10) + struct.pack(">BI", 0x7E, SECTION)

    def _records(self, numbers: Random, count: int) -> list[bytes]:
        """Return runs of pages and zero pages, some across the end of their block."""
        parts = []
        for _ in range(count):
            block = numbers.choice(self.blocks)
            ram = writer.StreamWriter(SECTION)
            size = numbers.choice((1, 1, 2, 3))
            if block.page_size > PAGE and numbers.random() < _WHOLE_HUGE_PAGES:
                size = block.page_size // PAGE
            first = numbers.randrange(block.length // PAGE) * PAGE
            offsets = range(first, min(first + size * PAGE, block.length), PAGE)
            if block.page_size == PAGE and numbers.random() < 0.1:
                offsets = range(first, first + size * PAGE, PAGE)
            if numbers.random() < 0.5:
                parts.append(ram.zero_pages(block.name, offsets))
            else:
                fill = numbers.randrange(1, 256).to_bytes(1, "big") * PAGE
                headers = ram.page_headers(block.name, offsets)
                parts.append(b"".join(header + fill for header in headers))
        return parts

    def _odd(self, numbers: Random) -> bytes:
        """Return a message that hardly belongs anywhere."""
        block = numbers.choice(self.blocks)
        name = block.name.encode()
        match numbers.randrange(9):
            case 0:
                length = numbers.choice((0, 1, 2, 4, 8, 16))
                return command(numbers.choice(_COMMANDS), numbers.randbytes(length))
            case 1:
                ranges = [(self._odd_number(numbers), self._odd_number(numbers))]
                return command(6, b"\0" + bytes((len(name),)) + name + b"\0" + _pairs(ranges))
            case 2:
                offset = self._odd_number(numbers) & ~0xFFF
                flags = numbers.choice(_FLAGS)
                named = b"" if flags & 0x20 else bytes((len(name),)) + name
                return word(offset, flags) + named + bytes(numbers.choice((0, 1, PAGE)))
            case 3:
                listed = b"".join(
                    entry(other.name.encode(), self._odd_number(numbers) & ~0xFFF)
                    for other in numbers.choices(self.blocks, k=2)
                )
                return ram_start(listed, self._odd_number(numbers) & ~0xFFF)
            case 4:
                return command(3, _pairs([(self._odd_number(numbers), self._odd_number(numbers))]))
            case 5:
                size = numbers.choice((0, 4, 5, 10, 0xFFFFFFFF, 16 << 20))
                return command(7, size.to_bytes(4, "big"))
            case 6:
                return writer.package(numbers.choice((b"", DEVICES, b"x", writer.package(b""))))
            case 7:
                return DEVICES
            case _:
                return numbers.choice(
                    (
                        writer.configuration("other"),
                        writer.received_bitmap_request(block.name),
                        writer.postcopy_resume(),
                        writer.switchover_start(),
                        writer.END_OF_STREAM,
                        writer.END_OF_STREAM + writer.vm_description(b"{}"),
                        self._footer(),
                    )
                )

    def _odd_number(self, numbers: Random) -> int:
        if numbers.random() < 0.5:
            block = numbers.choice(self.blocks)
            return numbers.choice((0, PAGE, block.page_size, block.length, block.length - PAGE))
        return numbers.choice(ODD_NUMBERS)

    # -- the other way -------------------------------------------------------------------------

    def return_path(self, numbers: Random) -> list[bytes]:
        """Return what a destination says, message by message."""
        said = ReturnPathWriter()
        parts = [self._answer(said, numbers) for _ in range(numbers.randrange(1, 8))]
        for _ in range(numbers.choice((0, 1, 1, 2))):
            if numbers.random() < 0.5:
                changed_order(numbers, parts, [self._odd_request(self.blocks[0], numbers), b"\0"])
            elif parts:
                place = numbers.randrange(len(parts))
                parts[place] = changed_bytes(numbers, parts[place])
        return parts

    def _answer(self, said: ReturnPathWriter, numbers: Random) -> bytes:
        block = numbers.choice(self.blocks)
        match numbers.randrange(8):
            case 0:
                return said.pong(numbers.randrange(5))
            case 1:
                return self._bitmap(said, block, numbers)
            case 2:
                return said.resume_ack()
            case 3:
                return said.switchover_ack()
            case 4:
                return said.shut(numbers.choice((0, 0, 1, 99)))
            case 5:
                return self._odd_request(block, numbers)
            case _:
                first = numbers.randrange(block.length // block.page_size) * block.page_size
                return said.request_pages(block.name, first, block.page_size)

    @staticmethod
    def _bitmap(said: ReturnPathWriter, block: BlockEntry, numbers: Random) -> bytes:
        size = bitmap_size(block.length, PAGE)
        pages = block.length // PAGE
        bits = numbers.getrandbits(pages) if numbers.random() < 0.9 else (1 << 8 * size) - 1
        return said.received_bitmap(block.name, bits.to_bytes(size, "little"))

    def _odd_request(self, block: BlockEntry, numbers: Random) -> bytes:
        name = bytes((len(block.name),)) + block.name.encode()
        offset = self._odd_number(numbers) % (1 << 64)
        length = self._odd_number(numbers) % (1 << 32)
        return struct.pack(">HHQI", 3, 12 + len(name), offset, length) + name


def _pairs(pairs: Sequence[tuple[int, int]]) -> bytes:
    return b"".join(struct.pack(">QQ", *pair) for pair in pairs)
