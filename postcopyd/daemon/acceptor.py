"""Accepts connections on a listening socket and hands each on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

_PAUSE: Final = 1.0  # seconds, when there is no descriptor to accept with


class Acceptor:
    """Accepts from a listening, non-blocking socket, which it takes over.

    Made within a running event loop.
    """

    def __init__(
        self, listener: socket.socket, on_connection: Callable[[socket.socket], None]
    ) -> None:
        """Prepare; nothing is accepted before `start`.

        :param on_connection: takes each new connection (non-blocking) over.
        """
        self._listener = listener
        self._on_connection = on_connection
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Accept from now on."""
        self._resume()

    def close(self) -> None:
        """Accept no more and close the socket. Idempotent."""
        if self._listener.fileno() < 0:
            return
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors or memory. The connection stays readable in the backlog: wait, or
            # the event loop does nothing but fail to accept it.
            self._loop.remove_reader(self._listener.fileno())
            self._pause = self._loop.call_later(_PAUSE, self._resume)
            self._loop.call_exception_handler(
                {"message": "no connection can be accepted at the moment", "exception": error}
            )
            return
        connection.setblocking(False)
        self._on_connection(connection)
