"""A worker as the supervisor sees it: a process, and the channel to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, Protocol

from postcopyd.daemon.channel import Channel

_FAILED: Final = 1
_STANDARD: Final = 3
"""Descriptors that every process has: input, output, errors."""


class _Process(Protocol):
    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def kill(self) -> None: ...


class WorkerProcess:
    """A process that does, or may have to do, a part of the daemon's work.

    It does nothing before it is told to begin.
    """

    def __init__(self, process: _Process, channel: Channel) -> None:
        """Take over a process that has been started, and our end of its channel."""
        self.process = process
        self.channel = channel
        self.began = 0.0
        """When it was told to begin, seconds of the event loop's clock."""
        self.heard = 0.0
        """When it has said something last."""
        self.ready = False
        """True from when it does its work."""
        self.deaf = False
        """True when it has gone, and nothing more will be heard of it."""
        self.forsaken = False
        """True when something that it has said was lost: it was killed, and ends there."""
        self.ended = False
        """True when it was told to stop, and all its migrations have ended."""

    @classmethod
    def started(cls) -> WorkerProcess:
        """Start one that makes ready while it waits.

        :raise OSError: if that cannot be.
        """
        ours, theirs = Channel.pair()
        with theirs, ExitStack() as resources:
            resources.enter_context(ours)
            process = subprocess.Popen(
                [sys.executable, "-m", "postcopyd.daemon.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
            resources.pop_all()
        return cls(process, Channel(ours))

    @classmethod
    def forked(cls, work: Callable[[Channel], int]) -> WorkerProcess:
        """Start one as a copy of this process, which need not import what is imported here.

        To be called before there is an event loop, a thread or anything open that is to be closed.

        :param work: what it does; returns its exit status.
        :raise OSError: if that cannot be.
        """
        ours, theirs = Channel.pair()
        process_id = os.fork()
        if process_id == 0:
            ours.detach()  # closed below, like all that is not its own
            _become_worker(Channel(theirs), work)
        theirs.close()
        return cls(_Forked(process_id), Channel(ours))

    def kill(self) -> None:
        """End it as the kernel would."""
        self.process.kill()

    def reap(self) -> int:
        """Return the exit status of a process that has ended, or is about to."""
        self.channel.close()
        return self.process.wait()

    def end(self) -> None:
        """Kill it, and let go of it. Idempotent."""
        self.kill()
        self.reap()


class _Forked:
    """A process that was forked: what `subprocess.Popen` is for one that was started."""

    def __init__(self, process_id: int) -> None:
        self.pid = process_id
        self._status: int | None = None

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        status = self._reap(0)
        assert status is not None
        return status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _reap(self, options: int) -> int | None:
        if self._status is None:
            process_id, status = os.waitpid(self.pid, options)
            if process_id:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status


def _become_worker(channel: Channel, work: Callable[[Channel], int]) -> None:
    """Be a worker in the process that has just been forked, and end it."""
    status = _FAILED
    try:
        own = channel.fileno()
        os.closerange(_STANDARD, own)
        os.closerange(own + 1, os.sysconf("SC_OPEN_MAX"))
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(nothing, 0)
        if nothing:
            os.close(nothing)
        status = work(channel)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
