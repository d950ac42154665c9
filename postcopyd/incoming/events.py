"""What a migration tells while it runs: flat records, one for each thing that happens once.

Nothing here is said per page or per fault; those are counted (`report.py`).
"""

from __future__ import annotations

import msgspec

from postcopyd.incoming.states import State


class StateChanged(msgspec.Struct, frozen=True):
    """The migration took a step."""

    old: State
    new: State


class VmmAttached(msgspec.Struct, frozen=True):
    """A VMM has handed over its memory."""

    description: str
    """The VMM, such as ``pid 4711, uid 0``."""
    blocks: int
    length: int
    """Bytes of all blocks."""


class StreamAttached(msgspec.Struct, frozen=True):
    """A source has connected."""

    peer: str


class StreamDropped(msgspec.Struct, frozen=True):
    """A source went away before its first byte; the migration waits for another."""

    peer: str


class PreemptAttached(msgspec.Struct, frozen=True):
    """The source has opened its preempt channel: urgent pages come on a connection of their own."""

    peer: str


class ConnectionRefused(msgspec.Struct, frozen=True):
    """A further connection was closed; the migration does not mind."""

    peer: str
    reason: str


class Converged(msgspec.Struct, frozen=True):
    """The pre-copy ends without a switchover: all memory is here before the guest runs."""


class PackageReceived(msgspec.Struct, frozen=True):
    """The device package is here whole: from now on there is no way back for the source."""

    length: int


class VmmUnheard(msgspec.Struct, frozen=True):
    """The VMM has its device state, and it cannot be found out whether it runs."""

    reason: str


class VmmHeard(msgspec.Struct, frozen=True):
    """It can be asked again."""


class DeviceStateLoaded(msgspec.Struct, frozen=True):
    """The VMM has loaded its device state and runs."""

    seconds: float
    """From the source's first word of the switchover to the VMM's answer."""


class MemoryRemoved(msgspec.Struct, frozen=True):
    """The VMM gave memory back for the first time; such pages read as zeros from now on."""

    block: str
    start: int
    length: int


class PathLost(msgspec.Struct, frozen=True):
    """The network does not carry the stream any more, which breaks unless that changes soon."""

    reason: str


class PathBack(msgspec.Struct, frozen=True):
    """The network would carry the stream again."""


class VmmLost(msgspec.Struct, frozen=True):
    """The VMM has not loaded its devices: everything is kept for another that takes its place."""

    reason: str


class Paused(msgspec.Struct, frozen=True):
    """The stream is lost after the package: what is here goes on working, faults wait."""

    reason: str


class Stalled(msgspec.Struct, frozen=True):
    """Nothing comes any more of memory that is missing, or not what a fault waits for.

    Told again when it has lasted twice as long.
    """

    seconds: float
    """Since the last page has come, or since the oldest fault waits."""
    outstanding: int
    """Host pages that faults wait for."""


class StallOver(msgspec.Struct, frozen=True):
    """Memory has come again, and no fault has waited for long; or it is waited for no more."""

    seconds: float
    """How long it was stalled."""


class Resumed(msgspec.Struct, frozen=True):
    """The source is back and goes on: what is outstanding has been asked for again."""

    peer: str
    outstanding: int
    """Host pages that faults wait for."""


class Restored(msgspec.Struct, frozen=True):
    """Another process was killed, and this one goes on in its place."""

    state: str
    missing: int
    """Host pages that are not here."""


class NotNoted(msgspec.Struct, frozen=True):
    """The journal could not be written: a successor would go on from an older state."""

    reason: str


class Completed(msgspec.Struct, frozen=True):
    """All memory is here."""

    pages: int
    """Host pages received."""
    never_sent: int
    """Host pages that the source never sent: they are zero there too."""
    seconds: float
    """From the source's first word of the switchover to the last page."""


class Abandoned(msgspec.Struct, frozen=True):
    """What has not come never will: the guest gets memory errors there, and keeps the rest."""

    pages: int
    """Host pages that are missing."""
    length: int
    """Bytes of them."""


class Failed(msgspec.Struct, frozen=True):
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
    | VmmUnheard
    | VmmHeard
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
