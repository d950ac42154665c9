"""Connecting to a destination, and back to the very same one after a break."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from postcopyd.outgoing.connection import ConnectionLost, reason_of
from postcopyd.wire.address import Address

_CONNECT_SECONDS: Final = 10
_RECONNECT_SECONDS: Final = 3
"""Less: when a network comes back, a new try is there before an old one is retransmitted."""
_NOBODY: Final = frozenset({errno.ECONNREFUSED, errno.ENOENT})


class NobodyListens(ConnectionLost):
    """There was none: its host says that nobody listens there."""


async def connect(address: Address) -> socket.socket:
    """Return a connected non-blocking socket.

    :raise ConnectionLost: if nobody answers there.
    """
    return await _within(_CONNECT_SECONDS, str(address), _connect_any(address))


def way_back(connection: socket.socket, address: Address) -> Callable[[], Awaitable[socket.socket]]:
    """Return what connects to the peer of `connection` again, as `connect` does.

    To that very peer: where a name has several addresses, another one may be another host, which
    must not get the guest while this one has it.

    :param address: to which it was connected. A Unix socket is found again by this path: the peer
        calls it by its own, which may be another one here.
    :raise ConnectionLost: if the peer has gone already; `connection` is closed then.
    """
    family = connection.family
    try:
        place = connection.getpeername()
    except OSError as error:
        connection.close()
        raise ConnectionLost(f"the connection was lost: {reason_of(error)}") from error
    if family == socket.AF_UNIX:
        place, name = address.path, str(address)
    else:
        name = str(Address("tcp", host=place[0], port=place[1]))

    async def connect_again() -> socket.socket:
        loop = asyncio.get_running_loop()
        return await _within(_RECONNECT_SECONDS, name, _connect_one(loop, family, place))

    return connect_again


async def _within(
    seconds: float, name: str, connecting: Coroutine[Any, Any, socket.socket]
) -> socket.socket:
    try:
        async with asyncio.timeout(seconds):
            return await connecting
    except TimeoutError:
        raise ConnectionLost(f"cannot connect to {name}: no answer in {seconds:g} s") from None
    except OSError as error:
        kind = NobodyListens if error.errno in _NOBODY else ConnectionLost
        raise kind(f"cannot connect to {name}: {reason_of(error)}") from error


async def _connect_any(address: Address) -> socket.socket:
    loop = asyncio.get_running_loop()
    if address.kind == "unix":
        return await _connect_one(loop, socket.AF_UNIX, address.path)
    found = await loop.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
    )
    for number, (family, _, _, _, place) in enumerate(found, 1):
        try:
            return await _connect_one(loop, family, place)
        except OSError:
            if number == len(found):
                raise
    raise ConnectionLost(f"cannot connect to {address}: the name has no address")


async def _connect_one(
    loop: asyncio.AbstractEventLoop, family: int, place: str | tuple[object, ...]
) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.setblocking(False)
        await loop.sock_connect(connection, place)
        if family == socket.AF_UNIX:
            # Where too many wait to be accepted already connect(2) answers EAGAIN, which the event
            # loop takes for a connection under way.
            connection.getpeername()
        elif connection.getsockname() == connection.getpeername():
            # Tried often enough, a port that is free is given to us, and we meet ourselves.
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    except BaseException:
        connection.close()
        raise
    return connection
