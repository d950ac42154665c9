"""All migrations of the daemon, by name: how they come, who is let in, when they are forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from postcopyd.daemon import event_log, left_behind, sockets
from postcopyd.daemon.config import Configuration, check_name
from postcopyd.daemon.entry import Entry, EntryFacts
from postcopyd.daemon.gate import GateRules, NotSecure
from postcopyd.daemon.left_behind import CannotGoOn, HeldMigration
from postcopyd.daemon.listing import Listing
from postcopyd.daemon.missing_memory import check_directory
from postcopyd.daemon.network_watch import NetworkWatch
from postcopyd.daemon.registry_error import ErrorCode, RegistryError
from postcopyd.daemon.routing import check_only_one_waits
from postcopyd.incoming.estate import Estate, Keeper
from postcopyd.incoming.recipient import Refused
from postcopyd.vmm.firecracker import FirecrackerVmm
from postcopyd.vmm.handoff import HandoffListener, HandoffRefused, OnVmm, PassOn, Registration
from postcopyd.vmm.native import NativeVmm
from postcopyd.vmm.peer import AllowedPeers

_MOST_NAMED: Final = 100
_SCARCE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


async def _nothing_is_left() -> None:
    """Where nobody takes over there is nothing to wait for."""


class Claims(Protocol):
    """Who sees to it that no other worker has a migration of the same name."""

    async def claim(self, name: str) -> None:
        """Let a name be ours, until nothing is kept of it any more.

        :raise RegistryError: if it is another's, or there are as many migrations as there may be.
        """

    def give_up(self, name: str) -> None:
        """Let a name that was claimed be nobody's."""


