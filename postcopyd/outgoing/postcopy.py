"""The post-copy phase as batches: requested pages first, then the scan, then the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from postcopyd.outgoing.bandwidth import Bandwidth
from postcopyd.outgoing.image import CHUNK_BYTES, ZERO_PAGE, ImageBlock
from postcopyd.outgoing.records import BATCH_BYTES, IS_ZERO, Batch, Pause, RamRecords
from postcopyd.outgoing.report import Counts
from postcopyd.outgoing.schedule import Run, SendSchedule
from postcopyd.wire.stream_format import TARGET_PAGE_SIZE

_CROWDED_BYTES: Final = 32 << 10
"""The size that batches of the scan begin with again when the connection is full. They double."""
_SMOOTHING_SECONDS: Final = 0.01
"""A batch of the scan is at most what the bandwidth allows in this time."""


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
    ) -> None:
        """Send what `schedule` says of `blocks`, which must not change any more.

        :param clock: seconds, never going back.
        :param crowded: true if the connection could not take the last batch at once.
        :raise OSError: if a file cannot be asked for its holes.
        """
        self._blocks = blocks
        self._holes = [block.holes() for block in blocks]
        self._schedule = schedule
        self._records = records
        self._bandwidth = bandwidth
        self._clock = clock
        self._crowded = crowded
        self._most = BATCH_BYTES
        if bandwidth.rate is not None:
            self._most = min(BATCH_BYTES, int(bandwidth.rate * _SMOOTHING_SECONDS) or 1)
        self._scan_limit = min(_CROWDED_BYTES, self._most)
        self._counts = counts
        self.ended = False
        """True when the last batch has been made: the destination may know that it has all."""

    def batches(self) -> Iterator[Batch | Pause]:
        """Yield all that is to be sent up to and with the end of the stream."""
        schedule, records = self._schedule, self._records
        while True:
            yield from self._requested()
            if not schedule.remaining:
                break
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
            if self._records.full:
                yield self._take()
        if self._records.size:
            # Nothing of the scan behind it: the call that sends it is to be short.
            yield self._take()

    def _scanned(self) -> Iterator[Batch]:
        records = self._records
        # What is left of a batch that did not fit stands in front of the next request.
        limit = _CROWDED_BYTES if self._crowded() else self._scan_limit * 2
        limit = self._scan_limit = min(limit, self._most)
        while not records.full and records.size < limit:
            run = self._schedule.take_scanned(min(CHUNK_BYTES, limit))
            if run is None:
                break
            yield from self._add(run)
        yield self._take()

    def _take(self) -> Batch:
        """Return the batch; a section stays open only if more follows it at once."""
        records = self._records
        self._bandwidth.spend(records.size)
        if records.section_long or self._bandwidth.wait(self._clock()) > 0:
            records.close_section()
        return records.take()

    def _add(self, run: Run) -> Iterator[Batch]:
        """Add all target pages of a run, and yield the batches that get full on the way."""
        block = self._blocks[run.block]
        holes = self._holes[run.block]
        records = self._records
        memory, name = block.memory, block.name
        start = run.first * block.page_size
        end = start + run.count * block.page_size
        for first in range(start, end, CHUNK_BYTES):
            if records.full:
                self._bandwidth.spend(records.size)
                yield records.take()
            behind = min(first + CHUNK_BYTES, end)
            offsets = range(first, behind, TARGET_PAGE_SIZE)
            hole = holes[first // TARGET_PAGE_SIZE : behind // TARGET_PAGE_SIZE]
            if hole.all():
                records.add(name, offsets, (), bytes((IS_ZERO,)) * len(offsets))
                continue
            pages = [memory[offset : offset + TARGET_PAGE_SIZE] for offset in offsets]
            zero = bytes(
                [
                    bit or ZERO_PAGE == page  # noqa: SIM300 - see there
                    for bit, page in zip(hole, pages, strict=True)
                ]
            )
            records.add(name, offsets, pages, zero)
