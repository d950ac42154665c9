"""What an outgoing migration tells of itself, and the account that it keeps for that."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import msgspec


class Phase(Enum):
    """Where an outgoing migration stands; they follow each other in this order.

    A broken connection leads to RECONNECTING, and from there to SETUP or to POSTCOPY.
    """

    SETUP = "setup"
    """Nothing of the memory has been sent."""
    PRECOPY = "precopy"
    """Memory is being sent while the guest may run here."""
    SWITCHOVER = "switchover"
    """The guest is stopped; once the package is being sent it cannot go on here."""
    POSTCOPY = "postcopy"
    """The guest belongs to the destination, which is sent what it has not got yet."""
    CLOSING = "closing"
    """All has been sent; the destination has not confirmed it."""
    RECONNECTING = "reconnecting"
    """The connection broke; another one is made, and the destination asked what it has."""
    COMPLETED = "completed"
    """The destination has everything."""
    FAILED = "failed"


class Counts(msgspec.Struct):
    """What has been done so far, updated in place. A target page has 4096 bytes."""

    pages: int = 0
    """Target pages sent with content; one that was sent twice counts twice."""
    zero_pages: int = 0
    """Target pages sent as zero pages."""
    precopy_passes: int = 0
    """Passes that are complete."""
    postcopy_bytes: int = 0
    """Memory that was left to be sent after the switchover."""
    requests: int = 0
    """Page requests that the destination made."""
    requests_answered: int = 0
    """Host pages that were sent because they were asked for, before the scan came to them."""
    reconnects: int = 0
    """Connections that were made after a break."""
    pages_again: int = 0
    """Target pages that had been sent before a break and were to be sent once more."""


class Report(msgspec.Struct, frozen=True):
    """A moment of an outgoing migration."""

    phase: Phase
    failure: str | None
    """Why it failed, None if it did not."""
    seconds: float
    """Since it began, up to its end if it has ended."""
    switchover_seconds: float | None
    """From stopping the guest to handing over the package; None before that."""
    bytes_sent: int
    """On the connection; the return path not counted."""
    pages: int
    """As in `Counts`, like the seven that follow."""
    zero_pages: int
    precopy_passes: int
    postcopy_bytes: int
    requests: int
    requests_answered: int
    reconnects: int
    pages_again: int
    broken: str | None
    """Why there is no connection: how it broke, or what the last try met; None if there is one."""
    retry_seconds: float | None
    """How long the next try was put off, None while none is."""
    phase_bytes: int
    """How many bytes of memory this phase has behind it."""
    phase_total: int
    """How many bytes of memory this phase is about, 0 if none."""


class Account:
    """Keeps the report of one migration up to date."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin now.

        :param clock: seconds, never going back.
        """
        self._clock = clock
        self._began = clock()
        self._ended: float | None = None
        self._switchover_began: float | None = None
        self.phase = Phase.SETUP
        self.phase_bytes = 0
        self.phase_total = 0
        self.counts = Counts()
        self.bytes_sent = 0
        self.failure: str | None = None
        self.broken_in = Phase.SETUP
        """The phase in which the connection broke last."""
        self.broken: str | None = None
        self.retry_seconds: float | None = None
        self.switchover_seconds: float | None = None

    def enter(self, phase: Phase, total: int = 0) -> None:
        """Go over to `phase`, which is about `total` bytes of memory."""
        if phase is Phase.SWITCHOVER and self._switchover_began is None:
            self._switchover_began = self._clock()
        if phase in (Phase.COMPLETED, Phase.FAILED):
            self._ended = self._clock()
        if phase is not Phase.RECONNECTING:
            self.broken = self.retry_seconds = None
        self.phase = phase
        self.phase_bytes = 0
        self.phase_total = total

    def broke(self, why: str, retry_seconds: float) -> None:
        """Note that there is no connection; RECONNECTING is the phase to enter.

        :param retry_seconds: how long the next try is put off.
        """
        if self.phase is not Phase.RECONNECTING:
            self.broken_in = self.phase
        self.broken = why
        self.retry_seconds = retry_seconds

    def package_sent(self) -> None:
        """Note that the package has been handed over: the guest may run at the destination."""
        assert self._switchover_began is not None
        self.switchover_seconds = self._clock() - self._switchover_began

    def report(self) -> Report:
        """Tell how it stands."""
        counts = self.counts
        ended = self._clock() if self._ended is None else self._ended
        return Report(
            phase=self.phase,
            failure=self.failure,
            seconds=ended - self._began,
            switchover_seconds=self.switchover_seconds,
            bytes_sent=self.bytes_sent,
            pages=counts.pages,
            zero_pages=counts.zero_pages,
            precopy_passes=counts.precopy_passes,
            postcopy_bytes=counts.postcopy_bytes,
            requests=counts.requests,
            requests_answered=counts.requests_answered,
            reconnects=counts.reconnects,
            pages_again=counts.pages_again,
            broken=self.broken,
            retry_seconds=self.retry_seconds,
            phase_bytes=self.phase_bytes,
            phase_total=self.phase_total,
        )
