"""What the daemon logs of a migration: one log event for each event of the engine.

The identifiers are the journal's MESSAGE_ID (systemd.journal-fields(7)): they stay the same
whatever becomes of the wording, so that a program can look for them. postcopyd(8) lists them.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

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
    events.VmmUnheard: _Kind(
        "warning",
        "the VMM was given its devices, and cannot be asked whether it runs: nobody else is given "
        "the guest meanwhile",
        "0f8f5afb744048c9a0686691660b2c40",
    ),
    events.VmmHeard: _Kind(
        "info", "the VMM can be asked again whether it runs", "b0c51f3ad0a74a7f8a6f0b9a2f6d7c13"
    ),
    events.DeviceStateLoaded: _Kind(
        "info", "the VMM has loaded its devices and runs", "3dca7ac21d894cb986208afbe93fdd83"
    ),
    events.MemoryRemoved: _Kind(
        "info", "the VMM gives memory back", "d09de39a4a534e7eaca13aa39f7876f8"
    ),
    events.PathLost: _Kind(
        "warning",
        "the network path of the stream is gone",
        "3b8f5c0e9a6d4f0c8e27d1b46a905c73",
    ),
    events.PathBack: _Kind(
        "info",
        "the network path of the stream is back",
        "a4d2e67b18c34b5f9d03f85e2c7b6190",
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
    events.Stalled: _Kind(
        "error",
        "memory is missing, and has not come for a while: is the source still there?",
        "f0d2b7c64e914a0fb1c9a3e57d80264b",
    ),
    events.StallOver: _Kind(
        "info",
        "memory comes again, or is waited for no more",
        "6e81a95d20fc4b37924cd1f3b07e5a48",
    ),
    events.Resumed: _Kind(
        "info", "the source is back and goes on", "7f0c6f0b0d3e4d0f9f0e5a6c2b8d41a7"
    ),
    events.Restored: _Kind(
        "info",
        "goes on where another process was killed",
        "5c1f0d1c7b7149f1a3ac0b4d8a2be6f0",
    ),
    events.NotNoted: _Kind(
        "warning",
        "the journal cannot be written: if postcopyd is killed now, the guest may be lost",
        "e2a8f4f6d4d14c5f8b1e0c9a7d3b5126",
    ),
    events.Completed: _Kind("info", "all memory is here", "b1a7234934f4487ba7789001691a3d95"),
    events.Abandoned: _Kind(
        "error",
        "abandoned: what has not come is a memory error from now on, and the guest keeps the rest",
        "0b6a4f2d91c04de5a7c38e15f4d2b960",
    ),
    events.Failed: _Kind("error", "the migration has failed", "bbffacb1571a4700b2e3cdd0e544e2e9"),
}

SOURCE_REFUSED_ID: Final = _KINDS[events.ConnectionRefused].message_id
TLS_READ_ID: Final = "86f10e265e1647468d209e52f67d4267"
TLS_KEPT_ID: Final = "c879efd2eece463bb3db65099257e087"
TLS_DOUBT_ID: Final = "8bcc3eb6837d49afb392d55d9e93c746"
VMM_REFUSED_ID: Final = "353089378563465baaa7f11a4775fd31"
CLIENT_REFUSED_ID: Final = "e4c7b0d39f5a4b7c8d21a6f05c3e91b8"
NETWORK_UNWATCHED_ID: Final = "c90e7a5d2f8b4c6e8134b7d6f01a92e5"
MISSING_LIST_ID: Final = "c95de1b80a7f4f63924b6f3a1e87d054"
UNREADABLE_ID: Final = "4b7cf0e9d0a84d0cb8a3a9c3f5d3c1e2"
WORKER_DIED_ID: Final = "0d1f7c8c3f5a4a1fae4f6d2f5b7f9e11"
INTERNAL_ERROR_ID: Final = "c4481f169e224715be3330629a54b566"

MESSAGE_IDS: Final = frozenset(
    {kind.message_id for kind in _KINDS.values()}
    | {
        SOURCE_REFUSED_ID,
        VMM_REFUSED_ID,
        CLIENT_REFUSED_ID,
        NETWORK_UNWATCHED_ID,
        INTERNAL_ERROR_ID,
    }
    | {TLS_READ_ID, TLS_KEPT_ID, TLS_DOUBT_ID, UNREADABLE_ID, WORKER_DIED_ID}
    | {MISSING_LIST_ID}
)
"""All of them."""


def log_event(migration: str, event: events.Event) -> None:
    """Log what the engine tells of a migration."""
    kind = _KINDS[type(event)]
    fields = msgspec.structs.asdict(event)
    if isinstance(event, events.StateChanged):
        fields = {"old": event.old.value, "new": event.new.value}
    level = kind.level
    if isinstance(event, events.Failed):
        level = "error" if event.guest_lost else "warning"
        guest = "lost" if event.guest_lost else "goes on at the source"
        fields = {"reason": event.reason, "guest": guest}
    log = getattr(get_logger(), level)
    log(kind.text, migration=migration, message_id=kind.message_id, **fields)


def log_source_refused(migration: str, peer: str, reason: str) -> None:
    """Log that a stream connection was closed before the migration saw anything of it."""
    get_logger().warning(
        "a source was refused",
        migration=migration,
        peer=peer,
        reason=reason,
        message_id=SOURCE_REFUSED_ID,
    )


def log_vmm_refused(peer: str, reason: str) -> None:
    """Log that a VMM's handoff was not accepted."""
    get_logger().warning("a VMM was refused", peer=peer, reason=reason, message_id=VMM_REFUSED_ID)


