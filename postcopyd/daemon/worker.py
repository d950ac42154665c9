"""A worker: a process that does a part of the daemon's work, at the supervisor's word."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

import msgspec
import uvloop

from postcopyd.daemon import logging, process, service
from postcopyd.daemon.channel import Begin, Channel, Held
from postcopyd.daemon.config import Configuration
from postcopyd.daemon.supervisor_link import Inheritance, SupervisorLink
from postcopyd.daemon.worker_process import WorkerProcess

_FAILED: Final = 1


def main(words: Sequence[str]) -> int:
    """Make ready, wait until there is work, do it, and return the exit status.

    :param words: the number of the descriptor of the channel to the supervisor.
    """
    connection = socket.socket(fileno=int(words[0]))
    os.set_inheritable(connection.fileno(), False)
    return work(Channel(connection), make_ready=True)


def work(channel: Channel, *, make_ready: bool = False) -> int:
    """Wait until there is work, do it, and return the exit status.

    :param make_ready: do before what takes time and can be done before.
    """
    # They are for the supervisor, which tells us: a terminal sends them to all of its group.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    process.set_name("postcopyd-spare")
    if make_ready:
        service.prepare()
    begun = _wait_for_work(channel)
    if begun is None:
        return 0  # the supervisor has gone, and nothing is lost: there was no work
    begin, inherited = begun
    process.set_name(f"postcopyd-{begin.number}")
    configuration = msgspec.json.decode(begin.configuration, type=Configuration)
    log = configuration.log
    with ExitStack() as resources:
        resources.enter_context(
            logging.configured(
                log.level, log.format, worker=begin.number if begin.workers > 1 else None
            )
        )
        link = SupervisorLink(channel, makes_room=begin.manager_keeps)
        try:
            uvloop.run(service.serve(configuration, begin, link, inherited))
        except service.CannotStart:
            return _FAILED  # the supervisor knows why
    return 0


def start_all(number: int, resources: ExitStack) -> list[WorkerProcess]:
    """Start workers as copies of this process, before anything is open.

    After a kill guests wait for what a process has to import, so that is done only once.

    :param resources: ends them.
    :raise OSError: if a process cannot be started.
    """
    workers = []
    for _ in range(number):
        worker = WorkerProcess.forked(work)
        resources.callback(worker.end)
        workers.append(worker)
    return workers


def _wait_for_work(channel: Channel) -> tuple[Begin, Inheritance] | None:
    """Return what the supervisor says and hands over; None if it has gone first."""
    inherited: Inheritance = defaultdict(dict)
    while True:
        channel.wait()
        try:
            for message, descriptor in channel.received():
                if isinstance(message, Held) and descriptor is not None:
                    inherited[message.owner][message.name] = descriptor
                elif isinstance(message, Begin):
                    return message, inherited
        except EOFError:
            return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
