"""Batches of RAM records: what goes to a connection with one call.

Page contents are not copied: a batch holds views of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from postcopyd.outgoing.report import Counts
from postcopyd.wire.stream_format import TARGET_PAGE_SIZE
from postcopyd.wire.stream_writer import END_OF_STREAM, StreamWriter

Buffer: TypeAlias = bytes | memoryview
Batch: TypeAlias = list[Buffer]
"""Bytes to be sent, in this order."""


@dataclass(frozen=True, slots=True)
class Pause:
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

    def add(
        self, block: str, offsets: Sequence[int], pages: Sequence[Buffer], zero: bytes | bytearray
    ) -> None:
        """Add target pages of one block, in this order.

        :param offsets: bytes in the block.
        :param pages: their contents, 4096 bytes each; not looked at where the page is zero.
        :param zero: for each page `IS_ZERO` or `NOT_ZERO`.
        """
        self.open_section()
        count = len(offsets)
        first = 0
        while first < count:
            kind = zero[first]
            end = zero.find(NOT_ZERO if kind else IS_ZERO, first)
            if end < 0:
                end = count
            if kind:
                self._append(self._writer.zero_pages(block, offsets[first:end]))
                self._counts.zero_pages += end - first
            else:
                self._add_pages(block, offsets[first:end], pages[first:end])
            first = end
        self._records += count

    def _add_pages(self, block: str, offsets: Sequence[int], pages: Sequence[Buffer]) -> None:
        count = len(offsets)
        headers = self._writer.page_headers(block, offsets)
        interleaved: Batch = [b""] * (2 * count)
        interleaved[::2] = headers
        interleaved[1::2] = pages
        self._batch += interleaved
        # Only the first header may name the block: the others are as long as the last one.
        size = len(headers[0]) + (count - 1) * len(headers[-1]) + count * TARGET_PAGE_SIZE
        self.size += size
        self._section_bytes += size
        self._counts.pages += count

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
        self.size += len(record)
        self._section_bytes += len(record)
