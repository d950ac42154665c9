"""The goodbye after the last page: the source is told that all is well, and closes its connection.

A source whose connection broke before it was told comes back and asks what is here. It is told
then, in place of an answer: otherwise it would never know whether its guest runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from postcopyd.incoming.connection import Connection
from postcopyd.wire.return_path import ReturnPathWriter

_ALL_IS_WELL: Final = ReturnPathWriter().shut(0)
_DROPPED_AT_ONCE: Final = 4096  # bytes


class Goodbye:
    """Begins when everything is here."""

    def __init__(self, connection: Connection | None) -> None:
        """Say goodbye on `connection`, which stays its owner's.

        :param connection: None if it is known to have broken: only who comes back is told.
        """
        self._connection = connection
        self._returned: Connection | None = None
        self._has_returned = asyncio.Event()
        self._gone = connection is None or _has_closed(connection)

    def returned(self, connection: Connection) -> None:
        """Tell the source on its new connection, which stays its owner's."""
        if _has_closed(connection):
            return  # it has gone again, and may come back once more
        with contextlib.suppress(OSError):
            connection.send(_ALL_IS_WELL)
        self._returned = connection
        self._has_returned.set()

    async def wait_for_close(self, seconds: float) -> None:
        """Return when the source has closed the connection on which it was told.

        Or after `seconds`; one whose connection broke may come back within them. What it says is
        dropped. A QEMU source closes when it has read SHUT, and without TLS's close_notify
        (qemu-wire, 5.6).
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                closed = False
                if self._connection is not None and not self._gone:
                    closed = await _closes(self._connection)
                while not closed:
                    await self._has_returned.wait()
                    self._has_returned.clear()
                    assert self._returned is not None
                    closed = await _closes(self._returned)


async def _closes(connection: Connection) -> bool:
    """Return when the other end has closed `connection`; False if it broke."""
    loop = asyncio.get_running_loop()
    closed: asyncio.Future[bool] = loop.create_future()

    def drop() -> None:
        try:
            if closed.done():
                return
            if connection.recv(_DROPPED_AT_ONCE, 0):
                loop.call_soon(drop)  # until nothing is left: a reset is told of only once
            else:
                closed.set_result(True)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            closed.set_result(False)

    descriptor = connection.fileno()
    loop.add_reader(descriptor, drop)
    drop()
    try:
        return await closed
    finally:
        closed.cancel()
        loop.remove_reader(descriptor)


def _has_closed(connection: Connection) -> bool:
    """Tell whether the other end has closed `connection`; what it has said is dropped."""
    try:
        while connection.recv(_DROPPED_AT_ONCE, 0):
            pass
        return True
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True
