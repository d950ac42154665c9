"""The last of a source that has sent everything: it has to hear that all is well.

Its connection must not break before (qemu-wire, 5.2), so it is kept as what is to be filled is: a
successor says what we could not say any more.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Final

from postcopyd.incoming.connection import Connection
from postcopyd.incoming.estate import Estate
from postcopyd.incoming.goodbye import Goodbye
from postcopyd.incoming.source_link import SourceLink
from postcopyd.wire.return_path import ReturnPathWriter

LAST_CONNECTION: Final = "connection"
"""The name by which a connection is kept on which everything has come."""


class Farewell:
    """What is said to the source of one migration when everything has come."""

    def __init__(self, estate: Estate, close_timeout: float) -> None:
        """Keep nothing yet.

        :param close_timeout: seconds that the source has to close its connection.
        """
        self._estate = estate
        self._close_timeout = close_timeout
        self._link: SourceLink | None = None
        self._inherited: socket.socket | None = None
        """That of a predecessor, on which everything had come: its source waits for our SHUT."""
        self._goodbye: Goodbye | None = None
        """Where a predecessor has had the stream to its end: who comes back is told so."""
        self._told: list[Connection] = []

    def keep(self, connection: Connection) -> None:
        """Have the connection outlive us: nothing more comes on it.

        What is encrypted nobody else could go on with.
        """
        if isinstance(connection, socket.socket):
            self._estate.keep(LAST_CONNECTION, connection.fileno())

    def release(self) -> None:
        """Keep none: something is missing, so its source has to see that it is of no use."""
        self._estate.release(LAST_CONNECTION)

    def inherit(self) -> None:
        """Take over the connection that a predecessor has kept, if any."""
        connection = self._estate.take(LAST_CONNECTION)
        if connection is not None:
            self._inherited = socket.socket(fileno=connection)

    def say(self, link: SourceLink | None) -> None:
        """Tell the source that all is well.

        :param link: what connects us with it; None if it was a predecessor's.
        """
        self._link = link
        if link is not None:
            link.confirm()
            return
        self._goodbye = Goodbye(self._inherited)
        if self._inherited is not None:
            with contextlib.suppress(OSError):  # it may come back, and is told then
                self._inherited.send(ReturnPathWriter().shut(0))

    def returned(self, connection: Connection) -> bool:
        """Tell a source that is back and may not have heard it; `connection` is taken over then.

        :return: False when a predecessor has had no stream to its end, or nothing was said yet.
        """
        if self._goodbye is None:
            return False
        self._told.append(connection)
        self._goodbye.returned(connection)
        return True

    async def wait_for_close(self) -> None:
        """Return when the source has closed its connection, or had the time to, after `say`."""
        if self._link is not None:
            await self._link.wait_for_close()
        else:
            assert self._goodbye is not None
            await self._goodbye.wait_for_close(self._close_timeout)

    def close(self) -> None:
        """Close what was taken over. The link is the migration's."""
        if self._inherited is not None:
            self._inherited.close()
        for connection in self._told:
            connection.close()
