"""The supervisor: holds copies of everything that must not be lost, and has workers do the rest.

It does little, so that little can end it. A worker that dies is replaced at once by a spare one,
which was started beforehand and gets all that is held of what was its own. Who kills the supervisor
too leaves copies with the service manager, which starts the next one with them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from postcopyd.daemon import channel, manager_room, process, sockets
from postcopyd.daemon.channel import CONTROL, HANDOFF
from postcopyd.daemon.config import Configuration
from postcopyd.daemon.crew import Crew
from postcopyd.daemon.directory import Directory
from postcopyd.daemon.holding import Holding
from postcopyd.daemon.logging import get_logger
from postcopyd.daemon.notify import ServiceManager
from postcopyd.daemon.worker_process import WorkerProcess

FRONT: Final = 0
"""The worker that has the control and the handoff socket."""

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_LEAVE_SIGNAL: Final = signal.SIGUSR1
"""RestartKillSignal= of the unit: systemd sends it in place of SIGTERM where a start follows."""
_LEAVING: Final = 15.0
"""Seconds that a worker may take to leave; it is killed then, which comes to the same."""
_IN_RESERVE: Final = 64
"""Descriptors that are left for the migrations that there are when another one is let in."""
_MOST_WAITING: Final = 100
"""Names that one answer has."""


class CannotStart(Exception):
    """The daemon cannot do its work here; the text says why and what to do."""


async def supervise(
    configuration: Configuration,
    environment: MutableMapping[str, str],
    workers: Sequence[WorkerProcess],
) -> bool:
    """Be the daemon until it was told to stop and all that cannot be given up has ended.

    Or until it was told to leave, which it does at once.

    :param environment: of this process; what the service manager has put there for it is taken
        out.
    :param workers: of `postcopyd.daemon.worker.start_all`, taken over.
    :return: True if another daemon has to be started, which goes on with the migrations.
    :raise CannotStart: if a socket cannot be had, or a worker says that it cannot do its work.
    """
    manager_room.check(environment, configuration.limits.migrations)
    supervisor = _Supervisor(configuration, ServiceManager(environment))
    try:
        supervisor.start(environment, workers)
        return await supervisor.ended
    finally:
        await supervisor.close()


class _Supervisor:
    def __init__(self, configuration: Configuration, manager: ServiceManager) -> None:
        self._configuration = configuration
        self._manager = manager
        self._holding = Holding(manager)
        self._number = configuration.number_of_workers()
        limits = configuration.limits
        self._directory = Directory(self._number, migrations=limits.migrations, ended=limits.ended)
        self._crew = Crew(self._number, self)
        self._opened: dict[str, str] = {}
        """Name -> path of the sockets whose files are ours to remove."""
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[bool] = self._loop.create_future()
        """True where another daemon goes on."""
        self._been_ready: set[int] = set()
        self._ready = self._stopping = self._ending = self._leaving = False
        self._reloading: set[int] = set()
        """The workers that are reading anew."""

    def start(
        self, environment: MutableMapping[str, str], workers: Sequence[WorkerProcess]
    ) -> None:
        """Open the sockets, take over what a predecessor has left, and start the workers."""
        process.allow_descriptors(self._configuration.limits.descriptors)
        for number in _STOP_SIGNALS:
            self._loop.add_signal_handler(number, self._stop)
        self._loop.add_signal_handler(_LEAVE_SIGNAL, self._leave)
        self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        try:
            listeners, stored = sockets.take_over(environment)
            self._holding.take_over(stored)
            left = {owner for owner, _, _ in self._holding if owner}
            self._directory.spread(left)
            self._open(listeners)
            numbers = range(self._number)
            self._crew.start(workers, {number for number in numbers if self._directory.of(number)})
        except OSError as error:
            raise CannotStart(error.strerror or str(error)) from error

    def _open(self, listeners: dict[str, socket.socket]) -> None:
        """Hold the control and the handoff socket, from the service manager or opened here."""
        settings = self._configuration
        for name, path, mode, group in (
            (CONTROL, settings.control, settings.control_mode, settings.control_group),
            (HANDOFF, settings.handoff, settings.handoff_mode, settings.handoff_group),
        ):
            listener = listeners.pop(path, None)
            if listener is None:
                if not self._has_listener(name, path):
                    listener = sockets.open_unix_listener(path, mode, group)
                    self._holding.hold("", name, listener.detach())
                self._opened[name] = path
            else:
                self._holding.hold_until_the_end("", name, listener.detach())
        for path, unknown in listeners.items():
            unknown.close()
            get_logger().warning(
                "systemd hands a socket over that the configuration does not name",
                path=path,
                remedy="let control and handoff, and ListenStream= in the socket unit, agree",
            )

    def _has_listener(self, name: str, path: str) -> bool:
        """Tell whether a killed predecessor has left the socket at `path`."""
        descriptor = self._holding.of("", name)
        if descriptor is None:
            return False
        with socket.socket(fileno=os.dup(descriptor)) as listener:
            return bool(listener.getsockname() == path) and Path(path).is_socket()

    # -- workers (`postcopyd.daemon.crew.Employer`) ----------------------------------------------

    def begin(self, number: int, worker: WorkerProcess) -> None:
        """Have a worker do its part of the work, with everything of it that is held."""
        own = self._directory.of(number)
        for owner, name, descriptor in self._holding:
            if owner in own or (not owner and number == FRONT):
                # It stays open: who may let go of it has yet to hear of it.
                self._crew.tell(number, channel.Held(owner, name), descriptor)
        self._crew.tell(
            number,
            channel.Begin(
                msgspec.Raw(msgspec.json.encode(self._configuration)),
                self._manager.present,
                number,
                self._number,
                first=number not in self._been_ready,
            ),
        )
        if self._stopping:
            self._crew.tell(number, channel.Stop())

    def died(self, number: int) -> bool:
        """Keep what another worker is to go on with, if one is."""
        self._directory.died(number, {owner for owner, _, _ in self._holding})
        self._has_reloaded(number)
        if self._stopping:
            self._end_if_all_have()
        self._be_done_if_all_have_gone()
        return not (self._ending or self._leaving or self.ended.done())

    def take(self, number: int, message: channel.Message, descriptor: int | None) -> None:
        """Act on what a worker says.

        :raise ValueError: if that is not for a worker to say.
        :raise OSError: if what it leaves cannot be held; it is closed then.
        """
        match message:
            case channel.Held(owner, name) if descriptor is not None:
                if self._directory.owns(number, owner):
                    self._holding.hold(owner, name, descriptor)
                else:
                    os.close(descriptor)
            case channel.Released(owner, name):
                if self._directory.owns(number, owner):
                    self._holding.release(owner, name)
            case channel.Forgotten(owner):
                if self._directory.give_up(number, owner):
                    self._holding.forget(owner)
            case channel.Settle():
                self._manager.when_told(partial(self._settled, number, self._crew[number]))
            case channel.Listed(name, state, standing):
                for place in self._directory.note(number, name, state, standing):
                    self._crew.tell(place.worker, channel.Forget(place.name))
                self._show_status()
            case channel.Unlisted(name):
                self._directory.strike(number, name)
                self._show_status()
            case channel.Claim(name):
                self._crew.tell(number, channel.Claimed(name, self._claim(number, name)))
            case channel.Where(token, name):
                self._crew.tell(number, self._there(token, name))
            case channel.PassOn(to, what) if descriptor is not None:
                self._crew.tell(to, channel.Handed(what), descriptor, at_once=True)
                os.close(descriptor)
            case channel.Ready():
                self._is_ready(number)
            case channel.Reloaded():
                self._has_reloaded(number)
            case channel.Ended():
                self._has_ended(number)
            case channel.Alive():
                pass
            case channel.CannotStart(reason):
                self._cannot_start(number, reason)
            case _:
                raise ValueError("a worker says what only the supervisor may")

    def _claim(self, number: int, name: str) -> channel.Refusal | None:
        refusal = self._directory.claim(number, name)
        if refusal is None and not process.may_open(_IN_RESERVE):
            # A copy that we cannot take is a worker that has to go: others have to wait instead.
            self._directory.give_up(number, name)
            return "out-of-resources"
        return refusal

    def _settled(self, number: int, asked: WorkerProcess | None) -> None:
        if self._crew[number] is asked:  # a successor has not asked
            self._crew.tell(number, channel.Settled())

    def _there(self, token: int, name: str | None) -> channel.There:
        waiting = self._directory.waiting()
        return channel.There(
            token,
            None if name is None else self._directory.where(name),
            None if name is None else self._directory.owner_of(name),
            {
                number: self._directory.number_of(number)
                for number, worker in self._crew
                if worker.ready and not worker.deaf
            },
            tuple(waiting[:_MOST_WAITING]),
            len(waiting),
        )

    def _is_ready(self, number: int) -> None:
        worker = self._crew[number]
        assert worker is not None
        worker.ready = True
        self._been_ready.add(number)
        self._directory.ready(number)
        if self._ready:
            self._show_status()
        elif self._crew.all(lambda worker: worker.ready):
            self._ready = True
            self._manager.ready(self._status())
            get_logger().info(
                "ready",
                control=self._configuration.control,
                handoff=self._configuration.handoff,
                workers=self._number,
            )
            self._crew.start_spare()

    def _cannot_start(self, number: int, reason: str) -> None:
        """End the daemon before it has begun; later others are at work, and another one tries."""
        if self._ready:
            get_logger().error("a worker cannot start", worker=number, reason=reason)
        elif not self.ended.done():
            self.ended.set_exception(CannotStart(reason))

    # -- what the service manager is told --------------------------------------------------------

    def _show_status(self) -> None:
        if self._ready:
            self._manager.status(self._status())

    def _status(self) -> str:
        """Return what the service manager shows of us, in one line."""
        if not self._stopping:
            return self._directory.summary()
        waiting = ", ".join(self._directory.under_way())
        if not waiting:
            return "stopping"
        return (
            f"stopping as soon as these have ended: {waiting} "
            "(to give one up: postcopyctl cancel --force NAME)"
        )

    def _reload(self) -> None:
        """Have every worker read anew what may change while it runs."""
        if not self._ready or self._reloading:
            return
        self._manager.reloading()
        for number, worker in self._crew:
            # Who is not ready has yet to read, or just has.
            if worker.ready and self._crew.tell(number, channel.Reload()):
                self._reloading.add(number)
        if not self._reloading:
            self._manager.reloaded()

    def _has_reloaded(self, number: int) -> None:
        if number in self._reloading:
            self._reloading.discard(number)
            if not self._reloading:
                self._manager.reloaded()

    # -- the end ---------------------------------------------------------------------------------

    def _stop(self) -> None:
        if self._stopping:
            get_logger().info("still stopping", status=self._status())
            return
        self._stopping = True
        self._manager.stopping(self._status())
        get_logger().info("stopping", migrations=len(self._directory.under_way()))
        for number, _ in self._crew:
            self._crew.tell(number, channel.Stop())
        self._end_if_all_have()

    def _has_ended(self, number: int) -> None:
        worker = self._crew[number]
        assert worker is not None
        worker.ended = True
        if self._ending:  # it has begun since
            self._crew.tell(number, channel.End())
        self._end_if_all_have()

    def _end_if_all_have(self) -> None:
        """Let all go when all have ended: until then the front has to answer."""
        if self._ending or not all(map(self._has_nothing_left, range(self._number))):
            return
        self._ending = True
        for number, _ in self._crew:
            self._crew.tell(number, channel.End())
        self._be_done_if_all_have_gone()

    def _has_nothing_left(self, number: int) -> bool:
        """Tell whether no guest needs that worker, or one in its place where there is none now."""
        worker = self._crew[number]
        return not self._directory.of(number) if worker is None else worker.ended

    def _be_done_if_all_have_gone(self) -> None:
        if (self._ending or self._leaving) and not any(self._crew) and not self.ended.done():
            self.ended.set_result(self._leaving)

    def _leave(self) -> None:
        """Make room for a daemon that goes on with everything, if one is sure to come."""
        if self._leaving or self.ended.done():
            return
        if self._stopping or not self._manager.present:
            get_logger().warning(
                "told to leave the migrations to another daemon, and stays: none would come",
                remedy="systemctl restart postcopyd, while it is not being stopped",
            )
            return
        self._leaving = True
        get_logger().info("leaving: another daemon is to go on with the migrations")
        self._crew.disband(channel.Leave(), _LEAVING)
        self._be_done_if_all_have_gone()

    async def close(self) -> None:
        """End the workers and let go of everything; of what a successor needs, our copies only."""
        self._crew.close()
        if self._leaving:
            await self._manager.told()
        else:
            for name, path in self._opened.items():
                self._holding.release("", name)
                sockets.remove_file(path)
        self._holding.close()
        self._manager.close()
