"""One migration as the daemon keeps it: the engine's part, and the sockets that belong to it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from postcopyd.daemon import event_log
from postcopyd.daemon.acceptor import Acceptor
from postcopyd.daemon.certificate_names import AllowedNames
from postcopyd.daemon.channel import Standing
from postcopyd.daemon.gate import Gate, GateRules
from postcopyd.daemon.missing_memory import MissingList
from postcopyd.daemon.network_watch import NetworkWatch, PathWatch
from postcopyd.daemon.sockets import address_of, remove_file_of
from postcopyd.incoming.connection import Connection
from postcopyd.incoming.estate import Estate
from postcopyd.incoming.events import ConnectionRefused, Event, StreamAttached
from postcopyd.incoming.journal import JournalUnreadable
from postcopyd.incoming.migration import IncomingMigration
from postcopyd.incoming.recipient import Refused
from postcopyd.incoming.report import MissingRange, Report
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from postcopyd.kernel import memory_file
from postcopyd.vmm.handoff import HandoffListener
from postcopyd.vmm.native import NativeVmm
from postcopyd.vmm.restoring import restore_vmm

_LISTENER: Final = "listener"
_HANDOFF: Final = "handoff"
_FACTS: Final = "entry"
"""Names by which its sockets and facts are left."""


class EntryFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a successor of this process must know of a migration beside the engine's journal."""

    allowed_sources: tuple[str, ...]


def inherited_facts(estate: Estate) -> EntryFacts:
    """Return what a predecessor of this process has left.

    :raise JournalUnreadable: if it is not there, or something else.
    """
    descriptor = estate.take(_FACTS)
    if descriptor is None:
        raise JournalUnreadable("what its source must show was not kept")
    try:
        return msgspec.json.decode(os.pread(descriptor, _FACTS_LIMIT, 0), type=EntryFacts)
    except (OSError, ValueError) as error:
        raise JournalUnreadable(f"what its source must show is not readable: {error}") from error
    finally:
        os.close(descriptor)


def _leave_facts(facts: EntryFacts, estate: Estate) -> None:
    content = msgspec.json.encode(facts)
    descriptor = memory_file.create("postcopyd-entry", len(content))
    try:
        os.pwrite(descriptor, content, 0)
        estate.keep(_FACTS, descriptor)
    finally:
        os.close(descriptor)


_FACTS_LIMIT: Final = 1 << 20

