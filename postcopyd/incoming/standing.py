"""How a migration stands, as whoever asks is told, and as a successor is."""

from __future__ import annotations

from copy import copy
from time import perf_counter

from postcopyd.incoming import source_record
from postcopyd.incoming.arrival import Arrival
from postcopyd.incoming.course import Course
from postcopyd.incoming.journal import MigrationRecord, VmmRecord
from postcopyd.incoming.legacy import Legacy
from postcopyd.incoming.recipient import Recipient
from postcopyd.incoming.report import Counters, Histogram, LatencyReport, Missing, Report
from postcopyd.incoming.source_link import SourceLink
from postcopyd.incoming.states import State
from postcopyd.incoming.switchover import Switchover
from postcopyd.wire.stream_reader import ResumeState


class Standing:
    """What is known of one migration: by its parts, and by nobody else what is kept here."""

    def __init__(
        self,
        name: str,
        course: Course,
        recipient: Recipient,
        switchover: Switchover,
        arrival: Arrival,
        counters: Counters,
        latency: Histogram,
    ) -> None:
        """Begin with nothing known."""
        self._name = name
        self._course = course
        self._recipient = recipient
        self._switchover = switchover
        self._arrival = arrival
        self._counters = counters
        self._latency = latency
        self._vmm: VmmRecord | None = None
        self._bytes_before = 0
        self._resident_at: float | None = None
        self._final: Report | None = None
        self.link: SourceLink | None = None
        """What connects us with the source now."""
        self.resume: ResumeState | None = None
        """What a source that comes back does not say again."""
        self.peer: str | None = None
        """Where the source is, None before one has connected."""
        self.preempt: str | None = None
        """Where its preempt channel comes from."""
        self.never_sent: int | None = None
        """Host pages; known when everything has come."""
        self.missing = Missing()
        """What the guest has to do without."""
        self.guest_lost = False

    # -- what changes ----------------------------------------------------------------------------

    def connected(self, link: SourceLink, peer: str) -> None:
        """Say that there is a source, at `peer`."""
        self.link = link
        self.peer = peer

    def disconnected(self) -> SourceLink | None:
        """Say that there is no source any more; return what has connected us, if anything has."""
        link, self.link = self.link, None
        if link is not None:
            self._bytes_before += link.bytes_received
            if self._recipient.has_block_list:
                self.resume = link.resume_state()
        return link

    def all_is_resident(self, never_sent: int) -> None:
        """Say that the VMM has all its memory for itself."""
        self.never_sent = never_sent
        self._resident_at = perf_counter()

    def take_over(self, legacy: Legacy) -> None:
        """Know what a predecessor knew, whatever becomes of it."""
        record = legacy.record
        self._vmm = record.vmm
        self.peer = record.peer
        self._counters.take_over(record.counters)
        self._bytes_before = record.bytes_received

    def recorded(self, record: MigrationRecord) -> None:
        """Say that this is what a successor is told now."""
        self._vmm = record.vmm

    # -- what is told ----------------------------------------------------------------------------

    @property
    def waits_for_vmm(self) -> bool:
        """True when everything is kept for another VMM, because one has not loaded its devices.

        Until that one has all of it: no page may come between.
        """
        recipient = self._recipient
        without = recipient.vmm is None or recipient.moving
        return without and self._course.state is State.PAUSED

    @property
    def guest_may_have_run(self) -> bool:
        """True when that one had everything, and has gone without having said whether it ran."""
        return self.waits_for_vmm and self._recipient.may_run

    @property
    def package(self) -> bytes | None:
        """The device package as it was received, None before it has come."""
        package = self._recipient.loading.package if self._recipient.begun else None
        return package.data if package is not None else None

    @property
    def bytes_received(self) -> int:
        """Of all streams."""
        return self._bytes_before + (self.link.bytes_received if self.link else 0)

    @property
    def window_seconds(self) -> float | None:
        """From the switchover until all memory was here; None before, and for a predecessor's."""
        began_at = self._switchover.began_at
        if began_at is None or self._resident_at is None:
            return None
        return self._resident_at - began_at

    def record(self) -> MigrationRecord:
        """Return what a successor has to know."""
        recipient = self._recipient
        if self.link is not None and recipient.has_block_list:
            self.resume = self.link.resume_state()
        source = None
        if self.package is not None and self.resume is not None:
            source = source_record.record_of(recipient.loading, self.resume)
        return MigrationRecord(
            state=self._course.state.value,
            failure=self._course.failure,
            peer=self.peer,
            preempt=self.preempt,
            vmm=recipient.vmm_record() or self._vmm,
            waits_for_vmm=self.waits_for_vmm,
            may_run=recipient.may_run,
            source=source,
            switchover_at=self._switchover.began_at,
            loaded_at=recipient.loaded_at,
            all_came=self._arrival.complete,
            bytes_received=self.bytes_received,
            counters=copy(self._counters),
        )

    def settle(self, stalled_seconds: float | None, network: str | None) -> None:
        """Report from now on what is so now: the migration has ended. As `report`."""
        self._final = self._make_report(stalled_seconds, network)

    def report(self, stalled_seconds: float | None, network: str | None) -> Report:
        """Tell how it stands.

        :param stalled_seconds: for how long nothing has come that is waited for, if that is so.
        :param network: why the network does not carry the stream; None if it does.
        """
        return self._final or self._make_report(stalled_seconds, network)

    def _make_report(self, stalled_seconds: float | None, network: str | None) -> Report:
        recipient, state = self._recipient, self._course.state
        blocks = recipient.blocks()
        package = self.package
        return Report(
            name=self._name,
            state=state.value,
            failure=self._course.failure,
            vmm=recipient.vmm.description if recipient.vmm else None,
            peer=self.peer,
            machine=recipient.loading.configuration.machine if recipient.begun else None,
            blocks=blocks,
            length=sum(block.length for block in blocks),
            received=sum(block.received * block.page_size for block in blocks),
            package_length=len(package) if package is not None else None,
            counters=copy(self._counters),
            bytes_received=self.bytes_received,
            outstanding=recipient.waiting,
            never_sent=self.never_sent,
            fault_latency=LatencyReport.of(self._latency),
            stalled_seconds=stalled_seconds,
            network=None if state.ended else network,
            preempt=self.preempt,
            threads=recipient.threads(),
            downtime_seconds=self._switchover.seconds,
            window_seconds=self.window_seconds,
            guest_lost=self.guest_lost,
            missing=self.missing.first,
            missing_ranges=self.missing.ranges,
            missing_length=self.missing.length,
            waits_for_vmm=self.waits_for_vmm,
            guest_may_have_run=self.guest_may_have_run,
        )
