"""RAM blocks: the named, contiguous pieces of a VMM's memory, and the table to find them in."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import msgspec


class RamBlock(msgspec.Struct, frozen=True):
    """One RAM block. Offsets in it are bytes from its start; pages are host pages, numbered from 0.

    :raise ValueError: if the sizes or the address are not whole host pages.
    """

    name: str
    """The name by which the source calls it."""
    length: int
    """Bytes, a multiple of `page_size`, more than 0."""
    page_size: int
    """Host page size in bytes, a power of two."""
    address: int
    """Where it is mapped in the VMM, bytes, a multiple of `page_size`."""
    index: int
    """Its place in the table."""

    def __post_init__(self) -> None:
        size = self.page_size
        if size <= 0 or size & (size - 1):
            raise ValueError(f"block {self.name!r}: page size {size} is not a power of two")
        for what, value in (("length", self.length), ("address", self.address)):
            if value <= 0 or value % size:
                raise ValueError(
                    f"block {self.name!r}: {what} {value:#x} is not a positive multiple of its "
                    f"page size {size:#x}"
                )

    @property
    def pages(self) -> int:
        """Number of host pages."""
        return self.length // self.page_size

    @property
    def end(self) -> int:
        """First address behind the block."""
        return self.address + self.length


class BlockTable:
    """The blocks of one VMM, in the order given.

    :raise ValueError: if two blocks share a name or an address.
    """

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._blocks = tuple(blocks)
        self._by_name = {block.name: block for block in blocks}
        if len(self._by_name) != len(self._blocks):
            names = [block.name for block in blocks]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two blocks have the name {twice!r}")
        self._by_address = sorted(blocks, key=lambda block: block.address)
        self._starts = [block.address for block in self._by_address]
        for before, after in zip(self._by_address, self._by_address[1:], strict=False):
            if before.end > after.address:
                raise ValueError(f"blocks {before.name!r} and {after.name!r} overlap")

    def __iter__(self) -> Iterator[RamBlock]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> RamBlock:
        return self._blocks[index]

    def by_name(self, name: str) -> RamBlock | None:
        """Return the block that the source calls `name`, None if there is none."""
        return self._by_name.get(name)

    def block_at(self, address: int) -> RamBlock | None:
        """Return the block that holds `address` (of the VMM), None if it lies outside them all."""
        place = bisect_right(self._starts, address) - 1
        if place < 0:
            return None
        block = self._by_address[place]
        return block if address < block.end else None

    @property
    def page_sizes(self) -> int:
        """The bitwise OR of all host page sizes: what ADVISE announces (qemu-wire, command 3)."""
        summary = 0
        for block in self._blocks:
            summary |= block.page_size
        return summary

    @property
    def length(self) -> int:
        """Bytes of all blocks together."""
        return sum(block.length for block in self._blocks)
