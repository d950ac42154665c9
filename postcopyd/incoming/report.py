"""What an operator can ask of a migration at any time: counters, latencies, times."""

from __future__ import annotations

from array import array
from typing import Final

import msgspec

from postcopyd.incoming.blocktime import ThreadReport

MOST_RANGES: Final = 1000
"""Missing ranges that a report names."""

_SUB_BITS = 4  # 16 steps for every doubling: a bucket is at most 6.25 % wide
_LOWEST = 10  # below 1.024 us everything is one bucket


class Histogram:
    """Durations in nanoseconds, in buckets at most 6.25 % wide, updated in place.

    Its size is fixed (about 4 KiB): 16 buckets for each doubling from 1 us to 18 minutes.
    """

    __slots__ = ("_counts", "count", "maximum", "total")

    def __init__(self) -> None:
        self._counts = array("Q", bytes(8 * (40 - _LOWEST << _SUB_BITS)))
        self.count = 0
        self.total = 0
        """Sum of all durations, nanoseconds."""
        self.maximum = 0
        """Longest duration, nanoseconds."""

    def record(self, nanoseconds: int) -> None:
        """Count one duration."""
        exponent = nanoseconds.bit_length() - 1
        if exponent < _LOWEST:
            place = 0
        else:
            place = (exponent - _LOWEST << _SUB_BITS) + (
                nanoseconds >> exponent - _SUB_BITS & (1 << _SUB_BITS) - 1
            )
        try:
            self._counts[place] += 1
        except IndexError:
            self._counts[-1] += 1
        self.count += 1
        self.total += nanoseconds
        if nanoseconds > self.maximum:
            self.maximum = nanoseconds

    def merge(self, other: Histogram) -> None:
        """Add all that `other` has counted."""
        for place, count in enumerate(other._counts):
            self._counts[place] += count
        self.count += other.count
        self.total += other.total
        self.maximum = max(self.maximum, other.maximum)

    def percentile(self, percent: float) -> float:
        """Return the upper edge, in nanoseconds, of the bucket of that percentile; 0 if empty."""
        if not self.count:
            return 0.0
        wanted = self.count * percent / 100
        seen = 0
        for place, count in enumerate(self._counts):
            seen += count
            if count and seen >= wanted:
                return float(min(_upper_edge(place), self.maximum))
        return float(self.maximum)

    def buckets(self) -> list[tuple[float, int]]:
        """Return (upper edge in microseconds, count) of each bucket that is not empty."""
        return [
            (_upper_edge(place) / 1000, count) for place, count in enumerate(self._counts) if count
        ]


def _upper_edge(place: int) -> int:
    exponent = (place >> _SUB_BITS) + _LOWEST
    step = (place & (1 << _SUB_BITS) - 1) + 1
    return (1 << exponent) + (step << exponent - _SUB_BITS)


class Counters(msgspec.Struct):
    """Counted in place while the migration runs. Pages are host pages."""

    faults: int = 0
    """Fault messages read, repeated ones included."""
    requests: int = 0
    """Host pages asked of the source because a fault waits for them."""
    pages_around: int = 0
    """Host pages asked of the source because faults come close to them."""
    pages_by_fault: int = 0
    """Pages placed while a fault waited for them."""
    pages_by_background: int = 0
    """Pages placed before anybody waited for them."""
    pages_precopy: int = 0
    """Pages that came before the switchover, repeats included."""
    pages_zero: int = 0
    """Of those placed: zero pages."""
    pages_duplicate: int = 0
    """Pages that were present already: counted, woken, never overwritten."""
    pages_removed: int = 0
    """Pages that came for memory that the VMM had given back: dropped."""
    retries: int = 0
    """Placings put off because the VMM's memory was changing or short."""

    def take_over(self, other: Counters) -> None:
        """Go on from what a predecessor has counted."""
        for counter in self.__struct_fields__:
            setattr(self, counter, getattr(other, counter))


class LatencyReport(msgspec.Struct, frozen=True):
    """How long faults waited, from reading the fault to placing the page. Microseconds."""

    count: int
    mean: float
    p50: float
    p99: float
    p999: float
    maximum: float
    buckets: list[tuple[float, int]]
    """(upper edge, count) of each bucket that is not empty."""

    @classmethod
    def of(cls, histogram: Histogram) -> LatencyReport:
        """Read a histogram."""
        return cls(
            count=histogram.count,
            mean=histogram.total / histogram.count / 1000 if histogram.count else 0.0,
            p50=histogram.percentile(50) / 1000,
            p99=histogram.percentile(99) / 1000,
            p999=histogram.percentile(99.9) / 1000,
            maximum=histogram.maximum / 1000,
            buckets=histogram.buckets(),
        )


class BlockReport(msgspec.Struct, frozen=True):
    """One RAM block."""

    name: str
    length: int
    page_size: int
    pages: int
    received: int
    watched: bool = True
    """False for a block that the VMM gets with its device state."""


class MissingRange(msgspec.Struct, frozen=True):
    """Memory that never came: an access to it is a memory error."""

    block: str
    offset: int
    """Bytes from the begin of the block."""
    length: int


class Missing(msgspec.Struct, frozen=True):
    """All that never came, in short: a list of it may be hundreds of megabytes."""

    first: list[MissingRange] = msgspec.field(default_factory=list)
    """The first `MOST_RANGES`, in order."""
    ranges: int = 0
    """How many there are."""
    length: int = 0
    """Bytes."""


class Report(msgspec.Struct, frozen=True):
    """A migration as it stands. All members are JSON values."""

    name: str
    state: str
    failure: str | None
    """Why it failed, or why it is paused."""
    vmm: str | None
    peer: str | None
    """Where the source is."""
    machine: str | None
    """Machine type, as the source's configuration says."""
    blocks: list[BlockReport] = msgspec.field(default_factory=list)
    length: int = 0
    """Bytes of all blocks."""
    received: int = 0
    """Bytes of them that are here."""
    package_length: int | None = None
    counters: Counters = msgspec.field(default_factory=Counters)
    bytes_received: int = 0
    """Bytes of the stream, headers included."""
    outstanding: int = 0
    """Pages that faults wait for now."""
    never_sent: int | None = None
    """Pages that the source never sent (they are zero there too); known at the end."""
    fault_latency: LatencyReport = msgspec.field(
        default_factory=lambda: LatencyReport.of(Histogram())
    )
    network: str | None = None
    """What is wrong with the network path to the source; None if nothing is known to be."""
    stalled_seconds: float | None = None
    """How long nothing has come though memory is missing; None while there is no alarm."""
    preempt: str | None = None
    """Where its preempt channel comes from; None if it has none."""
    threads: list[ThreadReport] = msgspec.field(default_factory=list)
    """How long each thread of the VMM was blocked, where they can be told apart."""
    downtime_seconds: float | None = None
    """From the source's first word of the switchover to the VMM's that it runs."""
    window_seconds: float | None = None
    """From the source's first word of the switchover to the last page."""
    guest_lost: bool = False
    """True when it has failed and its source could not take the guest back any more."""
    missing: list[MissingRange] = msgspec.field(default_factory=list)
    """Of a migration that was abandoned: the first `MOST_RANGES` that never came, in order."""
    missing_ranges: int = 0
    """How many ranges never came."""
    missing_length: int = 0
    """Bytes that never came."""
    waits_for_vmm: bool = False
    """True when everything is kept for another VMM, because one has not loaded its devices."""
    guest_may_have_run: bool = False
    """True when that one had everything and has exited without having said whether it ran."""
