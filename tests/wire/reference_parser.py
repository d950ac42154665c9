"""A second reader of migration streams, as slow and plain as can be, to compare the real one with.

It has the whole stream at once, reads one record after the other, and shares no code with the
reader but the message classes.
"""

from __future__ import annotations

from postcopyd.wire import messages as m
from tests.wire.streams import Event


class Wrong(Exception):
    """A mistake; says at which byte what is wrong begins."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


class _Stop(Exception):
    """The bytes stop here."""


class ReferenceParser:
    """Reads `data`; `events` is what it says, `wrong_at` where a mistake is."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.events: list[Event] = []
        self.wrong_at: int | None = None
        self.blocks: dict[bytes, m.BlockEntry] = {}
        self.page_sizes: int | None = None
        self.return_path = False
        self.ram_id: int | None = None
        self.ram_ended = False
        self.block: bytes | None = None
        try:
            self.stream()
        except _Stop:
            pass
        except Wrong as wrong:
            self.wrong_at = wrong.position

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise _Stop
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def name(self) -> bytes:
        return self.take(self.number(1))

    def text(self, name: bytes, position: int) -> str:
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise Wrong(position) from None
        if text == "" or "\0" in text:
            raise Wrong(position)
        return text

    def require(self, condition: bool, position: int) -> None:
        if not condition:
            raise Wrong(position)

    def stream(self) -> None:
        self.require(self.take(4) == b"QEVM", 0)
        self.require(self.number(4) == 3, 0)
        self.require(self.number(1) == 7, 8)
        length = self.number(4)
        self.require(1 <= length <= 255, 8)
        machine = self.text(self.take(length), 8)
        self.take(1)
        self.at -= 1
        # Subsections are left to the tests of the configuration.
        self.require(self.data[self.at] != 5, self.at)
        self.events.append(m.Configuration(machine, (), None, self.data[: self.at]))
        while True:
            position = self.at
            kind = self.number(1)
            if kind == 0:
                self.require(self.ram_id is None or self.ram_ended, position)
                self.events.append(m.EndOfStream())
                break
            if kind == 8:
                self.command(position)
            elif kind in (1, 4):
                self.named_section(kind, position)
            elif kind in (2, 3):
                self.require(self.number(4) == self.ram_id, position)
                self.require(not self.ram_ended, position)
                self.ram("part" if kind == 2 else "end")
                self.ram_ended = kind == 3
            else:
                raise Wrong(position)
        position = self.at
        if self.number(1) == 6:
            length = self.number(4)
            self.require(length <= 16 << 20, position)
            self.take(length)
            self.events.append(m.VmDescription(length))
            position = self.at
            self.take(1)
        raise Wrong(position)

    def command(self, position: int) -> None:
        number, length = self.number(2), self.number(2)
        self.require(1 <= number <= 11, position)
        lengths = {1: 0, 2: 4, 3: 16, 4: 0, 5: 0, 7: 4, 8: 0, 9: 0, 11: 0}
        self.require(lengths.get(number, length) == length, position)
        payload = self.take(length)
        if number == 1:
            self.return_path = True
            self.events.append(m.OpenReturnPath())
        elif number == 2:
            self.require(self.return_path, position)
            self.events.append(m.Ping(int.from_bytes(payload, "big")))
        elif number == 3:
            sizes, page = int.from_bytes(payload[:8], "big"), int.from_bytes(payload[8:], "big")
            self.require(page == 4096 and sizes > 0 and sizes % page == 0, position)
            self.require(self.page_sizes is None and self.ram_id is None, position)
            self.page_sizes = sizes
            self.events.append(m.Advise(sizes, page))
        elif number == 6:
            self.discard(payload, position)
        elif number == 7:
            self.package(int.from_bytes(payload, "big"), position)
        elif number == 9:
            self.events.append(m.PostcopyResume())
        elif number == 10:
            self.require(len(payload) > 0 and payload[0] == len(payload) - 1, position)
            self.require(payload[1:] in self.blocks, position)
            self.events.append(m.ReceivedBitmapRequest(payload[1:].decode()))
        elif number == 11:
            self.events.append(m.SwitchoverStart())
        else:
            raise Wrong(position)

    def discard(self, payload: bytes, position: int) -> None:
        self.require(len(payload) >= 2 and payload[0] == 0, position)
        name, rest = payload[2 : 2 + payload[1]], payload[2 + payload[1] :]
        self.require(len(name) == payload[1] and rest[:1] == b"\0", position)
        self.require(name in self.blocks, position)
        block = self.blocks[name]
        rest = rest[1:]
        self.require(len(rest) > 0 and len(rest) % 16 == 0, position)
        ranges = []
        while rest:
            start, length = int.from_bytes(rest[:8], "big"), int.from_bytes(rest[8:16], "big")
            self.require(start % block.page_size == 0, position)
            self.require(length % block.page_size == 0 and length > 0, position)
            self.require(start + length <= block.length, position)
            ranges.append((start, length))
            rest = rest[16:]
        self.events.append(m.Discard(block.name, tuple(ranges)))

    def package(self, length: int, position: int) -> None:
        self.require(length <= 16 << 20, position)
        begin = self.at
        data = self.take(length)
        self.require(data[:5] == bytes.fromhex("0800040000"), begin)
        self.require(len(data) >= 10 and data[-5:] == bytes.fromhex("0800050000"), begin)
        inside = data[5:-5]
        while inside[-9:-4] == bytes.fromhex("0800020004"):
            inside = inside[:-9]
        if inside:
            self.require(inside[0] in (1, 2, 3, 4), begin + 5)
            self.require(inside[-5:-4] == b"\x7e", begin + 5 + len(inside))
        self.events.append(m.Package(data))

    def named_section(self, kind: int, position: int) -> None:
        section_id = self.number(4)
        name = self.name()
        instance, version = self.number(4), self.number(4)
        self.require(name != b"", position)
        if name != b"ram":
            self.events.append(m.DeviceState(position))
            self.events.append(m.Opaque(memoryview(self.data[position:])))
            raise _Stop
        self.require(kind == 1 and self.ram_id is None, position)
        self.require(instance == 0 and version == 4, position)
        self.ram_id = section_id
        self.start_position = position
        self.ram("start")

    def ram(self, kind: str) -> None:
        listed = kind != "start"
        while True:
            position = self.at
            word = self.number(8)
            flags, value = word % 4096, word - word % 4096
            if word == 0x10:
                break
            if flags == 4:
                self.require(not listed, position)
                listed = True
                self.block_list(value)
                continue
            self.require(flags in (0x02, 0x22, 0x08, 0x28), position)
            if flags & 0x20:
                self.require(self.block is not None, position)
                name = self.block
            else:
                name = self.name()
            assert name is not None
            self.require(name in self.blocks, position)
            block = self.blocks[name]
            self.require(value < block.length, position)
            if flags & 0x02:
                self.require(self.number(1) == 0, position)
                self.events.append(("zero", block.name, value, b""))
            else:
                self.events.append(("page", block.name, value, self.take(4096)))
            self.block = name
        self.require(listed, self.start_position if kind == "start" else position)
        position = self.at
        footer = self.take(5)
        self.require(footer[0] == 0x7E, position)
        self.require(int.from_bytes(footer[1:], "big") == self.ram_id, position)
        self.events.append(m.RamSectionEnd(kind))  # type: ignore[arg-type]

    def block_list(self, total: int) -> None:
        blocks: dict[bytes, m.BlockEntry] = {}
        rest = total
        while rest:
            position = self.at
            self.require(len(blocks) < 4096, position)
            encoded = self.name()
            name = self.text(encoded, position)
            self.require(encoded not in blocks, position)
            length = self.number(8)
            self.require(0 < length <= rest, position)
            page_size = 4096
            if self.page_sizes is not None:
                word = self.number(8)
                if any(word == 1 << bit and self.page_sizes >> bit & 1 for bit in range(13, 64)):
                    page_size = word
                else:
                    self.at -= 8
                self.require(self.page_sizes & page_size != 0, position)
            self.require(length % page_size == 0, position)
            blocks[encoded] = m.BlockEntry(name, length, page_size)
            rest -= length
        self.blocks = blocks
        self.events.append(m.BlockList(total, tuple(blocks.values())))
