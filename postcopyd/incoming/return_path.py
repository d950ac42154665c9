"""The return path: what we say to the source, in the order in which it was said."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from postcopyd.incoming.connection import Connection
from postcopyd.wire.return_path import ReturnPathWriter

_BACKLOG_LIMIT = 4 << 20
"""A source that does not read its return path: this many bytes are kept for it, then it is lost.

What it has asked for itself does not count: a received bitmap of a large guest is longer.
"""


class ReturnPath:
    """Writes return path messages to a non-blocking socket that somebody else owns.

    Small messages go out with the call; what the socket does not take waits here.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: Connection,
        lost: Callable[[Exception], None],
    ) -> None:
        """Write to `connection`; `lost` is called when it does not take anything any more."""
        self._loop = loop
        self._descriptor = connection.fileno()
        self._send_now = connection.send
        self._lost = lost
        self._backlog = bytearray()
        self._asked_for = 0
        """Bytes of the backlog that do not count, at most."""
        self._closed = False
        self.writer = ReturnPathWriter()
        """Makes the messages; it keeps which block was named last."""

    def send(self, message: bytes, *, asked_for: bool = False) -> None:
        """Send `message`, after all that was sent before.

        :param asked_for: the source wants to have it, and cannot ask for it without end.
        """
        if self._closed:
            return
        if asked_for:
            self._asked_for += len(message)
        if self._backlog:
            self._keep(message)
            return
        try:
            sent = self._send_now(message)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._fail(error)
            return
        if sent == len(message):
            self._asked_for = 0
        else:
            self._loop.add_writer(self._descriptor, self._writable)
            self._keep(message[sent:])

    def _keep(self, message: bytes) -> None:
        if len(self._backlog) + len(message) > _BACKLOG_LIMIT + self._asked_for:
            self._fail(
                ConnectionResetError(
                    f"the source does not read its return path: {len(self._backlog)} bytes wait"
                )
            )
            return
        self._backlog += message

    def _writable(self) -> None:
        try:
            sent = self._send_now(self._backlog)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(error)
            return
        del self._backlog[:sent]
        if not self._backlog:
            self._asked_for = 0
            self._loop.remove_writer(self._descriptor)

    def _fail(self, error: Exception) -> None:
        self.close()
        self._lost(error)

    def close(self) -> None:
        """Send nothing more; the socket stays open. To be called before it is closed."""
        if not self._closed:
            self._closed = True
            self._loop.remove_writer(self._descriptor)
            self._backlog.clear()