def log_client_refused(peer: str, reason: str) -> None:
    """Log that somebody may not use the control API."""
    get_logger().warning(
        "a client of the control socket was refused",
        peer=peer,
        reason=reason,
        message_id=CLIENT_REFUSED_ID,
    )


def log_list(name: str, path: str) -> None:
    """Log where the list of what never came is."""
    get_logger().info(
        "what is missing is listed", migration=name, path=path, message_id=MISSING_LIST_ID
    )


def log_list_waits(name: str, reason: str, least_bytes: int) -> None:
    """Log that there is no list yet of what never came, and what to do."""
    get_logger().error(
        "the list of what is missing cannot be written: make room for it. It is tried again, and "
        "the migration is kept until then; its guest does not wait for it",
        migration=name,
        reason=reason,
        least_bytes=least_bytes,
        message_id=MISSING_LIST_ID,
    )


def log_list_given_up(name: str, reason: str, because: str, ranges: int) -> None:
    """Log that there will never be a list of what never came."""
    get_logger().error(
        "the list of what is missing is given up: which memory it is cannot be told any more, but "
        "for the first 1000 ranges in the migration's report, as long as there is that",
        migration=name,
        reason=reason,
        because=because,
        ranges=ranges,
        message_id=MISSING_LIST_ID,
    )


def log_unreadable(name: str, reason: str) -> None:
    """Log that what a predecessor has left of a migration cannot be gone on with."""
    get_logger().error(
        "this migration cannot be gone on with: what is left of it is held, and its guest waits",
        migration=name,
        reason=reason,
        message_id=UNREADABLE_ID,
    )


def log_network_unwatched(reason: str) -> None:
    """Log that nobody will tell when a link, an address or a route is gone."""
    get_logger().warning(
        "the network cannot be watched: a break is noticed after timeouts.break_after only",
        reason=reason,
        message_id=NETWORK_UNWATCHED_ID,
    )


def log_tls_read(certificate: str) -> None:
    """Log that changed files of TLS are in use."""
    get_logger().info(
        "the certificates were read anew", certificate=certificate, message_id=TLS_READ_ID
    )


def log_tls_kept(error: Exception) -> None:
    """Log that changed files of TLS are of no use."""
    get_logger().error(
        "the certificates have changed and cannot be used; those read before stay",
        reason=str(error),
        message_id=TLS_KEPT_ID,
    )


def log_tls_doubt(error: Exception) -> None:
    """Log that something about the files of TLS in use is wrong."""
    get_logger().warning(
        "something is wrong with the certificates in use",
        reason=str(error),
        message_id=TLS_DOUBT_ID,
    )
