"""What is here of a VMM's memory: the page map, and the staging of every block."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from bitarray import bitarray
from bitarray.util import intervals

from postcopyd.incoming.assembling import contiguous
from postcopyd.incoming.estate import Estate
from postcopyd.incoming.report import MOST_RANGES, BlockReport, Missing, MissingRange
from postcopyd.incoming.staging import BlockStage
from postcopyd.incoming.vmm import GuestMemory, HandedBlock
from postcopyd.kernel import memory_file
from postcopyd.ram.block import BlockTable, RamBlock
from postcopyd.ram.page_map import PageMap
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import Discard, Pages, ZeroPages


class Holdings:
    """The account of one VMM's memory, and what waits to be placed there."""

    def __init__(self, memory: GuestMemory, estate: Estate) -> None:
        """Begin with what a predecessor has left, or with nothing received.

        :raise OSError: if there is no memory for map or staging.
        :raise ValueError: if the blocks contradict each other, or what a predecessor has left.
        """
        self._estate = estate
        self.blocks = table_of(memory.blocks)
        self.page_map = PageMap(self.blocks, estate.take("page-map"))
        if not estate.leaves("page-map"):
            estate.keep("page-map", self.page_map.descriptor)
        self.stages: list[BlockStage] = []
        """By the index of their block."""
        self._closed = False
        try:
            for block, handed in zip(self.blocks, memory.blocks, strict=True):
                self.stages.append(self.new_stage(block, handed))
        except BaseException:
            self.close()
            raise

    def new_stage(self, block: RamBlock, handed: HandedBlock) -> BlockStage:
        """Return a stage for a block of the VMM's, and leave its file to a successor.

        :raise OSError: if there is no memory for it, or the VMM's file cannot be used.
        :raise ValueError: if what a predecessor has left is not of the size of the block.
        """
        if handed.memory_file is not None:
            return BlockStage(block, handed, self.page_map[block.index])
        file = self._estate.open(
            _staging_of(block), lambda: memory_file.create("postcopyd-staging", block.length)
        )
        return BlockStage(block, handed, self.page_map[block.index], file)

    def release_staging(self) -> None:
        """Leave no staging of blocks whose pages go straight into the VMM's memory."""
        for stage in self.stages:
            name = _staging_of(stage.block)
            if stage.direct and self._estate.leaves(name):
                self._estate.release(name)

    def block_of(self, name: str) -> RamBlock:
        """Return the block that the source calls so.

        :raise ProtocolError: if there is none.
        """
        block = self.blocks.by_name(name)
        if block is None:
            raise ProtocolError(f"block {name!r} is not one of the VMM's", None)
        return block

    def empty(self) -> None:
        """Make all shared memory truly empty; the VMM empties its private memory itself.

        :raise OSError: if a memory file does not let itself be emptied.
        """
        for stage in self.stages:
            stage.empty()

    @property
    def staged_bytes(self) -> int:
        """Memory that the staging takes."""
        return sum(stage.allocated for stage in self.stages if not stage.direct)

    def stage(self, block: RamBlock, message: Pages | ZeroPages, target_page_size: int) -> None:
        """Keep pages; of one that comes twice the last counts.

        :raise OSError: if there is no memory for them.
        """
        stage = self.stages[block.index]
        offsets = message.offsets
        in_one_piece = contiguous(message, target_page_size)
        if isinstance(message, Pages):
            if in_one_piece:
                stage.write(offsets[0], message.data)
            else:
                for place, offset in enumerate(offsets):
                    stage.write(offset, message.payload(place))
        elif in_one_piece:
            stage.write_zeros(offsets[0], len(offsets) * target_page_size)
        else:
            for offset in offsets:
                stage.write_zeros(offset, target_page_size)

    def keep(self, block: RamBlock, start: int, length: int, address: int) -> None:
        """Keep host pages that could not be placed, unless they are here.

        :param address: of their content in this process; 0 for zeros.
        :raise OSError: if there is no memory for them.
        """
        received = self.page_map[block.index].received
        stage = self.stages[block.index]
        size = block.page_size
        for offset in range(start, start + length, size):
            if received[offset // size]:
                continue
            if address:
                page = (ctypes.c_char * size).from_address(address + offset - start)
                stage.write(offset, memoryview(page).cast("B"))
            else:
                stage.write_zeros(offset, size)

    def discard(self, message: Discard) -> None:
        """Forget what came for these ranges.

        :raise ProtocolError: if a range is not whole host pages.
        """
        block = self.block_of(message.block)
        size = block.page_size
        for start, length in message.ranges:
            if start % size or length % size:
                raise ProtocolError(
                    f"discard of {start:#x}+{length:#x} in block {block.name!r} is not whole "
                    f"pages of {size:#x}",
                    None,
                )
            self.stages[block.index].discard(start, length)

    def all_came(self) -> None:
        """Take what has not come for zeros: a source that ends in pre-copy has sent everything."""
        for block in self.blocks:
            maps = self.page_map[block.index]
            maps.zero[: block.pages] |= ~self._received(block)
            maps.received[: block.pages] = 1

    def missing_pages(self) -> int:
        """Count the host pages that are not here."""
        return sum(block.pages for block in self.blocks) - self.page_map.received_pages()

    def missing_ranges(self) -> Iterator[MissingRange]:
        """Give what is not here, in order; of each block as it is when its turn comes."""
        for block in self.blocks:
            size = block.page_size
            for here, first, beyond in intervals(self._received(block)):
                if not here:
                    yield MissingRange(block.name, first * size, (beyond - first) * size)

    def missing(self) -> Missing:
        """Tell in short what is not here."""
        ranges = length = 0
        for block in self.blocks:
            missing = ~self._received(block)
            length += missing.count() * block.page_size
            ranges += (missing & ~(missing >> 1)).count()
        return Missing(list(islice(self.missing_ranges(), MOST_RANGES)), ranges, length)

    def _received(self, block: RamBlock) -> bitarray:
        return self.page_map[block.index].received[: block.pages]

    def outstanding_pages(self) -> int:
        """Count the host pages that were asked for and are not here."""
        return sum(outstanding.count() for _, outstanding in self.outstanding())

    def outstanding(self) -> Iterator[tuple[RamBlock, bitarray]]:
        """Give each block with a bit for each host page that was asked for and is not here."""
        for block in self.blocks:
            maps = self.page_map[block.index]
            yield block, maps.requested & ~maps.received

    def reports(self) -> list[BlockReport]:
        """Tell of each block how much is here."""
        return [
            BlockReport(
                name=block.name,
                length=block.length,
                page_size=block.page_size,
                pages=block.pages,
                received=0 if self._closed else self.page_map[block.index].received.count(),
            )
            for block in self.blocks
        ]

    def close(self) -> None:
        """Release map and staging. Idempotent."""
        if not self._closed:
            self._closed = True
            _close(self.stages)
            self.page_map.close()


def _staging_of(block: RamBlock) -> str:
    """Return the name in an estate of what is staged for a block."""
    return f"staging-{block.index}"


def _close(stages: Iterable[BlockStage]) -> None:
    for stage in stages:
        stage.close()


def table_of(blocks: Sequence[HandedBlock]) -> BlockTable:
    """Return the blocks as they lie in the VMM, in this order."""
    return BlockTable(
        [
            RamBlock(block.name, block.length, block.page_size, block.address, index)
            for index, block in enumerate(blocks)
        ]
    )
