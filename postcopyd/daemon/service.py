"""A worker's part of the daemon: puts it together, and takes it apart again when told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import traceback
from typing import TYPE_CHECKING, Any, Final

from postcopyd.daemon import forwarding, network_watch, process
from postcopyd.daemon.channel import CONTROL, HANDOFF, Begin
from postcopyd.daemon.config import Configuration
from postcopyd.daemon.event_log import INTERNAL_ERROR_ID
from postcopyd.daemon.listing import Listings
from postcopyd.daemon.logging import get_logger
from postcopyd.daemon.registry import Registry, allowed_peers
from postcopyd.daemon.registry_error import RegistryError
from postcopyd.daemon.supervisor_link import Inheritance, Orders, SupervisorLink
from postcopyd.daemon.tls_files import TlsFilesError
from postcopyd.vmm.handoff import HandoffListener

if TYPE_CHECKING:
    from postcopyd.daemon.control import ControlApi


_GUESTS_FIRST: Final = 0.25
"""Seconds for sources that come back to migrations of a predecessor, before the rest of the start,
which takes as long again, is in their way."""
_FAILED: Final = 1
_LEAVING: Final = 10.0
"""Seconds that who is told to leave waits at most for what should not be broken off."""


class CannotStart(Exception):
    """The daemon cannot do its work here; the text says why and what to do."""


def prepare() -> None:
    """Do what takes time and can be done by a process that waits for its turn."""
    for load in (_import_control, network_watch.load):
        with contextlib.suppress(Exception):  # what is wrong with it is told when it is needed
            load()
    process.quiet_collector()


def _import_control() -> None:
    """Import what operators wait for, and guests do not."""
    import postcopyd.daemon.control
    import postcopyd.daemon.exchange  # noqa: F401


async def serve(
    configuration: Configuration, begin: Begin, link: SupervisorLink, inherited: Inheritance
) -> None:
    """Do a worker's work until all are told to stop and all that cannot be given up has ended.

    What nobody has expected ends this process as if killed: another one goes on with what it had.

    :param begin: which worker this is.
    :param inherited: what predecessors have left of migrations and, for the front, the listening
        sockets.
    :raise CannotStart: if a file of TLS is of no use, or a migration of the configuration cannot
        be created.
    """
    try:
        service = _Service(configuration, begin, link)
        await service.start(inherited.pop("", {}), inherited)
    except TlsFilesError as error:
        link.cannot_start(str(error))
        raise CannotStart(str(error)) from error
    except CannotStart as error:
        link.cannot_start(str(error))
        if inherited:
            link.leave(_FAILED)  # to close them would be to give them up
        await service.close()
        raise
    except Exception as error:
        link.cannot_start(f"worker {begin.number} cannot start: {_told(error)}")
        link.leave(_FAILED)
    try:
        await service.told_to_stop.wait()
        await service.stop()
        await link.ended()
        await service.close()
    except Exception as error:
        get_logger().error(
            "this worker cannot go on: another one is to",
            reason=_told(error),
            message_id=INTERNAL_ERROR_ID,
        )
        link.leave(_FAILED)


def _told(error: Exception) -> str:
    """Return in one line what nobody has expected, and where it has come up."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


