"""Collecting the RAM blocks that a VMM does not let us watch: ROMs, video memory.

Their pages wait here, whenever they come, until they are all there; the VMM gets them with its
device state and never faults on them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from bitarray import bitarray
from bitarray.util import intervals

from postcopyd.incoming.report import BlockReport
from postcopyd.incoming.vmm import CollectedBlock, FedBlock
from postcopyd.kernel.memory import HOST_PAGE_SIZE, Mapping
from postcopyd.wire.messages import Discard, Pages, ZeroPages


def _bitmap_bytes(block: FedBlock) -> int:
    return (block.maximum // HOST_PAGE_SIZE + 63) // 64 * 8


class _Collected:
    """The content of one block. Pages are of the common size."""

    def __init__(self, name: str, length: int, view: memoryview, bitmap: memoryview) -> None:
        self.name = name
        self.length = length
        self.pages = length // HOST_PAGE_SIZE
        self.view = view
        self._bits = bitarray(buffer=bitmap, endian="little")

    @property
    def received(self) -> bitarray:
        """One bit a page."""
        return self._bits[: self.pages]

    def mark(self, first: int, beyond: int, received: bool) -> None:
        self._bits[first:beyond] = received

    def has(self, page: int) -> bool:
        return bool(self._bits[page])

    def close(self) -> None:
        """Let go of the memory; `received` stays what it was."""
        self._bits = self.received
        self.view = memoryview(b"")


class Collection:
    """All blocks of one VMM that are collected, by the names of the source.

    They lie in one memory file, where a successor finds them: the content of each block, as long as
    it may become, then for each block its pages that have come, one bit each.
    """

    def __init__(self, blocks: Sequence[FedBlock]) -> None:
        """Begin with nothing; no memory is taken before `open`."""
        self.blocks = {block.name: block for block in blocks}
        self._mapping: Mapping | None = None
        self._collected: dict[str, _Collected] = {}

    def open(self, open_file: Callable[[int], int]) -> None:
        """Take the memory file, before the first `begin`.

        :param open_file: returns the descriptor of a memory file of so many bytes.
        :raise OSError: if there is no memory for it.
        :raise ValueError: if the file is of another size.
        """
        size = sum(block.maximum + _bitmap_bytes(block) for block in self.blocks.values())
        if size:
            descriptor = open_file(size)
            try:
                if (found := os.fstat(descriptor).st_size) != size:
                    raise ValueError(f"the collection has {found} bytes, its blocks need {size}")
                self._mapping = Mapping.of_file(descriptor, size)
            finally:
                os.close(descriptor)

    def __contains__(self, name: str) -> bool:
        return name in self.blocks

    def begin(self, name: str, length: int) -> None:
        """Take the block's length from the source, before its first page.

        What a predecessor has collected is there already.
        """
        assert self._mapping is not None
        memory = self._mapping.view
        start = 0
        bits = sum(block.maximum for block in self.blocks.values())
        for block in self.blocks.values():
            if block.name == name:
                self._collected[name] = _Collected(
                    name,
                    length,
                    memory[start : start + length],
                    memory[bits : bits + _bitmap_bytes(block)],
                )
            start += block.maximum
            bits += _bitmap_bytes(block)

    def take(self, message: Pages | ZeroPages) -> None:
        """Keep pages; the last one counts."""
        block = self._collected[message.block]
        view = block.view
        for place, offset in enumerate(message.offsets):
            if isinstance(message, Pages):
                view[offset : offset + HOST_PAGE_SIZE] = message.payload(place)
            elif block.has(offset // HOST_PAGE_SIZE):
                view[offset : offset + HOST_PAGE_SIZE] = bytes(HOST_PAGE_SIZE)
            page = offset // HOST_PAGE_SIZE
            block.mark(page, page + 1, True)

    def discard(self, message: Discard) -> None:
        """Forget what came for these ranges, whole pages."""
        block = self._collected[message.block]
        for start, length in message.ranges:
            # What is there now is overwritten by what comes; zero pages rely on zeros.
            block.view[start : start + length] = bytes(length)
            block.mark(start // HOST_PAGE_SIZE, (start + length) // HOST_PAGE_SIZE, False)

    def missing(self) -> Iterator[tuple[str, int, int]]:
        """Iterate over the ranges that are not here: block, offset and length in bytes."""
        for block in self._collected.values():
            for received, first, beyond in intervals(block.received):
                if not received:
                    yield block.name, first * HOST_PAGE_SIZE, (beyond - first) * HOST_PAGE_SIZE

    def received_bitmap(self, name: str) -> bytes:
        """Return the RECV_BITMAP payload of a block: one bit a page, whole 64-bit words."""
        bitmap = self._collected[name].received.tobytes()
        return bitmap + bytes(-len(bitmap) % 8)

    @property
    def complete(self) -> bool:
        """True when every page is here."""
        return all(block.received.all() for block in self._collected.values())

    @property
    def pages_received(self) -> int:
        """How many pages of all blocks are here."""
        return sum(block.received.count() for block in self._collected.values())

    def contents(self) -> tuple[CollectedBlock, ...]:
        """Return what is here, valid until `close`."""
        return tuple(
            CollectedBlock(block.name, block.length, block.view.toreadonly())
            for block in self._collected.values()
        )

    def reports(self) -> list[BlockReport]:
        """Tell of each block how much is here."""
        return [
            BlockReport(
                name=block.name,
                length=block.length,
                page_size=HOST_PAGE_SIZE,
                pages=len(block.received),
                received=block.received.count(),
                watched=False,
            )
            for block in self._collected.values()
        ]

    def close(self) -> None:
        """Release the memory, and keep what `reports` tells. Idempotent."""
        for block in self._collected.values():
            block.close()
        if self._mapping is not None:
            # Who still holds a part of it when the migration ends keeps the memory alive.
            self._mapping.close_when_unused()
