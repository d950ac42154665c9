"""Finds out soon whether a source is still there, when there is reason to doubt it."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from typing import Final

from postcopyd.kernel import tcp

_EACH: Final = 1.0  # seconds
_SILENT_FOR: Final = 2.0
"""Seconds without any answer after which a source that is asked each second has gone."""
_UNANSWERED: Final = 2
"""Questions without an answer that it takes as well: one alone may have been lost on its way."""


class Probing:
    """Asks the host behind each of a source's connections, and looks whether it answers.

    A source whose host answers stays, whoever asked for the probing. One whose host does not know
    the connection any more, or whose host does not answer, has gone. Where somebody on the way
    answers in its place (a tunnel whose other half is dead) no host can tell: when a source is back
    on another connection, the one that brings nothing any more has gone as well.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connections: Callable[[], list[socket.socket]],
        gone: Callable[[Exception], None],
        *,
        replaced: Callable[[], bool],
        received: Callable[[], int],
        patience: float,
    ) -> None:
        """Wait to be told to begin.

        :param connections: those that the source has now.
        :param gone: called once, when one of them is found to be dead.
        :param replaced: asked each second whether there is another source in its place, and it is
            not we who hold up what it sends.
        :param received: tells how many bytes have come.
        :param patience: seconds in which one that is replaced has to bring something.
        """
        self._loop = loop
        self._connections = connections
        self._gone = gone
        self._replaced = replaced
        self._received = received
        self._patience = patience
        self._received_before = 0
        self._silent_for = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Ask now and from now on, each second of silence. It costs next to nothing."""
        if self._timer is not None:
            return
        try:
            for connection in self._connections():
                tcp.probe_each_second(connection)
        except OSError as error:
            self._gone(error)
            return
        self._timer = self._loop.call_later(_EACH, self._look)

    def stop(self) -> None:
        """Ask no more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        for connection in self._connections():
            standing = tcp.standing(connection)
            if standing is None:
                continue
            if standing.closed:
                # Whoever receives would say so, but nobody does while the stream stands still.
                error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                error = error or errno.ECONNRESET
                self._gone(OSError(error, os.strerror(error)))
                return
            if standing.silent >= _SILENT_FOR and standing.unanswered >= _UNANSWERED:
                self._gone(TimeoutError(f"its host has been silent for {standing.silent:.1f} s"))
                return
        if self._brings_nothing():
            silent_for = f"{self._silent_for:g} s"
            self._gone(TimeoutError(f"it is back, and here nothing has come for {silent_for}"))
            return
        self._timer = self._loop.call_later(_EACH, self._look)

    def _brings_nothing(self) -> bool:
        received = self._received()
        if self._replaced() and received == self._received_before:
            self._silent_for += _EACH
        else:
            self._silent_for = 0.0
        self._received_before = received
        return self._silent_for >= self._patience
