"""One migration as the daemon keeps it: the engine's part, and the sockets that belong to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import msgspec

from postcopyd.daemon import event_log
from postcopyd.daemon.acceptor import Acceptor
from postcopyd.daemon.sockets import address_of, remove_file_of
from postcopyd.incoming.events import Event
from postcopyd.incoming.migration import IncomingMigration
from postcopyd.incoming.recipient import Refused
from postcopyd.incoming.report import Report
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from postcopyd.vmm.handoff import HandoffListener
from postcopyd.vmm.peer import peer_of


class Entry:
    """A migration, its stream listener and, where it has one, its own handoff socket.

    When the migration has ended only its report is kept: what the engine held (a device package,
    page maps) and every descriptor is gone.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        stream_listener: socket.socket,
        on_change: Callable[[], None],
    ) -> None:
        """Make a migration that waits for its VMM, and for its source on `stream_listener`.

        :param stream_listener: listening and non-blocking; taken over.
        :param on_change: called when something has happened to it.
        :raise OSError: if there is no descriptor to spare; `stream_listener` then still is the
            caller's.
        """
        self.name = name
        self.listen: tuple[str, ...] = (str(address_of(stream_listener)),)
        """Addresses to which the source may connect."""
        self.handoff: str | None = None
        """Path of its own handoff socket."""
        self._on_change = on_change
        self._migration: IncomingMigration | None = IncomingMigration(name, settings, self._trace)
        self._report: Report | None = None
        self._stream_listener = stream_listener
        self._acceptor = Acceptor(stream_listener, self._take_stream)
        self._handoff_listener: HandoffListener | None = None
        self._handoff_socket: socket.socket | None = None
        self._acceptor.start()
        self.done = asyncio.create_task(self._finish(self._migration))
        """Done when the migration has ended and nothing of it is open."""

    def open_handoff(self, listener: socket.socket, handoff: HandoffListener) -> None:
        """Take VMMs on a socket of the migration's own from now on.

        :param listener: the socket of `handoff`, whose file is removed at the end.
        """
        self.handoff = listener.getsockname()
        self._handoff_socket = listener
        self._handoff_listener = handoff
        handoff.start()

    @property
    def migration(self) -> IncomingMigration | None:
        """The engine's part; None when the migration has ended and let go of everything."""
        return self._migration

    @property
    def state(self) -> State:
        """Where the migration is."""
        if self._migration is not None:
            return self._migration.state
        assert self._report is not None
        return State(self._report.state)

    @property
    def waits_for_vmm(self) -> bool:
        """True when a VMM may be attached."""
        migration = self._migration
        return migration is not None and not migration.state.ended and not migration.has_vmm

    def view(self) -> dict[str, Any]:
        """Return the report with what the daemon knows beside it, as JSON values."""
        report = self._migration.report() if self._migration is not None else self._report
        values: dict[str, Any] = msgspec.to_builtins(report)
        return values | {"listen": self.listen, "handoff": self.handoff}

    async def wait(self, within: float | None) -> None:
        """Return when the migration has ended, or after `within` seconds."""
        await asyncio.wait((self.done,), timeout=within)

    def _trace(self, event: Event) -> None:
        event_log.log_event(self.name, event)
        self._on_change()

    def _take_stream(self, connection: socket.socket) -> None:
        migration = self._migration
        try:
            peer = _name_of(connection)
            if migration is None:
                raise Refused(f"migration {self.name!r} has ended")
            migration.attach_stream(connection, peer)
        except (Refused, OSError) as error:
            connection.close()
            event_log.log_source_refused(self.name, str(error))

    async def _finish(self, migration: IncomingMigration) -> None:
        await migration.wait()
        self._report = migration.report()
        self._migration = None
        remove_file_of(self._stream_listener)
        self._acceptor.close()
        if self._handoff_listener is not None and self._handoff_socket is not None:
            remove_file_of(self._handoff_socket)
            await self._handoff_listener.close()
        self._on_change()


def _name_of(connection: socket.socket) -> str:
    """Return who connected, such as ``192.0.2.1:40123`` or ``pid 4711, uid 0``.

    :raise OSError: if it has gone already.
    """
    if connection.family == socket.AF_UNIX:
        return str(peer_of(connection))
    host, port = connection.getpeername()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
