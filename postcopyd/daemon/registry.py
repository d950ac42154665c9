"""All migrations of the daemon, by name: how they come, who is let in, when they are forgotten."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from postcopyd.daemon import event_log, sockets
from postcopyd.daemon.config import Configuration, check_name
from postcopyd.daemon.entry import Entry
from postcopyd.incoming.recipient import Refused
from postcopyd.vmm.adoption import AdoptionRefused
from postcopyd.vmm.firecracker import FirecrackerVmm
from postcopyd.vmm.handoff import HandoffListener, HandoffRefused, OnVmm, Registration
from postcopyd.vmm.native import NativeVmm
from postcopyd.vmm.peer import AllowedPeers

if TYPE_CHECKING:
    from postcopyd.vmm.qemu import QemuVmm

ErrorCode = Literal[
    "invalid-name",
    "invalid-address",
    "no-such-migration",
    "name-taken",
    "too-many-migrations",
    "address-unusable",
    "out-of-resources",
    "past-the-package",
    "vmm-refused",
    "waits-for-no-vmm",
    "stopping",
]


_SCARCE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class RegistryError(Exception):
    """What was asked for cannot be done; `code` is for programs, the rest for people."""

    def __init__(self, code: ErrorCode, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.hint = hint


class Registry:
    """The migrations. Everything here is to be called in the event loop's thread."""

    def __init__(self, configuration: Configuration, on_change: Callable[[], None]) -> None:
        """Begin with none.

        :param on_change: called when a migration came or went, or something has happened to it.
        """
        self._configuration = configuration
        self._settings = configuration.engine_settings()
        self._allowed = allowed_peers(configuration.handoff_users, configuration.handoff_group)
        self._on_change = on_change
        self._entries: dict[str, Entry] = {}
        self._ended: list[str] = []
        self._stopping = False

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    @property
    def running(self) -> list[Entry]:
        """Those that have not ended."""
        return [entry for entry in self if entry.migration is not None]

    def get(self, name: str) -> Entry:
        """Return the migration of that name.

        :raise RegistryError: no-such-migration.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise RegistryError(
                "no-such-migration",
                f"there is no migration {name!r}",
                "postcopyctl list shows those that there are",
            )
        return entry

    def create(self, name: str, listen: str = "", handoff: str = "") -> Entry:
        """Create a migration that waits for its VMM and its source.

        One of the same name that has ended is forgotten.

        :param listen: where to wait for the source; empty for what the configuration says.
        :param handoff: path of a handoff socket of its own; empty for none.
        :raise RegistryError: invalid-name, invalid-address, name-taken, too-many-migrations,
            address-unusable, out-of-resources, stopping. Nothing has changed then.
        """
        self._check_may_create(name)
        try:
            address = sockets.listen_address(listen or self._configuration.listen)
            if handoff:
                sockets.check_path(handoff)
        except ValueError as error:
            raise RegistryError("invalid-address", str(error)) from None
        mode, group = self._configuration.handoff_mode, self._configuration.handoff_group
        handoff_socket = None
        try:
            stream_listener = sockets.open_stream_listener(address, mode, group)
            try:
                if handoff:
                    handoff_socket = sockets.open_unix_listener(handoff, mode, group)
                entry = Entry(name, self._settings, stream_listener, self._on_change)
            except OSError:
                for listener in filter(None, (stream_listener, handoff_socket)):
                    sockets.remove_file_of(listener)
                    listener.close()
                raise
        except OSError as error:
            code: ErrorCode = "out-of-resources" if error.errno in _SCARCE else "address-unusable"
            raise RegistryError(code, error.strerror or str(error)) from error
        if handoff_socket is not None:
            take = partial(self.take_vmm, own=entry)
            entry.open_handoff(handoff_socket, self.handoff_listener(handoff_socket, take))
        self._forget(name)
        self._entries[name] = entry
        entry.done.add_done_callback(lambda _: self._has_ended(entry))
        self._on_change()
        return entry

    async def receive_qemu(self, name: str, listen: str, monitor: str) -> Entry:
        """Adopt a QEMU that waits for a migration, and create the migration that fills it.

        :param name: empty for one that is made of its process id.
        :param listen: as `create`.
        :param monitor: path of its QMP socket.
        :raise RegistryError: vmm-refused, and those of `create`. The QEMU is as before then.
        """
        if name:
            self._check_may_create(name)
        vmm = await self._adopt(monitor)
        try:
            entry = self.create(name or f"qemu-{vmm.process_id}", listen)
        except BaseException as error:
            await self._give_back(vmm, str(error))
            raise
        await self._attach(entry, vmm)
        return entry

    async def retry(self, name: str, monitor: str) -> Entry:
        """Have another QEMU take the place of a VMM that has not loaded its devices.

        :param monitor: path of its QMP socket.
        :raise RegistryError: no-such-migration, waits-for-no-vmm, vmm-refused. Everything that
            is here is kept then.
        """
        entry = self.get(name)
        if entry.migration is None or not entry.migration.waits_for_vmm:
            raise RegistryError(
                "waits-for-no-vmm",
                f"migration {name!r} is in state {entry.state.value} and needs no other VMM",
                f"postcopyctl show {name} tells how it stands",
            )
        await self._attach(entry, await self._adopt(monitor))
        return entry

    async def _adopt(self, monitor: str) -> QemuVmm:
        # Imported here: most daemons never meet a QEMU, and it takes memory.
        from postcopyd.vmm.qemu import adopt_qemu

        try:
            return await adopt_qemu(monitor)
        except AdoptionRefused as error:
            hint = "postcopyctl(1) tells what receive-qemu takes"
            raise RegistryError("vmm-refused", str(error), hint) from error

    async def _attach(self, entry: Entry, vmm: QemuVmm) -> None:
        try:
            if entry.migration is None:
                raise Refused(f"migration {entry.name!r} has ended")
            entry.migration.attach_vmm(vmm)
        except Refused as error:
            await self._give_back(vmm, str(error))
            raise RegistryError("vmm-refused", str(error)) from error
        self._on_change()

    @staticmethod
    async def _give_back(vmm: QemuVmm, reason: str) -> None:
        await vmm.failed(reason)
        vmm.close()

    async def remove(self, name: str, force: bool) -> Entry:
        """Cancel the migration, or forget it if it has ended; return it.

        A cancelled one has ended when this returns, and stays listed.

        :param force: also when its source cannot take the guest back, which is lost then.
        :raise RegistryError: no-such-migration, past-the-package.
        """
        entry = self.get(name)
        if entry.migration is None:
            self._forget(name)
            self._on_change()
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
        await entry.wait(None)
        return entry

    async def stop(self, wait: bool) -> None:
        """Take nothing new, end what can be ended, and return when all has ended.

        :param wait: for the migrations whose source cannot take the guest back. Otherwise they
            are given up.
        """
        self._stopping = True
        for entry in self.running:
            migration = entry.migration
            if migration is None or migration.state.ended:
                continue
            if migration.before_package or not wait:
                migration.cancel("postcopyd is being stopped", force=not wait)
        while running := self.running:
            await asyncio.wait([entry.done for entry in running])

    def summary(self) -> str:
        """Return in a few words how many migrations there are, and where they are."""
        states = Counter(entry.state.value for entry in self.running)
        if not states:
            return "no migration is under way"
        number = sum(states.values())
        detail = ", ".join(f"{count} {state}" for state, count in states.items())
        return f"{number} migration{'s' if number > 1 else ''} under way: {detail}"

    # -- VMMs --------------------------------------------------------------------------------

    def handoff_listener(
        self, listener: socket.socket, take: OnVmm | None = None
    ) -> HandoffListener:
        """Return a listener for VMMs on `listener`, not started yet."""
        return HandoffListener(
            listener,
            self._allowed,
            take or self.take_vmm,
            lambda peer, reason: event_log.log_vmm_refused(str(peer), reason),
            first_message_timeout=self._configuration.timeouts.handoff,
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
            entry, created = self._entry_for(name, listen, own)
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
        self._on_change()
        return Registration(entry.name, entry.listen)

    def _entry_for(
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
                return self.create(name, listen or ""), True
            entry = known
        if listen is not None and listen not in entry.listen:
            raise HandoffRefused(
                f"migration {entry.name!r} listens on {', '.join(entry.listen)} already: "
                "leave 'listen' out"
            )
        return entry, False

    def _only_one_that_waits(self) -> Entry:
        waiting = [entry for entry in self if entry.waits_for_vmm]
        if len(waiting) == 1:
            return waiting[0]
        if not waiting:
            raise HandoffRefused(
                "no migration waits for a VMM: create one (postcopyctl create NAME) first, for a "
                "VMM that does not name its migration"
            )
        names = ", ".join(entry.name for entry in waiting)
        raise HandoffRefused(
            f"{len(waiting)} migrations wait for a VMM ({names}) and this VMM does not name its "
            "own: give each a handoff socket (postcopyctl create NAME --handoff PATH)"
        )

    # -- keeping the list --------------------------------------------------------------------

    def _check_may_create(self, name: str) -> None:
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
        self._on_change()

    def _forget(self, name: str) -> None:
        self._entries.pop(name, None)
        if name in self._ended:
            self._ended.remove(name)


def allowed_peers(users: tuple[str, ...], group: str) -> AllowedPeers:
    """Return who may use a socket: root, our own user, and those that the configuration names.

    :raise ValueError: if this host knows no such user or group.
    """
    return AllowedPeers((0, os.geteuid(), *users), (group,) if group else ())
