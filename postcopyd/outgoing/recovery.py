"""What a source that comes back asks, and what is still to be sent after the answers.

Sans-IO. The received bitmaps are authoritative: what was sent and is not in them is sent again,
because nobody knows where on its way it was lost (qemu-wire, 5.3).
"""

from __future__ import annotations

from collections.abc import Sequence

from bitarray import bitarray

from postcopyd.wire import stream_writer
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import BlockEntry
from postcopyd.wire.stream_format import TARGET_PAGE_SIZE


class Recovery:
    """The bitmaps of one resumed connection."""

    def __init__(self, blocks: Sequence[BlockEntry]) -> None:
        """Ask about `blocks`, the ones in the block list that was sent."""
        self._blocks = blocks
        self._missing: dict[str, bitarray] = {}

    def requests(self) -> bytes:
        """Return the first bytes of the connection: all bitmaps are asked for at once."""
        return b"".join(stream_writer.received_bitmap_request(block.name) for block in self._blocks)

    def take(self, block: str, bitmap: bytes) -> None:
        """Take the answer about one block, as `ReturnPathReader` gives it.

        :raise ProtocolError: if there was one already.
        """
        if block in self._missing:
            raise ProtocolError(f"a second received bitmap of block {block!r}", None)
        entry = next(entry for entry in self._blocks if entry.name == block)
        self._missing[block] = missing_pages(entry, bitmap)

    @property
    def complete(self) -> bool:
        """True when all answers are here."""
        return len(self._missing) == len(self._blocks)

    def missing(self) -> list[bitarray]:
        """Return for each block one bit a host page, 1 where it is to be sent."""
        return [self._missing[block.name] for block in self._blocks]


def missing_pages(block: BlockEntry, bitmap: bytes) -> bitarray:
    """Return one bit a *host* page: 1 unless the destination has all its target pages.

    :param bitmap: one bit a target page, in whole 64-bit words (qemu-wire, 4.2).
    """
    received = bitarray(endian="little")
    received.frombytes(bitmap)
    del received[block.length // TARGET_PAGE_SIZE :]
    factor = block.page_size // TARGET_PAGE_SIZE
    if factor == 1:
        return bitarray(~received, endian="big")
    missing = bitarray(len(received) // factor, endian="big")
    for page in range(len(missing)):
        missing[page] = received.find(0, page * factor, (page + 1) * factor) >= 0
    return missing