class _Service:
    def __init__(
        self,
        configuration: Configuration,
        begin: Begin,
        link: SupervisorLink,
    ) -> None:
        self.told_to_stop = asyncio.Event()
        self._configuration = configuration
        self._begin = begin
        self._link = link
        self._registry = Registry(configuration, self._changed, link.keeper, link.settled, link)
        self._listings = Listings(link.listed, link.unlisted)
        self._reloading: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._change = asyncio.Event()
        self._handoff: HandoffListener | None = None
        self._control: ControlApi | None = None

    async def start(self, listeners: dict[str, int], inherited: Inheritance) -> None:
        """Open everything, go on with what there is, then tell that we are ready.

        :param listeners: the daemon's own sockets, where this worker is the front.
        """
        configuration = self._configuration
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(log_unexpected)
        process.allow_descriptors(configuration.limits.descriptors)
        for name, left in inherited.items():
            self._registry.restore(name, left)
        self._changed()
        self._link.start(
            Orders(
                stop=self.told_to_stop.set,
                leave=self._begin_to_leave,
                reload=self._begin_reload,
                forget=self._registry.forget,
                take_request=self._take_request,
                take_vmm=self._take_vmm,
            )
        )
        if inherited:
            await asyncio.sleep(_GUESTS_FIRST)
        await asyncio.to_thread(_import_control)
        self._open(listeners)
        if self._begin.first:
            await self._create_own_share()
        assert self._control is not None and self._handoff is not None
        await self._control.start()
        self._handoff.start()
        self._registry.network.prepare()
        if configuration.memory_lock:
            process.lock_memory()
        process.quiet_collector()
        self._link.ready()

    def _open(self, listeners: dict[str, int]) -> None:
        from postcopyd.daemon.control import ControlApi
        from postcopyd.daemon.exchange import Exchange

        configuration, begin = self._configuration, self._begin
        control, handoff = (
            socket.socket(fileno=listeners[name]) if name in listeners else None
            for name in (CONTROL, HANDOFF)
        )
        is_front = control is not None and begin.workers > 1
        exchange = Exchange(self._link, begin.number, begin.workers) if is_front else None
        self._handoff = self._registry.handoff_listener(
            handoff, pass_on=None if exchange is None else exchange.pass_on
        )
        allowed = allowed_peers(configuration.control_users, configuration.control_group)
        self._control = ControlApi(control, self._registry, allowed, begin.number, exchange)

    async def _create_own_share(self) -> None:
        """Create those migrations of the configuration that are ours, and are not there yet."""
        for place, entry in enumerate(self._configuration.migration):
            if place % self._begin.workers != self._begin.number:
                continue
            try:
                await self._registry.open(
                    entry.name, entry.listen, entry.handoff, entry.allowed_sources
                )
            except RegistryError as error:
                if error.code != "name-taken":  # that is one of a predecessor, whoever has it now
                    raise CannotStart(f"migration {entry.name!r}: {error.message}") from error

    async def stop(self) -> None:
        """End what can be ended, and wait for the rest; the control API stays up meanwhile."""
        if self._handoff is not None:
            await self._handoff.close()
        await self._registry.stop(wait=self._configuration.wait_at_shutdown)

    async def close(self) -> None:
        """Close everything. After `stop` no migration is left; before it all are given up."""
        await self._registry.stop(wait=False)
        if self._control is not None:
            await self._control.close()
        if self._handoff is not None:
            await self._handoff.close()
        if self._reloading is not None:
            await self._reloading
        self._registry.gate_rules.close()
        self._link.close()

    def _take_request(self, connection: socket.socket) -> None:
        if self._control is None:  # it was for one that has died
            connection.close()
            return
        forwarding.take(connection)
        self._control.take(connection)

    def _take_vmm(self, connection: socket.socket) -> None:
        if self._handoff is None:
            connection.close()
            return
        self._handoff.take(connection)

    def _begin_reload(self) -> None:
        self._reloading = asyncio.get_running_loop().create_task(self._reload())

    async def _reload(self) -> None:
        """Read anew what may change while we run: the files of TLS."""
        try:
            await self._registry.gate_rules.reload()
        finally:
            self._reloading = None
            self._link.reloaded()

    def _begin_to_leave(self) -> None:
        if self._leaving is None:
            self._leaving = asyncio.get_running_loop().create_task(self._leave())

    async def _leave(self) -> None:
        """Leave everything to a successor, in a moment in which that costs the guests a pause."""
        if names := self._registry.not_to_be_broken_off:
            get_logger().info("leaves as soon as these are further", migrations=names)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVING):
                while self._registry.not_to_be_broken_off:
                    self._change.clear()
                    await self._change.wait()
        self._link.leave()

    def _changed(self) -> None:
        self._change.set()
        self._listings.tell(self._registry.listings())


def log_unexpected(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what nobody caught; the daemon and every migration go on."""
    error = context.get("exception")
    get_logger().error(
        context["message"],
        message_id=INTERNAL_ERROR_ID,
        exc_info=error if error is not None else None,
    )
