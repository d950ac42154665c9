"""Taking a connection, or being cancelled, and never both.

`loop.sock_accept` may be cancelled when it has the connection already, which then nobody closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket


async def accept(listener: socket.socket) -> socket.socket:
    """Return the next connection of a listener that does not block."""
    loop = asyncio.get_running_loop()
    while True:
        readable = loop.create_future()
        loop.add_reader(listener, _tell, readable)
        try:
            await readable
        finally:
            loop.remove_reader(listener)
        with contextlib.suppress(BlockingIOError):
            return listener.accept()[0]


def _tell(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)
