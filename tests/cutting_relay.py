"""A relay that breaks connections at bytes that were chosen before."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tests.relaying import Relay

How: TypeAlias = Literal["reset", "close", "half-close", "stay"]
_ABORT = struct.pack("ii", 1, 0)
_PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Cut:
    """Where and how one connection breaks: when one of the directions has passed so many bytes."""

    forward: int | None = None
    """Bytes from the source to the destination; None for as many as come."""
    backward: int | None = None
    """Bytes from the destination to the source."""
    how: How = "reset"
    """A half-close ends only the direction whose bytes have passed. At "stay" the destination sees
    an end, and the source nothing, as long as there is the relay."""


class CuttingRelay(Relay):
    """Passes the connections that it takes on to a listener of this host, until they are cut."""

    def __init__(self, port: int, cuts: Iterable[Cut] = ()) -> None:
        """Cut the first connection as the first of `cuts` says, and so on; then pass on all."""
        super().__init__()
        self._destination = port
        self._cuts = iter(cuts)
        self.passed: list[tuple[int, int]] = []
        """Bytes that went forward and backward, of each connection that has ended."""

    async def _relay(self, near: socket.socket, number: int) -> None:
        cut = next(self._cuts, Cut())
        loop = asyncio.get_running_loop()
        with near, socket.socket() as far:
            for end in (near, far):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            counts = [0, 0]
            try:
                with contextlib.suppress(ConnectionError):
                    await loop.sock_connect(far, ("127.0.0.1", self._destination))
                    await self._both_ways(near, far, cut, counts)
                    if cut.how == "stay" and self._is_over(cut, counts):
                        far.close()
                        await loop.create_future()
            finally:
                self.passed.append((counts[0], counts[1]))
            if cut.how == "reset" and self._is_over(cut, counts):
                for end in (near, far):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)

    @staticmethod
    def _is_over(cut: Cut, counts: list[int]) -> bool:
        return counts[0] == cut.forward or counts[1] == cut.backward

    async def _both_ways(
        self, near: socket.socket, far: socket.socket, cut: Cut, counts: list[int]
    ) -> None:
        ways = {
            asyncio.ensure_future(self._copy(near, far, cut.forward, cut.how, counts, 0)),
            asyncio.ensure_future(self._copy(far, near, cut.backward, cut.how, counts, 1)),
        }
        try:
            while ways:
                done, ways = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                errors = [error for way in done if (error := way.exception()) is not None]
                if errors:
                    raise errors[0]
                if cut.how != "half-close" and self._is_over(cut, counts):
                    return
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    @staticmethod
    async def _copy(
        reader: socket.socket,
        writer: socket.socket,
        limit: int | None,
        how: How,
        counts: list[int],
        way: int,
    ) -> None:
        """Copy until the end, or the limit; then say to `writer` that nothing follows."""
        loop = asyncio.get_running_loop()
        while limit is None or counts[way] < limit:
            most = _PIECE if limit is None else min(_PIECE, limit - counts[way])
            data = await loop.sock_recv(reader, most)
            if not data:
                break
            counts[way] += len(data)
            await loop.sock_sendall(writer, data)
        if how == "stay" and counts[way] == limit:
            return
        with contextlib.suppress(OSError):
            writer.shutdown(socket.SHUT_WR)
