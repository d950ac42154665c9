"""The daemon: puts the parts together, and takes them apart again when it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import MutableMapping
from typing import Any, Final

from postcopyd.daemon import process, sockets
from postcopyd.daemon.config import Configuration
from postcopyd.daemon.control import ControlApi
from postcopyd.daemon.event_log import INTERNAL_ERROR_ID
from postcopyd.daemon.logging import get_logger
from postcopyd.daemon.notify import ServiceManager
from postcopyd.daemon.registry import Registry, RegistryError, allowed_peers
from postcopyd.vmm.handoff import HandoffListener

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class CannotStart(Exception):
    """The daemon cannot do its work here; the text says why and what to do."""


async def serve(configuration: Configuration, environment: MutableMapping[str, str]) -> None:
    """Be the daemon until a signal says to stop and all that cannot be given up has ended.

    :param environment: of this process; what the service manager has put there for it is taken
        out.
    :raise CannotStart: if a socket cannot be had or a migration of the configuration not created.
    """
    service = _Service(configuration, ServiceManager(environment))
    try:
        await service.start(environment)
        await service.told_to_stop.wait()
        await service.stop()
    finally:
        await service.close()


class _Service:
    def __init__(self, configuration: Configuration, manager: ServiceManager) -> None:
        self.told_to_stop = asyncio.Event()
        self._configuration = configuration
        self._manager = manager
        self._registry = Registry(configuration, self._changed)
        self._opened: dict[str, socket.socket] = {}
        self._handoff: HandoffListener | None = None
        self._control: ControlApi | None = None
        self._ready = False

    async def start(self, environment: MutableMapping[str, str]) -> None:
        """Open everything, then tell that we are ready."""
        configuration = self._configuration
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(log_unexpected)
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self._take_signal, number)
        process.allow_descriptors(configuration.limits.descriptors)
        try:
            control, handoff = self._open_sockets(environment)
            self._handoff = self._registry.handoff_listener(handoff)
            allowed = allowed_peers(configuration.control_users, configuration.control_group)
            self._control = ControlApi(control, self._registry, allowed)
            for entry in configuration.migration:
                self._registry.create(entry.name, entry.listen, entry.handoff)
        except OSError as error:
            raise CannotStart(error.strerror or str(error)) from error
        except RegistryError as error:
            raise CannotStart(f"migration {entry.name!r}: {error.message}") from error
        await self._control.start()
        self._handoff.start()
        if configuration.memory_lock:
            process.lock_memory()
        process.quiet_collector()
        self._ready = True
        self._manager.ready(self._registry.summary())
        get_logger().info("ready", control=configuration.control, handoff=configuration.handoff)

    def _open_sockets(
        self, environment: MutableMapping[str, str]
    ) -> tuple[socket.socket, socket.socket]:
        """Return the control and the handoff socket, from systemd or opened here."""
        configuration = self._configuration
        handed_over = sockets.take_over_listeners(environment)

        def of(path: str, mode: int, group: str) -> socket.socket:
            listener = handed_over.pop(path, None)
            if listener is None:
                listener = sockets.open_unix_listener(path, mode, group)
                self._opened[path] = listener
            return listener

        control = of(configuration.control, configuration.control_mode, configuration.control_group)
        handoff = of(configuration.handoff, configuration.handoff_mode, configuration.handoff_group)
        for path, unknown in handed_over.items():
            unknown.close()
            get_logger().warning(
                "systemd hands a socket over that the configuration does not name",
                path=path,
                remedy="let control and handoff, and ListenStream= in the socket unit, agree",
            )
        return control, handoff

    async def stop(self) -> None:
        """End what can be ended, and wait for the rest; the control API stays up meanwhile."""
        self._manager.stopping(self._status())
        get_logger().info("stopping", migrations=len(self._registry.running))
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
        for path, listener in self._opened.items():
            listener.close()
            sockets.remove_file(path)
        self._manager.close()

    def _take_signal(self, number: signal.Signals) -> None:
        if self.told_to_stop.is_set():
            get_logger().info("still stopping", status=self._status())
        self.told_to_stop.set()

    def _changed(self) -> None:
        if self._ready:
            self._manager.status(self._status())

    def _status(self) -> str:
        """Return what the service manager shows of us, in one line."""
        if not self.told_to_stop.is_set():
            return self._registry.summary()
        waiting = ", ".join(entry.name for entry in self._registry.running)
        if not waiting:
            return "stopping"
        return (
            f"stopping as soon as these have ended: {waiting} "
            "(to give one up: postcopyctl cancel --force NAME)"
        )


def log_unexpected(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what nobody caught; the daemon and every migration go on."""
    error = context.get("exception")
    get_logger().error(
        context["message"],
        message_id=INTERNAL_ERROR_ID,
        exc_info=error if error is not None else None,
    )