class Registry:
    """The migrations. Everything here is to be called in the event loop's thread."""

    def __init__(
        self,
        configuration: Configuration,
        on_change: Callable[[], None],
        keeper: Callable[[str], Keeper | None] = lambda _: None,
        settled: Callable[[], Awaitable[None]] = _nothing_is_left,
        claims: Claims | None = None,
    ) -> None:
        """Begin with none.

        :param claims: asked before a migration is created; None where there are no other workers.
        :param keeper: returns who keeps for a successor what the migration of that name leaves.
        :param settled: returns when what was left so far outlives this process.
        :param on_change: called when a migration came or went, or something has happened to it.
        :raise TlsFilesError: if the files that it names for TLS cannot be used.
        """
        self._configuration = configuration
        self._settings = configuration.engine_settings()
        self._allowed = allowed_peers(configuration.handoff_users, configuration.handoff_group)
        self.gate_rules = GateRules(
            configuration, allowed_peers(configuration.source_users, configuration.source_group)
        )
        """Who may be a source."""
        self.changed = on_change
        """To be called when something has happened to one of them."""
        self._keeper = keeper
        self.settled = settled
        self._records = Path(configuration.records)
        self._claims = claims
        self._one_claim = asyncio.Lock()
        self._held: dict[str, HeldMigration] = {}
        self._entries: dict[str, Entry] = {}
        self._ended: list[str] = []
        self._stopping = False
        self.network = NetworkWatch()
        """Tells the migrations when the network does not carry their streams any more."""

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    @property
    def running(self) -> list[Entry]:
        """Those that have not ended."""
        return [entry for entry in self if entry.migration is not None]

    @property
    def not_to_be_broken_off(self) -> list[str]:
        """Names of those that should not lose their connection, or their process, just now."""
        return [entry.name for entry in self.running if entry.not_to_be_broken_off]

    def get(self, name: str) -> Entry:
        """Return the migration of that name.

        :raise RegistryError: no-such-migration, unreadable.
        """
        if name in self._held:
            raise RegistryError(
                "unreadable", _held(name), f"postcopyctl show {name} tells why it cannot be read"
            )
        entry = self._entries.get(name)
        if entry is None:
            raise RegistryError(
                "no-such-migration",
                f"there is no migration {name!r}",
                "postcopyctl list shows those that there are",
            )
        return entry

    def listings(self) -> dict[str, Listing]:
        """Return how each stands, for those who know of all workers."""
        readable = {entry.name: Listing(entry.state.value, entry.standing) for entry in self}
        return {name: Listing("", "unreadable") for name in self._held} | readable

    async def open(
        self, name: str, listen: str = "", handoff: str = "", allowed: tuple[str, ...] = ()
    ) -> Entry:
        """As `create`, of a name that no other worker has.

        :raise RegistryError: those of `create`, and unavailable.
        """
        async with self._one_claim:
            return await self._open(name, listen, handoff, allowed)

    async def _open(
        self, name: str, listen: str, handoff: str = "", allowed: tuple[str, ...] = ()
    ) -> Entry:
        self.check_may_create(name)
        if self._claims is None:
            return self.create(name, listen, handoff, allowed)
        await self._claims.claim(name)
        try:
            return self.create(name, listen, handoff, allowed)
        except BaseException:
            self._claims.give_up(name)
            raise

    def create(
        self, name: str, listen: str = "", handoff: str = "", allowed: tuple[str, ...] = ()
    ) -> Entry:
        """Create a migration that waits for its VMM and its source.

        One of the same name that has ended is forgotten.

        :param listen: where to wait for the source; empty for what the configuration says.
        :param handoff: path of a handoff socket of its own; empty for none.
        :param allowed: patterns of names in certificates, of which its source must have one.
        :raise RegistryError: invalid-name, invalid-address, invalid-source, name-taken,
            too-many-migrations, address-unusable, not-secure, out-of-resources, stopping. Nothing
            has changed then.
        """
        self.check_may_create(name)
        try:
            address = sockets.listen_address(listen or self._configuration.listen)
            if handoff:
                sockets.check_path(handoff)
        except ValueError as error:
            raise RegistryError("invalid-address", str(error)) from None
        configuration = self._configuration
        handoff_socket = None
        try:
            stream_listener = sockets.open_stream_listener(
                address, configuration.source_mode, configuration.source_group
            )
            try:
                if handoff:
                    handoff_socket = sockets.open_unix_listener(
                        handoff, configuration.handoff_mode, configuration.handoff_group
                    )
                entry = Entry(
                    *(name, self._settings, stream_listener, self.network, self.changed),
                    *(allowed, self.gate_rules, Estate(self._keeper(name)), self._records),
                )
            except (OSError, ValueError, NotSecure):
                for listener in filter(None, (stream_listener, handoff_socket)):
                    sockets.remove_file_of(listener)
                    listener.close()
                raise
        except ValueError as error:
            raise RegistryError("invalid-source", str(error)) from None
        except NotSecure as error:
            raise RegistryError("not-secure", str(error), error.hint) from None
        except OSError as error:
            code: ErrorCode = "out-of-resources" if error.errno in _SCARCE else "address-unusable"
            raise RegistryError(code, error.strerror or str(error)) from error
        if handoff_socket is not None:
            self._open_handoff(entry, handoff_socket)
        self._forget(name)
        self._add(entry)
        self.changed()
        return entry

    def _open_handoff(self, entry: Entry, listener: socket.socket) -> None:
        take = partial(self.take_vmm, own=entry)
        entry.open_handoff(listener, self.handoff_listener(listener, take))

    def _add(self, entry: Entry) -> None:
        self._entries[entry.name] = entry
        entry.done.add_done_callback(lambda _: self._has_ended(entry))

    def restore(self, name: str, left: dict[str, int]) -> None:
        """Go on with a migration of a predecessor.

        One that cannot be gone on with stays as it is, and what was left of it is held on to: its
        guest waits, and never reads zeros.

        :param left: descriptors by name, taken over.
        """
        estate = Estate(self._keeper(name), left)
        if left_behind.is_nothing(left):
            left_behind.forget(estate)
            return
        try:
            entry, handoff = left_behind.restore(estate, partial(self._make_entry, name, estate))
        except CannotGoOn as error:
            self._held[name] = HeldMigration(name, estate, str(error))
            event_log.log_unreadable(name, str(error))
            return
        self._add(entry)
        if handoff is not None:
            self._open_handoff(entry, handoff)

    def _make_entry(
        self, name: str, estate: Estate, listener: socket.socket, facts: EntryFacts
    ) -> Entry:
        return Entry(
            *(name, self._settings, listener, self.network, self.changed),
            *(facts.allowed_sources, self.gate_rules, estate, self._records),
        )

    async def abandon(self, name: str, force: bool) -> Entry:
        """Give up what has not come of a migration, and return it when it has ended.

        Or when only the list of what is missing keeps it, which cannot be written.

        :param force: also when there is a source.
        :raise RegistryError: no-such-migration, cannot-abandon. Nothing has changed then.
        """
        entry = self.get(name)
        try:
            if entry.migration is None:
                raise Refused(f"migration {name!r} has ended")
            check_directory(self._records)
            entry.migration.abandon(force)
        except Refused as error:
            raise RegistryError(
                "cannot-abandon", str(error), f"postcopyctl show {name} tells how it stands"
            ) from error
        except OSError as error:
            raise RegistryError(
                "cannot-abandon",
                f"the list of what is missing cannot be kept: {error}",
                "let 'records' in the configuration be a directory that postcopyd can write",
            ) from error
        await entry.wait(None)
        return entry

    async def remove(self, name: str, force: bool) -> Entry:
        """Cancel the migration, or forget it if it has ended; return it.

        A cancelled one has ended when this returns, and stays listed.

        :param force: also when its source cannot take the guest back, which is lost then; or, when
            it was abandoned, if with it the list of what is missing is lost.
        :raise RegistryError: no-such-migration, past-the-package.
        """
        entry = self.get(name)
        if entry.migration is None:
            self._forget(name)
            self.changed()
            return entry
        if not entry.migration.state.ended:
            try:
                await entry.migration.cancel("cancelled by an operator", force)
            except Refused as error:
                raise RegistryError(
                    "past-the-package",
                    str(error),
                    "wait for its end, or cancel it with force to give the guest up",
                ) from error
        elif force:
            entry.give_up_list("cancelled by an operator")
        await entry.wait(None)
        if entry.migration is not None:
            raise RegistryError(
                "past-the-package",
                f"migration {name!r} has ended, but for the list of what is missing, which cannot "
                "be written yet",
                f"make room for it (postcopyctl show {name} tells where), or cancel with force to "
                "give the list up",
            )
        return entry

    @property
    def held(self) -> list[HeldMigration]:
        """Those that a predecessor has left, and that are only held."""
        return list(self._held.values())

    def find(self, name: str) -> Entry | HeldMigration:
        """As `get`, also of those that are only held."""
        return self._held.get(name) or self.get(name)

    def release(self, held: HeldMigration, force: bool) -> None:
        """Let go of one that is only held, and with that of its guest.

        :raise RegistryError: past-the-package, unless `force`.
        """
        if not force:
            raise RegistryError(
                "past-the-package",
                _held(held.name),
                "start the version that can (the log says which), or give the guest up with force",
            )
        del self._held[held.name]
        held.release()
        self.changed()

    async def stop(self, wait: bool) -> None:
        """Take nothing new, end what can be ended, and return when all has ended.

        No list of what is missing is waited for that cannot be written: nobody would keep for a
        successor what it is written from.

        :param wait: for the migrations whose source cannot take the guest back, and until those
            that are only held are released. Otherwise they are given up.
        """
        self._stopping = True
        for entry in self.running:
            entry.give_up_list("postcopyd is being stopped")
            migration = entry.migration
            if migration is None or migration.state.ended:
                continue
            if migration.before_package or not wait:
                migration.cancel("postcopyd is being stopped", force=not wait)
        while running := self.running:
            await asyncio.wait([entry.done for entry in running])
        if wait:
            await asyncio.gather(*(held.wait(None) for held in self.held))

    # -- VMMs --------------------------------------------------------------------------------

    def handoff_listener(
        self,
        listener: socket.socket | None,
        take: OnVmm | None = None,
        pass_on: PassOn | None = None,
    ) -> HandoffListener:
        """Return a listener for VMMs on `listener`, not started yet.

        :param listener: None for one to which only other workers hand VMMs.
        :param pass_on: asked of each VMM whether it is another worker's.
        """
        return HandoffListener(
            listener,
            self._allowed,
            take or self.take_vmm,
            lambda peer, reason: event_log.log_vmm_refused(str(peer), reason),
            first_message_timeout=self._configuration.timeouts.handoff,
            pass_on=pass_on,
        )

    async def take_vmm(
        self,
        name: str | None,
        vmm: NativeVmm | FirecrackerVmm,
        listen: str | None,
        *,
        own: Entry | None = None,
    ) -> Registration:
        """Pair a VMM with its migration, which is created if there is none of that name.

        :param name: that the VMM gave; None if it names nobody.
        :param listen: where it wants its source to be waited for.
        :param own: the migration to which the socket belongs on which the VMM came.
        :raise HandoffRefused: with the reason for the VMM.
        """
        try:
            async with self._one_claim:
                entry, created = await self._entry_for(name, listen, own)
        except RegistryError as error:
            raise HandoffRefused(error.message) from error
        migration = entry.migration
        try:
            if migration is None:
                raise Refused(f"migration {entry.name!r} has ended")
            migration.attach_vmm(vmm)
        except Refused as error:
            if created and migration is not None:
                migration.cancel(f"its VMM was refused: {error}")
                self._entries.pop(entry.name)
                await entry.wait(None)
            raise HandoffRefused(str(error)) from error
        self.changed()
        # It is taken: to be told now to take no more must not look as if it were not.
        with contextlib.suppress(asyncio.CancelledError):
            await self.settled()
        return Registration(entry.name, entry.listen)

    async def _entry_for(
        self, name: str | None, listen: str | None, own: Entry | None
    ) -> tuple[Entry, bool]:
        """Return the migration that a VMM is for, and whether it was created for it."""
        if own is not None:
            if name not in (None, own.name):
                raise HandoffRefused(
                    f"this socket belongs to migration {own.name!r}, not to {name!r}: "
                    f"hand over at {self._configuration.handoff}"
                )
            entry = own
        elif name is None:
            entry = self._only_one_that_waits()
        else:
            known = self._entries.get(name)
            if known is None or known.migration is None:
                return await self._open(name, listen or ""), True
            entry = known
        if listen is not None and listen not in entry.listen:
            raise HandoffRefused(
                f"migration {entry.name!r} listens on {', '.join(entry.listen)} already: "
                "leave 'listen' out"
            )
        return entry, False

    def _only_one_that_waits(self) -> Entry:
        waiting = [entry for entry in self if entry.waits_for_vmm]
        check_only_one_waits([entry.name for entry in waiting[:_MOST_NAMED]], len(waiting))
        return waiting[0]

    # -- keeping the list --------------------------------------------------------------------

    def check_may_create(self, name: str) -> None:
        """Check that a migration of that name may be created here.

        :raise RegistryError: invalid-name, stopping, name-taken, too-many-migrations.
        """
        try:
            check_name(name)
        except ValueError as error:
            raise RegistryError("invalid-name", str(error)) from None
        if self._stopping:
            raise RegistryError(
                "stopping", "postcopyd is being stopped", "try again when it has been started again"
            )
        known = self._entries.get(name)
        if known is not None and known.migration is not None:
            raise RegistryError(
                "name-taken",
                f"there is a migration {name!r} already, in state {known.state.value}",
                f"choose another name, or cancel it: postcopyctl cancel {name}",
            )
        if name in self._held:
            raise RegistryError("name-taken", _held(name), "choose another name; the log says why")
        limit = self._configuration.limits.migrations
        if len(self.running) >= limit:
            raise RegistryError(
                "too-many-migrations",
                f"{limit} migrations are under way, as many as the configuration allows",
                "raise 'migrations' under [limits], or wait for one to end",
            )

    def _has_ended(self, entry: Entry) -> None:
        if self._entries.get(entry.name) is not entry:
            return
        self._ended.append(entry.name)
        while len(self._ended) > self._configuration.limits.ended:
            self._forget(self._ended[0])
        self.changed()

    def forget(self, name: str) -> None:
        """Let the migration of that name, if it has ended, not be listed any more."""
        if name in self._ended:
            self._forget(name)
            self.changed()

    def _forget(self, name: str) -> None:
        self._entries.pop(name, None)
        if name in self._ended:
            self._ended.remove(name)


def _held(name: str) -> str:
    return f"what a predecessor has left of migration {name!r} is held, and cannot be read"


def allowed_peers(users: tuple[str, ...], group: str) -> AllowedPeers:
    """Return who may use a socket: root, our own user, and those that the configuration names.

    :raise ValueError: if this host knows no such user or group.
    """
    return AllowedPeers((0, os.geteuid(), *users), (group,) if group else ())
