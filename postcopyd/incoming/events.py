"""What a migration tells while it runs: flat records, one for each thing that happens once.

Nothing here is said per page or per fault; those are counted (`report.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from postcopyd.incoming.states import State


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The migration took a step."""

    old: State
    new: State


@dataclass(frozen=True, slots=True)
class VmmAttached:
    """A VMM has handed over its memory."""

    description: str
    """The VMM, such as ``pid 4711, uid 0``."""
    blocks: int
    length: int
    """Bytes of all blocks."""


@dataclass(frozen=True, slots=True)
class StreamAttached:
    """A source has connected."""

    peer: str


@dataclass(frozen=True, slots=True)
class StreamDropped:
    """A source went away before its first byte; the migration waits for another."""

    peer: str


@dataclass(frozen=True, slots=True)
class PreemptAttached:
    """The source has opened its preempt channel: urgent pages come on a connection of their own."""

    peer: str


@dataclass(frozen=True, slots=True)
class ConnectionRefused:
    """A further connection was closed; the migration does not mind."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Converged:
    """The pre-copy ends without a switchover: all memory is here before the guest runs."""


@dataclass(frozen=True, slots=True)
class PackageReceived:
    """The device package is here whole: from now on there is no way back for the source."""

    length: int


@dataclass(frozen=True, slots=True)
class DeviceStateLoaded:
    """The VMM has loaded its device state and runs."""

    seconds: float
    """From the source's first word of the switchover to the VMM's answer."""


@dataclass(frozen=True, slots=True)
class MemoryRemoved:
    """The VMM gave memory back for the first time; such pages read as zeros from now on."""

    block: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class PathLost:
    """The network does not carry the stream any more, which breaks unless that changes soon."""

    reason: str


@dataclass(frozen=True, slots=True)
class PathBack:
    """The network would carry the stream again."""


@dataclass(frozen=True, slots=True)
class VmmLost:
    """The VMM has not loaded its devices: everything is kept for another that takes its place."""

    reason: str


@dataclass(frozen=True, slots=True)
class Paused:
    """The stream is lost after the package: what is here goes on working, faults wait."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stalled:
    """Nothing comes any more of memory that is missing, or not what a fault waits for.

    Told again when it has lasted twice as long.
    """

    seconds: float
    """Since the last page has come, or since the oldest fault waits."""
    outstanding: int
    """Host pages that faults wait for."""


@dataclass(frozen=True, slots=True)
class StallOver:
    """Memory has come again, and no fault has waited for long."""

    seconds: float
    """How long it was stalled."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The source is back and goes on: what is outstanding has been asked for again."""

    peer: str
    outstanding: int
    """Host pages that faults wait for."""


@dataclass(frozen=True, slots=True)
class Restored:
    """Another process was killed, and this one goes on in its place."""

    state: str
    missing: int
    """Host pages that are not here."""


@dataclass(frozen=True, slots=True)
class NotNoted:
    """The journal could not be written: a successor would go on from an older state."""

    reason: str


@dataclass(frozen=True, slots=True)
class Completed:
    """All memory is here."""

    pages: int
    """Host pages received."""
    never_sent: int
    """Host pages that the source never sent: they are zero there too."""
    seconds: float
    """From the source's first word of the switchover to the last page."""


@dataclass(frozen=True, slots=True)
class Abandoned:
    """What has not come never will: the guest gets memory errors there, and keeps the rest."""

    pages: int
    """Host pages that are missing."""
    length: int
    """Bytes of them."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The migration has ended without all memory."""

    reason: str
    guest_lost: bool
    """False when the source still is the VM and goes on."""


Event = (
    StateChanged
    | VmmAttached
    | StreamAttached
    | StreamDropped
    | PreemptAttached
    | ConnectionRefused
    | Converged
    | PackageReceived
    | DeviceStateLoaded
    | MemoryRemoved
    | PathLost
    | PathBack
    | VmmLost
    | Paused
    | Stalled
    | StallOver
    | Resumed
    | Restored
    | NotNoted
    | Completed
    | Abandoned
    | Failed
)
