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
        "debug", "the state has changed", "6b7f6a7ea4354ac2b6a8e1d24d9f7a01"
    ),
    events.VmmAttached: _Kind(
        "info", "a VMM has handed over its memory", "0f9a8d2ce3b84d4c9be0f4c0f34f7d52"
    ),
    events.StreamAttached: _Kind(
        "info", "a source has connected", "d3a5b58c4f5f4a3d8a2a4a0e9ed1c6b3"
    ),
    events.StreamDropped: _Kind(
        "warning",
        "a source went away before its first byte; another may connect",
        "5c1e7b94e6d64c0c8f0a35b1a7d2e8f4",
    ),
    events.PackageReceived: _Kind(
        "info",
        "the device package is here: the guest is ours now",
        "a2d4c6e8f01b4e7d93c5a7b9d1e3f505",
    ),
    events.DeviceStateLoaded: _Kind(
        "info", "the VMM has loaded its devices and runs", "e84b1f6d29c74b0fa6d31c58f7e29b06"
    ),
    events.MemoryRemoved: _Kind(
        "info", "the VMM gives memory back", "17c9e35fb2d84a6e8d4f60a91be37c07"
    ),
    events.Paused: _Kind(
        "error",
        "paused: the stream is lost, and what has not come yet is waited for",
        "9d30f7c1e5824b6fb19c72e4d8a65f08",
    ),
    events.Completed: _Kind("info", "all memory is here", "4ae61d8bc7f34920958be3d07c12fa09"),
    events.Failed: _Kind(
        "error", "the migration has failed", "c25f80e9a7b1463d8e60d4f92b71ce0a"
    ),
}

SOURCE_REFUSED_ID: Final = "2be7d5f0c8194a63b7e58f13d09ac60b"
VMM_REFUSED_ID: Final = "f8416b3ed2a74c95a0c9e7d15b83f20c"
INTERNAL_ERROR_ID: Final = "70d9c4a6b5e8413f92ab6e0dc7f1380d"


def log_event(migration: str, event: events.Event) -> None:
    """Log what the engine tells of a migration."""
    kind = _KINDS[type(event)]
    fields = asdict(event)
    if isinstance(event, events.StateChanged):
        fields = {"old": event.old.value, "new": event.new.value}
    elif isinstance(event, events.Failed):
        fields = {
            "reason": event.reason,
            "guest": "goes on at the source" if event.before_package else "lost",
        }
    log = getattr(get_logger(), kind.level)
    log(kind.text, migration=migration, message_id=kind.message_id, **fields)


def log_source_refused(migration: str, peer: str, reason: str) -> None:
    """Log that a stream connection was closed at once."""
    get_logger().warning(
        "a source was refused",
        migration=migration,
        peer=peer,
        reason=reason,
        message_id=SOURCE_REFUSED_ID,
    )


def log_vmm_refused(peer: str, reason: str) -> None:
    """Log that a VMM's handoff was not accepted."""
    get_logger().warning(
        "a VMM was refused", peer=peer, reason=reason, message_id=VMM_REFUSED_ID
    )
