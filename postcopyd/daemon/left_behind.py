"""What a predecessor has left of a migration: gone on with, or held as it is.

Held, a guest waits, and never reads zeros. It stays so until a process comes that can read what was
left, or until the guest is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

import msgspec

from postcopyd.daemon import sockets
from postcopyd.daemon.entry import Entry, EntryFacts, inherited_facts
from postcopyd.daemon.gate import NotSecure
from postcopyd.incoming.estate import JOURNAL, Estate
from postcopyd.incoming.inheriting import WATCHES_MEMORY
from postcopyd.incoming.journal import JournalUnreadable
from postcopyd.incoming.report import Report
from postcopyd.incoming.states import State

UNREADABLE: Final = "unreadable"
"""In the place of its state, which nobody knows."""

MakeEntry = Callable[[socket.socket, EntryFacts], Entry]
"""Makes the entry on the listening socket, which it takes over; raises what `Entry` does."""


class CannotGoOn(Exception):
    """Nobody can who knows no more than we do; the text says why."""


class HeldMigration:
    """A migration that this process cannot go on with: its supervisor holds what was left."""

    def __init__(self, name: str, estate: Estate, reason: str) -> None:
        """Hold it; `reason` says why it cannot be gone on with."""
        self.name = name
        self._estate = estate
        self._reason = reason
        self._released = asyncio.Event()

    def view(self) -> dict[str, Any]:
        """Return what is known, in the form of a migration's (`Entry.view`)."""
        released = self._released.is_set()
        report = Report(
            self.name,
            State.FAILED.value if released else UNREADABLE,
            self._reason,
            vmm=None,
            peer=None,
            machine=None,
            guest_lost=released,
        )
        values: dict[str, Any] = msgspec.to_builtins(report)
        return values | {
            "listen": (),
            "security": None,
            "allowed_sources": (),
            "handoff": None,
            "missing_list": None,
            "missing_list_failure": None,
            "refused": None,
        }

    async def wait(self, within: float | None) -> None:
        """Return when it was released, or after `within` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._released.wait()

    def release(self) -> None:
        """Let go of everything, and with that of its guest."""
        self._estate.settle()
        self._released.set()


def is_nothing(left: dict[str, int]) -> bool:
    """Tell whether it was killed before there was a migration, or when that was being forgotten."""
    return JOURNAL not in left or not {"listener", WATCHES_MEMORY} & left.keys()


def forget(estate: Estate) -> None:
    """Let go of what is left of nothing."""
    with contextlib.suppress(OSError):
        listener = _socket_of(estate, "listener")
        if listener is not None:
            sockets.remove_file_of(listener)
            listener.close()
    estate.settle()


def restore(estate: Estate, make_entry: MakeEntry) -> tuple[Entry, socket.socket | None]:
    """Return the migration, which goes on from now on, and its own handoff socket if it has one.

    :param estate: closed if that cannot be; what is kept of it stays kept.
    :raise CannotGoOn: if nobody can.
    """
    with ExitStack() as resources:
        resources.callback(estate.close)
        try:
            restored = _restore(estate, make_entry, resources)
        except (JournalUnreadable, NotSecure, OSError) as error:
            raise CannotGoOn(str(error)) from error
        except Exception as error:  # a mistake of ours must not be the end of all others
            raise CannotGoOn(f"{type(error).__name__}: {error}") from error
        resources.pop_all()
        return restored


def _restore(
    estate: Estate, make_entry: MakeEntry, resources: ExitStack
) -> tuple[Entry, socket.socket | None]:
    listener = _socket_of(estate, "listener")
    if listener is None:
        raise JournalUnreadable("the address at which its source comes back was not kept")
    resources.callback(listener.close)
    handoff = _socket_of(estate, "handoff")
    if handoff is not None:
        resources.callback(handoff.close)
    entry = make_entry(listener, inherited_facts(estate))
    resources.callback(entry.let_go)
    entry.restore()
    return entry, handoff


def _socket_of(estate: Estate, name: str) -> socket.socket | None:
    """Return the listening socket that a predecessor has left by that name.

    :raise OSError: if it is none.
    """
    descriptor = estate.take(name)
    if descriptor is None:
        return None
    try:
        left = socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        raise
    if not left.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        left.close()
        raise OSError(errno.EINVAL, f"what was kept as its {name} socket does not listen")
    return left
