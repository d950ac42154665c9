"""Pre-copy: passes over the memory of a guest that may still run, and what changed behind them.

What was sent of each page is remembered as a digest, because nobody tells which pages the guest
wrote to. The digest has 128 bits: a page whose change it did not see would be stale for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from bitarray import bitarray

from postcopyd.outgoing.bandwidth import Bandwidth
from postcopyd.outgoing.image import CHUNK_BYTES, ZERO_PAGE, ImageBlock
from postcopyd.outgoing.records import IS_ZERO, NOT_ZERO, Batch, Pause, RamRecords
from postcopyd.wire.stream_format import TARGET_PAGE_SIZE

_DIGEST_LENGTH: Final = 16
_ZERO_DIGEST: Final = bytes(_DIGEST_LENGTH)


class SentPages:
    """What the destination has of one block: a digest of every target page that was sent."""

    def __init__(self, block: ImageBlock) -> None:
        """Nothing of `block` has been sent."""
        self.block = block
        self._digests: bytearray | None = None

    def send_pass(self, records: RamRecords) -> Iterator[int]:
        """Add to `records` the pages that were never sent, or changed since they were.

        :return: yields after each chunk how many bytes of the block have been looked at.
        :raise OSError: if the file cannot be asked for its holes.
        """
        block = self.block
        first_time = self._digests is None
        if self._digests is None:
            self._digests = bytearray(block.length // TARGET_PAGE_SIZE * _DIGEST_LENGTH)
        holes = block.holes()
        for start in range(0, block.length, CHUNK_BYTES):
            end = min(start + CHUNK_BYTES, block.length)
            pages, found = _look(block, start, end, holes)
            changed = range(len(found)) if first_time else self._changed(start, found)
            if changed:
                zero = bytes([IS_ZERO if found[i] is _ZERO_DIGEST else NOT_ZERO for i in changed])
                records.add(
                    block.name,
                    [start + place * TARGET_PAGE_SIZE for place in changed],
                    [pages[place] for place in changed],
                    zero,
                )
                at = start // TARGET_PAGE_SIZE * _DIGEST_LENGTH
                self._digests[at : at + len(found) * _DIGEST_LENGTH] = b"".join(found)
            yield end

    def find_stale(self) -> Iterator[tuple[int, bitarray | None]]:
        """Find what the destination does not have as it is now.

        :return: yields after each chunk how many bytes of the block have been looked at, with the
            last of them the result: one bit a *host* page, 1 where any of its target pages was
            never sent, or changed.
        :raise OSError: if the file cannot be asked for its holes.
        """
        block = self.block
        stale = bitarray(block.pages)
        if self._digests is None:
            stale.setall(1)
            yield block.length, stale
            return
        holes = block.holes()
        for start in range(0, block.length, CHUNK_BYTES):
            end = min(start + CHUNK_BYTES, block.length)
            _, found = _look(block, start, end, holes)
            for place in self._changed(start, found):
                stale[(start + place * TARGET_PAGE_SIZE) // block.page_size] = 1
            yield end, stale if end == block.length else None

    def _changed(self, start: int, found: list[bytes]) -> list[int]:
        """Return which of these digests, of the pages from `start` on, are not those sent."""
        assert self._digests is not None
        at = start // TARGET_PAGE_SIZE * _DIGEST_LENGTH
        sent = self._digests[at : at + len(found) * _DIGEST_LENGTH]
        if sent == b"".join(found):
            return []
        return [
            place
            for place, digest in enumerate(found)
            if sent[place * _DIGEST_LENGTH : (place + 1) * _DIGEST_LENGTH] != digest
        ]


def send_pass(
    blocks: Sequence[SentPages],
    records: RamRecords,
    bandwidth: Bandwidth,
    clock: Callable[[], float],
    looked_at: Callable[[int], None],
) -> Iterator[Batch | Pause]:
    """Yield the batches of one pass over all blocks: at least one section, even if it is empty.

    :param clock: seconds, never going back.
    :param looked_at: told after each chunk how many bytes of memory the pass has behind it.
    :raise OSError: if a file cannot be asked for its holes.
    """
    records.open_section()
    behind = 0
    for pages in blocks:
        for done in pages.send_pass(records):
            looked_at(behind + done)
            bandwidth.spend(records.size)
            yield records.take()  # also if it is empty: others want a turn too
            while (wait := bandwidth.wait(clock())) > 0:
                yield Pause(wait)
            if records.section_long:
                records.close_section()
        behind += pages.block.length
    records.open_section()
    records.close_section()
    yield records.take()


def _look(
    block: ImageBlock, start: int, end: int, holes: bitarray
) -> tuple[list[bytes], list[bytes]]:
    """Return contents and digests of the target pages from `start` to `end`, bytes in the block.

    The contents are copies: a page that the guest writes to between digest and sending, and
    changes back later, would look as if the destination had it. Those of zero pages are empty.
    """
    memory = block.memory
    pages: list[bytes] = []
    digests: list[bytes] = []
    digest_of = hashlib.blake2b
    for offset in range(start, end, TARGET_PAGE_SIZE):
        page = (
            b""
            if holes[offset // TARGET_PAGE_SIZE]
            else bytes(memory[offset : offset + TARGET_PAGE_SIZE])
        )
        if not page or page == ZERO_PAGE:
            pages.append(b"")
            digests.append(_ZERO_DIGEST)
        else:
            pages.append(page)
            digests.append(
                digest_of(page, digest_size=_DIGEST_LENGTH, usedforsecurity=False).digest()
            )
    return pages, digests