_LAST_BYTES: Final = 4 << 20
"""What a source's kernel takes from it before it has to wait (tcp_wmem of tcp(7))."""


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
        network: NetworkWatch,
        on_change: Callable[[], None],
        allowed_sources: tuple[str, ...],
        rules: GateRules,
        estate: Estate,
        records: Path,
    ) -> None:
        """Make a migration that waits for its VMM, and for its source on `stream_listener`.

        :param stream_listener: listening and non-blocking; taken over.
        :param network: watches the path of its stream.
        :param on_change: called when something has happened to it.
        :param allowed_sources: names in certificates, beside what `rules` say of sources.
        :param estate: where it leaves what a successor of this process needs.
        :param records: directory for the list of what is missing when it is abandoned.
        :raise NotSecure: if sources cannot be asked there for what they must show.
        :raise ValueError: if one of `allowed_sources` is no pattern of a name.
        :raise OSError: if there is no descriptor to spare. Whatever is raised, `stream_listener`
            then still is the caller's.
        """
        self.name = name
        address = address_of(stream_listener)
        self.listen: tuple[str, ...] = (str(address),)
        """Addresses to which the source may connect."""
        self.handoff: str | None = None
        """Path of its own handoff socket."""
        self._network = network
        self._path_watch: PathWatch | None = None
        self.allowed_sources = allowed_sources
        """Names in certificates that may be its source; empty for all that the configuration
        allows."""
        self._on_change = on_change
        self._missing_list = MissingList(name, records)
        self.refused: str | None = None
        """Who was refused last in its source's place, and why."""
        names = AllowedNames(allowed_sources)
        self._gate = Gate(
            rules,
            rules.security_of(address, named=bool(allowed_sources)),
            names,
            let_in=self._let_in,
            refused=self._refused,
            expect=self._expect,
        )
        self._estate = estate
        migration = IncomingMigration(
            name, settings, self._trace, estate, self._list_what_is_missing
        )
        try:
            if not estate.leaves(_FACTS):
                _leave_facts(EntryFacts(allowed_sources), estate)
            if not estate.leaves(_LISTENER):
                estate.keep(_LISTENER, stream_listener.fileno())
        except BaseException:
            migration.let_go()
            raise
        self._migration: IncomingMigration | None = migration
        self._report: Report | None = None
        self._stream_listener = stream_listener
        self._acceptor = Acceptor(stream_listener, self._gate.take)
        self._handoff_listener: HandoffListener | None = None
        self._handoff_socket: socket.socket | None = None
        self._acceptor.start()
        self.done = asyncio.create_task(self._finish(migration))
        """Done when the migration has ended and nothing of it is open."""

    def open_handoff(self, listener: socket.socket, handoff: HandoffListener) -> None:
        """Take VMMs on a socket of the migration's own from now on.

        :param listener: the socket of `handoff`, whose file is removed at the end.
        """
        if not self._estate.leaves(_HANDOFF):
            self._estate.keep(_HANDOFF, listener.fileno())
        self.handoff = listener.getsockname()
        self._handoff_socket = listener
        self._handoff_listener = handoff
        handoff.start()

    def restore(self) -> None:
        """Go on from what a predecessor of this process has left.

        :raise JournalUnreadable: if nobody can.
        :raise OSError: if there is no memory for it.
        """
        migration = self._migration
        assert migration is not None
        migration.restore(restore_vmm)
        if isinstance(migration.vmm, NativeVmm):
            # The predecessor may have been killed before it could say so.
            migration.vmm.registered(self.name, self.listen)

    def let_go(self) -> None:
        """Let go of everything here, when `restore` has failed; what is kept stays kept."""
        self._acceptor.close()
        self.done.cancel()
        if self._migration is not None:
            self._migration.let_go()

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
    def not_to_be_broken_off(self) -> bool:
        """True where a QEMU that loses its connection just now may lose its guest.

        In the steps of the switchover, and from when its last bytes may be on their way until it
        has been told that all is well: a source that has handed everything to its socket cannot
        resume.
        """
        migration = self._migration
        if migration is None:
            return False
        if migration.state is State.RUNNING:
            report = migration.report()
            return report.length - report.received <= _LAST_BYTES
        return migration.state.in_switchover or migration.state is State.END

    @property
    def waits_for_vmm(self) -> bool:
        """True when a VMM may be attached."""
        migration = self._migration
        return migration is not None and not migration.state.ended and not migration.has_vmm

    @property
    def standing(self) -> Standing:
        """How it stands, for those who know of all workers."""
        if self.waits_for_vmm:
            return "waiting"
        return "ended" if self._migration is None else "running"

    def view(self) -> dict[str, Any]:
        """Return the report with what the daemon knows beside it, as JSON values."""
        report = self._migration.report() if self._migration is not None else self._report
        values: dict[str, Any] = msgspec.to_builtins(report)
        return values | {
            "listen": self.listen,
            "security": self._gate.security,
            "allowed_sources": self.allowed_sources,
            "handoff": self.handoff,
            "missing_list": self._missing_list.path,
            "missing_list_failure": self._missing_list.failure,
            "refused": self.refused,
        }

    async def wait(self, within: float | None) -> None:
        """Return when the migration has ended, or after `within` seconds.

        One that only its list of what is missing keeps, which cannot be written, has ended for who
        waits: he is told so, and may be who can make room.
        """
        stuck = asyncio.create_task(self._missing_list.stuck.wait())
        try:
            await asyncio.wait(
                (self.done, stuck), timeout=within, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            stuck.cancel()

    def give_up_list(self, because: str) -> None:
        """Let a list of what is missing that cannot be written now keep the migration no more."""
        self._missing_list.give_up(because)

    def _trace(self, event: Event) -> None:
        event_log.log_event(self.name, event)
        if isinstance(event, StreamAttached):
            self._watch_path()
        if isinstance(event, ConnectionRefused):
            self.refused = f"{event.peer}: {event.reason}"
        self._on_change()

    async def _list_what_is_missing(self, ranges: Callable[[], Iterator[MissingRange]]) -> None:
        assert self._migration is not None
        await self._missing_list.write(self._migration.report(), ranges)

    def _watch_path(self) -> None:
        """Watch the path of the stream that there is now, and go on when that has broken.

        So it can be told that a source may come back.
        """
        before, self._path_watch = self._path_watch, None
        migration = self._migration
        if migration is not None and migration.path is not None:
            self._path_watch = self._network.watch(
                migration.path, migration.path_lost, migration.path_back
            )
        if before is not None:
            before.close()

    def _let_in(self, connection: Connection, peer: str) -> None:
        migration = self._migration
        try:
            if migration is None:
                raise Refused(f"migration {self.name!r} has ended")
            migration.attach_stream(connection, peer)
        except (Refused, OSError) as error:
            connection.close()
            self._refused(peer, str(error))

    def _expect(self, connection: socket.socket) -> Callable[[bool], None]:
        if self._migration is None:
            return lambda _: None
        return self._migration.expect_stream(connection)

    def _refused(self, peer: str, reason: str) -> None:
        self.refused = f"{peer}: {reason}"
        event_log.log_source_refused(self.name, peer, reason)

    async def _finish(self, migration: IncomingMigration) -> None:
        await migration.wait()
        self._report = migration.report()
        self._migration = None
        if self._path_watch is not None:
            self._path_watch.close()
            self._path_watch = None
        remove_file_of(self._stream_listener)
        self._acceptor.close()
        await self._gate.close()
        if self._handoff_listener is not None and self._handoff_socket is not None:
            remove_file_of(self._handoff_socket)
            await self._handoff_listener.close()
        self._on_change()
