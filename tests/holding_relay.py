"""A relay that holds what a source sends, so that its migration is half way for as long as told."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from tests.relaying import Relay

_PIECE = 1 << 16


class HoldingRelay(Relay):
    """Passes connections on to a listener of this host.

    Of the first one no more than so many bytes of the source; it breaks when the destination breaks
    it. The others not before `go_on`.
    """

    def __init__(self, port: int, first: int) -> None:
        super().__init__()
        self._destination = port
        self._first = first
        self._may_go_on = asyncio.Event()
        self.holds = asyncio.Event()
        """Set when so many bytes of the first one have been passed on."""

    def go_on(self) -> None:
        """Pass on all connections from now on, but the first one."""
        self._may_go_on.set()

    async def _relay(self, near: socket.socket, number: int) -> None:
        is_first = number == 1
        if not is_first:
            await self._may_go_on.wait()
        with near, socket.socket() as far, contextlib.suppress(ConnectionError):
            for end in (near, far):
                end.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(far, ("127.0.0.1", self._destination))
            forward = asyncio.ensure_future(
                self._copy_and_hold(near, far) if is_first else _copy(near, far)
            )
            backward = asyncio.ensure_future(_copy(far, near))
            try:
                await asyncio.wait((forward, backward), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in (forward, backward):
                    way.cancel()
                await asyncio.gather(forward, backward, return_exceptions=True)

    async def _copy_and_hold(self, near: socket.socket, far: socket.socket) -> None:
        await _copy(near, far, self._first)
        self.holds.set()
        await asyncio.get_running_loop().create_future()


async def _copy(reader: socket.socket, writer: socket.socket, count: int | None = None) -> None:
    """Copy so many bytes, or until the end."""
    loop = asyncio.get_running_loop()
    while count is None or count:
        data = await loop.sock_recv(reader, _PIECE if count is None else min(_PIECE, count))
        if not data:
            return
        await loop.sock_sendall(writer, data)
        if count is not None:
            count -= len(data)
