"""A second, independent reader of the migration stream, to check what our source sends.

It is written from qemu-wire.md alone and shares nothing with `postcopyd.wire`. It wants the whole
stream at once, asserts every rule that it knows, and returns what it saw as plain tuples.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

PAGE = 4096
COMMANDS = {
    1: "OPEN_RETURN_PATH",
    2: "PING",
    3: "ADVISE",
    4: "LISTEN",
    5: "RUN",
    6: "DISCARD",
    7: "PACKAGED",
}


@dataclass
class Record:
    """One page: its content, or None for a zero page; `named` if it came with the block's name."""

    block: str
    offset: int
    content: bytes | None
    named: bool


@dataclass
class Item:
    """One message of the stream: what it is, and what it says."""

    what: str
    value: Any = None
    end: int = 0
    """Number of the byte behind it."""


class RawStream:
    """Reads a complete stream into `items`."""

    def __init__(self, data: bytes, huge: dict[str, int] | None = None) -> None:
        self.data = data
        self.place = 0
        self.items: list[Item] = []
        self.block: str | None = None
        self.section: int | None = None
        self.huge = huge or {}
        self._header()
        while self._message():
            pass
        assert self.place == len(data), f"{len(data) - self.place} bytes behind the end"

    def _take(self, count: int) -> bytes:
        assert self.place + count <= len(self.data), f"{count} bytes at {self.place}"
        self.place += count
        return self.data[self.place - count : self.place]

    def _number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "big")

    def _name(self) -> str:
        return self._take(self._number(1)).decode("ascii")

    def _saw(self, what: str, value: Any = None) -> None:
        self.items.append(Item(what, value, self.place))

    def _header(self) -> None:
        assert self._take(4) == b"QEVM"
        assert self._number(4) == 3
        assert self._number(1) == 7
        self._saw("CONFIGURATION", self._take(self._number(4)).decode())

    def _message(self) -> bool:
        kind = self._number(1)
        if kind == 0x08:
            self._command()
        elif kind == 0x00:
            self._saw("EOF")
            return False
        elif kind == 0x01:
            assert self.section is None, "a second START"
            self.section = self._number(4)
            assert (self._name(), self._number(4), self._number(4)) == ("ram", 0, 4)
            self._saw("START", self._block_list())
            self._footer()
        elif kind in (0x02, 0x03):
            assert self._number(4) == self.section
            records = self._records()
            self._footer()
            self._saw("PART" if kind == 2 else "END", records)
        else:
            raise AssertionError(f"section type {kind:#x} at {self.place - 1}")
        return True

    def _footer(self) -> None:
        assert self._number(1) == 0x7E
        assert self._number(4) == self.section

    def _block_list(self) -> list[tuple[str, int]]:
        word = self._number(8)
        assert word & 0xFFF == 0x004
        rest = word & ~0xFFF
        blocks = []
        while rest:
            name, length = self._name(), self._number(8)
            if name in self.huge:
                assert self._number(8) == self.huge[name]
            assert 0 < length <= rest
            rest -= length
            blocks.append((name, length))
        assert self._number(8) == 0x10
        return blocks

    def _records(self) -> list[Record]:
        records = []
        while (word := self._number(8)) != 0x10:
            flags, offset = word & 0xFFF, word & ~0xFFF
            named = not flags & 0x20
            if named:
                self.block = self._name()
            assert self.block is not None, "CONTINUE before any name"
            kind = flags & ~0x20
            assert kind in (0x02, 0x08), f"flags {flags:#x}"
            content: bytes | None = None
            if kind == 0x02:
                assert self._number(1) == 0
            else:
                content = self._take(PAGE)
            records.append(Record(self.block, offset, content, named))
        return records

    def _command(self) -> None:
        number, length = self._number(2), self._number(2)
        payload = self._take(length)
        name = COMMANDS[number]
        if name == "PING":
            assert length == 4
            self._saw(f"PING {int.from_bytes(payload, 'big')}")
        elif name == "ADVISE":
            self._saw(name, struct.unpack(">QQ", payload))
        elif name == "DISCARD":
            assert payload[0] == 0
            behind = 2 + payload[1]
            block = payload[2:behind].decode()
            assert payload[behind] == 0
            ranges = list(struct.iter_unpack(">QQ", payload[behind + 1 :]))
            assert 1 <= len(ranges) <= 12
            self._saw(name, (block, ranges))
        elif name == "PACKAGED":
            assert length == 4
            self._saw(name, self._take(int.from_bytes(payload, "big")))
        else:
            assert length == 0
            self._saw(name)

    # -- questions -----------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The messages in order, neighbours of one name as one."""
        names: list[str] = []
        for item in self.items:
            if not names or names[-1] != item.what:
                names.append(item.what)
        return names

    def all_of(self, what: str) -> list[Any]:
        return [item.value for item in self.items if item.what == what]

    def records(self, *, postcopy: bool) -> list[Record]:
        """The pages in front of, or behind, the package."""
        found: list[Record] = []
        behind = False
        for item in self.items:
            behind = behind or item.what == "PACKAGED"
            if item.what in ("PART", "END") and behind == postcopy:
                found += item.value
        return found
