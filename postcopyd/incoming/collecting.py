"""Collecting the RAM blocks that a VMM does not let us watch: ROMs, video memory.

Their pages wait here, whenever they come, until they are all there; the VMM gets them with its
device state and never faults on them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence

from bitarray import bitarray
from bitarray.util import intervals

from postcopyd.incoming.report import BlockReport
from postcopyd.incoming.vmm import CollectedBlock, FedBlock
from postcopyd.kernel.memory import HOST_PAGE_SIZE
from postcopyd.wire.messages import Discard, Pages, ZeroPages


class _Collected:
    """The content of one block. Pages are of the common size."""

    def __init__(self, block: FedBlock, length: int) -> None:
        self.name = block.name
        self.length = length
        # Who still holds a part of the view when the migration ends keeps the memory alive.
        self.view = memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.received = bitarray(length // HOST_PAGE_SIZE)


class Collection:
    """All blocks of one VMM that are collected, by the names of the source."""

    def __init__(self, blocks: Sequence[FedBlock]) -> None:
        """Begin with nothing; no memory is taken before `begin`."""
        self.blocks = {block.name: block for block in blocks}
        self._collected: dict[str, _Collected] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.blocks

    def begin(self, name: str, length: int) -> None:
        """Take the block's length from the source, before its first page.

        :raise OSError: if there is no memory for it.
        """
        self._collected[name] = _Collected(self.blocks[name], length)

    def take(self, message: Pages | ZeroPages) -> None:
        """Keep pages; the last one counts."""
        block = self._collected[message.block]
        view = block.view
        for place, offset in enumerate(message.offsets):
            if isinstance(message, Pages):
                view[offset : offset + HOST_PAGE_SIZE] = message.payload(place)
            elif block.received[offset // HOST_PAGE_SIZE]:
                view[offset : offset + HOST_PAGE_SIZE] = bytes(HOST_PAGE_SIZE)
            block.received[offset // HOST_PAGE_SIZE] = 1

    def discard(self, message: Discard) -> None:
        """Forget what came for these ranges, whole pages."""
        block = self._collected[message.block]
        for start, length in message.ranges:
            # What is there now is overwritten by what comes; zero pages rely on zeros.
            block.view[start : start + length] = bytes(length)
            block.received[start // HOST_PAGE_SIZE : (start + length) // HOST_PAGE_SIZE] = 0

    def missing(self) -> Iterator[tuple[str, int, int]]:
        """Iterate over the ranges that are not here: block, offset and length in bytes."""
        for block in self._collected.values():
            for received, first, beyond in intervals(block.received):
                if not received:
                    yield block.name, first * HOST_PAGE_SIZE, (beyond - first) * HOST_PAGE_SIZE

    @property
    def complete(self) -> bool:
        """True when every page is here."""
        return all(block.received.all() for block in self._collected.values())

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
            block.view = memoryview(b"")
