"""Batches of RAM records: what goes to a connection with one call.

Page contents are not copied: a batch holds views of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Final, TypeAlias

import msgspec

from postcopyd.outgoing.report import Counts
from postcopyd.wire.stream_format import TARGET_PAGE_SIZE
from postcopyd.wire.stream_writer import END_OF_STREAM, StreamWriter

Buffer: TypeAlias = bytes | memoryview
Batch: TypeAlias = list[Buffer]
"""Bytes to be sent, in this order."""


class Pause(msgspec.Struct, frozen=True):
    """In place of a batch: nothing may be sent for a while, unless something is asked for."""

    seconds: float


BATCH_BYTES: Final = 256 << 10
"""A batch is full from here on: what a page that is asked for waits behind, at most, in here."""
BATCH_RECORDS: Final = 1024
"""A batch is full from here on too: zero pages are short, but to place them takes time."""
PART_BYTES: Final = 4 << 20
"""A section is closed from here on. Destinations read long ones with less effort."""
NOT_ZERO: Final = 0
IS_ZERO: Final = 1
_OTHER_KIND: Final = bytes((IS_ZERO, NOT_ZERO)) + bytes(254)
"""A table for `bytes.translate`."""
# Records that do not name their block: a word, then the page, or the fill byte of a zero page.
_PAGE_RECORD: Final = 8 + TARGET_PAGE_SIZE
_ZERO_RECORD: Final = 8 + 1


class RamRecords:
    """Collects RAM records of one connection into batches, in sections that it opens and closes."""

    def __init__(self, writer: StreamWriter, counts: Counts) -> None:
        """Write with `writer`, and count what is added in `counts`."""
        self._writer = writer
        self._counts = counts
        self._batch: Batch = []
        self._section_open = False
        self._section_bytes = 0
        self._records = 0
        self.size = 0
        """Bytes of the batch."""

    @property
    def full(self) -> bool:
        """True when the batch should be taken before more is added."""
        return self.size >= BATCH_BYTES or self._records >= BATCH_RECORDS

    @property
    def section_long(self) -> bool:
        """True when the open section should be closed at the next border of a host page."""
        return self._section_bytes >= PART_BYTES

    def add(self, block: str, offsets: Sequence[int], pages: Sequence[Buffer], zero: bytes) -> None:
        """Add target pages of one block, in this order.

        :param offsets: bytes in the block.
        :param pages: their contents, 4096 bytes each; not looked at where the page is zero.
        :param zero: for each page `IS_ZERO` or `NOT_ZERO`.
        """
        self.open_section()
        zeros = zero.count(IS_ZERO)
        if not zeros:
            self._add_pages(block, offsets, pages)
        elif zeros == len(offsets):
            self._append(self._writer.zero_pages(block, offsets))
        else:
            self._add_mixed(block, offsets, pages, zero)
        self._counts.zero_pages += zeros
        self._counts.pages += len(offsets) - zeros
        self._records += len(offsets)

    def _add_pages(self, block: str, offsets: Sequence[int], pages: Sequence[Buffer]) -> None:
        count = len(offsets)
        headers = self._writer.page_headers(block, offsets)
        interleaved: Batch = [b""] * (2 * count)
        interleaved[::2] = headers
        interleaved[1::2] = pages
        self._batch += interleaved
        # Only the first header may name the block: the others are as long as the last one.
        self._grow(len(headers[0]) + (count - 1) * len(headers[-1]) + count * TARGET_PAGE_SIZE)

    def _add_mixed(
        self, block: str, offsets: Sequence[int], pages: Sequence[Buffer], zero: bytes
    ) -> None:
        # All records of a kind are made at once, but for the first: it may name the block.
        if zero[0]:
            self._append(self._writer.zero_page(block, offsets[0]))
        else:
            self._add_pages(block, offsets[:1], pages[:1])
        zero = zero[1:]
        zero_offsets = list(compress(offsets[1:], zero))
        page_offsets = list(compress(offsets[1:], zero.translate(_OTHER_KIND)))
        zero_records = self._writer.zero_pages(block, zero_offsets)
        headers = iter(self._writer.page_headers(block, page_offsets))
        batch = self._batch
        pending = b""
        place = 0
        for is_zero, page in zip(zero, pages[1:], strict=True):
            if is_zero:
                pending += zero_records[place : place + _ZERO_RECORD]
                place += _ZERO_RECORD
            else:
                batch += (pending + next(headers), page)
                pending = b""
        if pending:
            batch.append(pending)
        self._grow(len(zero_records) + len(page_offsets) * _PAGE_RECORD)

    def open_section(self) -> None:
        """Begin a section for pages if none is open."""
        if not self._section_open:
            self._append(self._writer.ram_part())
            self._section_open = True

    def close_section(self) -> None:
        """Close the open section if there is one; commands may follow."""
        if self._section_open:
            self._append(self._writer.ram_footer())
            self._section_open = False
            self._section_bytes = 0

    def end(self) -> None:
        """Add the last section, and the end of the stream."""
        self.close_section()
        self._append(self._writer.ram_end() + self._writer.ram_footer() + END_OF_STREAM)

    def take(self) -> Batch:
        """Return the batch, which may be empty, and begin another."""
        batch = self._batch
        self._batch = []
        self.size = 0
        self._records = 0
        return batch

    def _append(self, record: bytes) -> None:
        self._batch.append(record)
        self._grow(len(record))

    def _grow(self, size: int) -> None:
        self.size += size
        self._section_bytes += size
