"""The page map: what is known of every host page, in a memory file that outlives the process.

A block has four bits a host page. They lie in one memory file, so a successor process that gets
the descriptor and the block table finds the state without asking anybody:

========= =========================================================================================
received  we have the page: it is placed, or staged, or known to be zero. Set *after* placing:
          placing again is harmless, believing too much is not.
requested the source was asked for it, for a fault on it or close to it. It is asked anew after a
          break.
staged    it came before the switchover and waits in the staging file, not yet placed.
zero      it reads as zeros by our own knowledge: it came as a zero page before the switchover, or
          the VMM removed it. It is never filled from the source.
========= =========================================================================================

Layout: per block, in table order, the four maps in the order above; each map is the bits of the
block's pages, least significant bit first, padded to a multiple of 8 bytes.
"""

from __future__ import annotations

import contextlib
import os

from bitarray import bitarray

from postcopyd.kernel import memory_file
from postcopyd.kernel.memory import Mapping
from postcopyd.ram.block import BlockTable, RamBlock

_MAPS = 4


def _map_bytes(block: RamBlock) -> int:
    return (block.pages + 63) // 64 * 8


class BlockMap:
    """The four maps of one block, as bitarrays over the shared memory. Index = host page number.

    The bitarrays may be longer than the block has pages; the bits behind its end stay 0.
    """

    __slots__ = ("received", "requested", "staged", "zero")

    def __init__(self, memory: memoryview, size: int) -> None:
        def bits(place: int) -> bitarray:
            start = place * size
            return bitarray(buffer=memory[start : start + size], endian="little")

        self.received = bits(0)
        self.requested = bits(1)
        self.staged = bits(2)
        self.zero = bits(3)


class PageMap:
    """The page maps of all blocks of a migration, over one memory file that this object owns."""

    def __init__(self, blocks: BlockTable, descriptor: int | None = None) -> None:
        """Make a map with every bit clear, or open the one behind `descriptor` (taken over).

        :raise ValueError: if the file is not of the size that the blocks need.
        :raise OSError: if the memory file cannot be made or mapped.
        """
        size = sum(_map_bytes(block) * _MAPS for block in blocks)
        if descriptor is None:
            descriptor = memory_file.create("postcopyd-page-map", size)
        self.descriptor = descriptor
        try:
            found = os.fstat(descriptor).st_size
            if found != size:
                raise ValueError(f"page map has {found} bytes, the blocks need {size}")
            self._mapping = Mapping.of_file(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise
        self._maps: list[BlockMap] = []
        start = 0
        for block in blocks:
            length = _map_bytes(block)
            end = start + length * _MAPS
            self._maps.append(BlockMap(self._mapping.view[start:end], length))
            start = end

    def __getitem__(self, index: int) -> BlockMap:
        """Return the maps of the block with that index in the table."""
        return self._maps[index]

    def __len__(self) -> int:
        return len(self._maps)

    def received_pages(self) -> int:
        """Count the host pages that are here, over all blocks."""
        return sum(maps.received.count() for maps in self._maps)

    def close(self) -> None:
        """Release mapping and descriptor; the maps must not be used after it. Idempotent.

        If somebody still holds a bitarray, the mapping goes with that.
        """
        if self.descriptor < 0:
            return
        for maps in self._maps:
            del maps.received, maps.requested, maps.staged, maps.zero
        self._maps.clear()
        with contextlib.suppress(BufferError):
            self._mapping.close()
        os.close(self.descriptor)
        self.descriptor = -1


def received_bitmap(block: RamBlock, maps: BlockMap, target_page_size: int) -> bytes:
    """Return the RECV_BITMAP payload of a block: one bit a *target* page, least significant first.

    The size is that of the source's own map: whole 64-bit words (qemu-wire, 4.2).
    """
    pages = block.pages
    factor = block.page_size // target_page_size
    received = maps.received[:pages]
    if factor > 1:
        wide = bitarray(pages * factor, endian="little")
        for page in range(pages):
            wide[page * factor : (page + 1) * factor] = received[page]
        received = wide
    bitmap = received.tobytes()
    return bitmap + bytes(-len(bitmap) % 8)
