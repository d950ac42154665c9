"""What the daemon logs of a migration: one log event for each event of the engine.

The identifiers are the journal's MESSAGE_ID (systemd.journal-fields(7)): they stay the same
whatever becomes of the wording, so that a program can look for them. postcopyd(8) lists them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Final, NamedTuple

from postcopyd.daemon.logging import get_logger
from postcopyd.incoming import events


class _Kind(NamedTuple):
    level: str
    text: str
    message_id: str


_KINDS: Final[dict[type[events.Event], _Kind]] = {
    events.StateChanged: _Kind(
        "debug", "the state has changed", "96a44327936443afaf6ce4c199580583"
    ),
    events.VmmAttached: _Kind(
        "info", "a VMM has handed over its memory", "ff30e1ec57b24affa6cf44242b6e0874"
    ),
    events.StreamAttached: _Kind(
        "info", "a source has connected", "13469a4b0946443ea44d838121b1088c"
    ),
    events.StreamDropped: _Kind(
        "warning",
        "a source went away before its first byte; another may connect",
        "18845c090e4342319921b4b2980cef4a",
    ),
    events.PreemptAttached: _Kind(
        "info",
        "the source has opened its preempt channel",
        "5f0cb0f4d2a84b7f8f7a4f6f7b0a9a11",
    ),
    events.ConnectionRefused: _Kind(
        "warning", "a source was refused", "d26991d4c3c54e30a0399eb82e9c9d23"
    ),
    events.Converged: _Kind(
        "info",
        "the source has sent all memory before the switchover",
        "0c8de3c0f50b4b8e9b3b4c7bb2f0a6d4",
    ),
    events.PackageReceived: _Kind(
        "info",
        "the device package is here: from now on the guest lives here",
        "7c28d341dc114f078eeac615808fd96a",
    ),
    events.DeviceStateLoaded: _Kind(
        "info", "the VMM has loaded its devices and runs", "3dca7ac21d894cb986208afbe93fdd83"
    ),
    events.MemoryRemoved: _Kind(
        "info", "the VMM gives memory back", "d09de39a4a534e7eaca13aa39f7876f8"
    ),
    events.VmmLost: _Kind(
        "error",
        "paused: the VMM has not loaded its devices, and everything is kept for another",
        "e58d1f2a7c1946d5a8b1c0d93a64be72",
    ),
    events.Paused: _Kind(
        "error",
        "paused: the stream is lost, and what has not come yet is waited for",
        "2b94398b20c7416b8e6727aa90da7ba8",
    ),
    events.Completed: _Kind("info", "all memory is here", "b1a7234934f4487ba7789001691a3d95"),
    events.Failed: _Kind("error", "the migration has failed", "bbffacb1571a4700b2e3cdd0e544e2e9"),
}

SOURCE_REFUSED_ID: Final = _KINDS[events.ConnectionRefused].message_id
VMM_REFUSED_ID: Final = "353089378563465baaa7f11a4775fd31"
INTERNAL_ERROR_ID: Final = "c4481f169e224715be3330629a54b566"

MESSAGE_IDS: Final = frozenset(
    {kind.message_id for kind in _KINDS.values()}
    | {SOURCE_REFUSED_ID, VMM_REFUSED_ID, INTERNAL_ERROR_ID}
)
"""All of them."""


def log_event(migration: str, event: events.Event) -> None:
    """Log what the engine tells of a migration."""
    kind = _KINDS[type(event)]
    fields = asdict(event)
    if isinstance(event, events.StateChanged):
        fields = {"old": event.old.value, "new": event.new.value}
    level = kind.level
    if isinstance(event, events.Failed):
        level = "error" if event.guest_lost else "warning"
        guest = "lost" if event.guest_lost else "goes on at the source"
        fields = {"reason": event.reason, "guest": guest}
    log = getattr(get_logger(), level)
    log(kind.text, migration=migration, message_id=kind.message_id, **fields)


def log_source_refused(migration: str, reason: str) -> None:
    """Log that a stream connection was closed at once."""
    get_logger().warning(
        "a source was refused",
        migration=migration,
        reason=reason,
        message_id=SOURCE_REFUSED_ID,
    )


def log_vmm_refused(peer: str, reason: str) -> None:
    """Log that a VMM's handoff was not accepted."""
    get_logger().warning("a VMM was refused", peer=peer, reason=reason, message_id=VMM_REFUSED_ID)
