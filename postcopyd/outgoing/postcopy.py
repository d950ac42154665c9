"""The post-copy phase as batches: requested pages first, then the scan, then the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from postcopyd.outgoing.bandwidth import Bandwidth
from postcopyd.outgoing.image import CHUNK_BYTES, ZERO_PAGE, ImageBlock
from postcopyd.outgoing.records import BATCH_BYTES, Batch, Pause, RamRecords
from postcopyd.outgoing.report import Counts
from postcopyd.outgoing.schedule import Run, SendSchedule
from postcopyd.wire.stream_format import TARGET_PAGE_SIZE

_CROWDED_BYTES: Final = 32 << 10
"""The size that batches of the scan begin with again when the connection is full. They double."""
_SMOOTHING_SECONDS: Final = 0.01
"""A batch of the scan is at most what the bandwidth allows in this time."""

_END_SECONDS: Final = 1.0
"""How long to wait for leave to end the stream, before asking again; leave that comes wakes up."""


class PostcopyPages:
    """What is sent behind the package, made when it is about to be sent.

    A request reaches `SendSchedule.request` at any time; it is served with the next batch.
    """

    def __init__(
        self,
        blocks: Sequence[ImageBlock],
        schedule: SendSchedule,
        records: RamRecords,
        bandwidth: Bandwidth,
        clock: Callable[[], float],
        counts: Counts,
        crowded: Callable[[], bool],
        may_end: Callable[[], bool],
    ) -> None:
        """Send what `schedule` says of `blocks`, which must not change any more.

        :param clock: seconds, never going back.
        :param crowded: true if the connection could not take the last batch at once.
        :param may_end: true if the end may be sent; asked when everything else was.
        :raise OSError: if a file cannot be asked for its holes.
        """
        self._blocks = blocks
        holes = [block.holes() for block in blocks]
        self._holes = [bits if bits.any() else None for bits in holes]
        self._schedule = schedule
        self._records = records
        self._bandwidth = bandwidth
        self._clock = clock
        self._crowded = crowded
        self._may_end = may_end
        self._most = BATCH_BYTES
        if bandwidth.rate is not None:
            self._most = min(BATCH_BYTES, int(bandwidth.rate * _SMOOTHING_SECONDS) or 1)
        self._scan_limit = min(_CROWDED_BYTES, self._most)
        self._counts = counts
        self._number = 0
        self._offsets: list[int] = []
        """Target pages of block `_number` that are to be sent next."""
        self.ended = False
        """True when the last batch has been made: the destination may know that it has all."""

    def batches(self) -> Iterator[Batch | Pause]:
        """Yield all that is to be sent up to and with the end of the stream."""
        schedule, records = self._schedule, self._records
        while True:
            yield from self._requested()
            if not schedule.remaining:
                if self._may_end():
                    break
                records.close_section()
                yield records.take() if records.size else Pause(_END_SECONDS)
                continue
            wait = self._bandwidth.wait(self._clock())
            if wait > 0:
                yield Pause(wait)
            else:
                yield from self._scanned()
        records.end()
        self.ended = True
        yield records.take()

    def _requested(self) -> Iterator[Batch]:
        while run := self._schedule.take_requested():
            self._counts.requests_answered += 1
            yield from self._add(run)
            if self._size >= BATCH_BYTES:
                yield self._take()
        if self._size:
            # Nothing of the scan behind it: the call that sends it is to be short.
            yield self._take()

    def _scanned(self) -> Iterator[Batch]:
        # What is left of a batch that did not fit stands in front of the next request.
        limit = _CROWDED_BYTES if self._crowded() else self._scan_limit * 2
        limit = self._scan_limit = min(limit, self._most)
        while self._size < limit and not self._records.full:
            run = self._schedule.take_scanned(min(CHUNK_BYTES, limit))
            if run is None:
                break
            yield from self._add(run)
        yield self._take()

    @property
    def _size(self) -> int:
        """Bytes of the batch, counting what was collected as if no page of it were zero."""
        return self._records.size + len(self._offsets) * TARGET_PAGE_SIZE

    def _take(self) -> Batch:
        """Return the batch; a section stays open only if more follows it at once."""
        self._add_records()
        records = self._records
        self._bandwidth.spend(records.size)
        if records.section_long or self._bandwidth.wait(self._clock()) > 0:
            records.close_section()
        return records.take()

    def _add(self, run: Run) -> Iterator[Batch]:
        """Add all target pages of a run, and yield the batches that get full on the way."""
        block = self._blocks[run.block]
        if run.block != self._number or len(self._offsets) >= CHUNK_BYTES // TARGET_PAGE_SIZE:
            self._add_records()
            self._number = run.block
        start = run.first * block.page_size
        end = start + run.pages * block.page_size
        for first in range(start, end, CHUNK_BYTES):
            if first > start:
                self._add_records()
                if self._records.full:
                    self._bandwidth.spend(self._records.size)
                    yield self._records.take()
            self._offsets += range(first, min(first + CHUNK_BYTES, end), TARGET_PAGE_SIZE)

    def _add_records(self) -> None:
        """Make records of the pages that were collected: many at once is much faster."""
        offsets = self._offsets
        if not offsets:
            return
        self._offsets = []
        block = self._blocks[self._number]
        holes = self._holes[self._number]
        memory = block.memory
        pages = [memory[offset : offset + TARGET_PAGE_SIZE] for offset in offsets]
        if holes is None:
            zero = bytes([ZERO_PAGE == page for page in pages])  # noqa: SIM300 - see there
        else:
            zero = bytes(
                [
                    holes[offset // TARGET_PAGE_SIZE] or ZERO_PAGE == page  # noqa: SIM300
                    for offset, page in zip(offsets, pages, strict=True)
                ]
            )
        self._records.add(block.name, offsets, pages, zero)
