"""The network path of a stream: between which addresses it goes, and what becomes of it."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

import msgspec

IpAddress = IPv4Address | IPv6Address


class StreamPath(msgspec.Struct, frozen=True):
    """Between which addresses a TCP stream goes."""

    here: IpAddress
    there: IpAddress
    """The source's."""
    scope: int = 0
    """The number of the link that link-local addresses are about."""


def path_of(connection: socket.socket) -> StreamPath | None:
    """Return the path of a connection; None if it is none over IP, or has gone already."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        here, there = connection.getsockname(), connection.getpeername()
    except OSError:
        return None
    scope = there[3] if connection.family == socket.AF_INET6 else 0
    return StreamPath(_address(here[0]), _address(there[0]), scope)


def _address(text: str) -> IpAddress:
    address = ipaddress.ip_address(text.partition("%")[0])
    # A socket for both families shows an IPv4 address inside an IPv6 one.
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


class PathGone(Exception):
    """The network does not carry a stream any more; the text says which and why."""


class PathLoss:
    """What is known to be wrong with the path, and for how long that may stay so."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, grace: float, over: Callable[[str], None]
    ) -> None:
        """Begin with nothing wrong.

        :param grace: seconds that a path which may come back has for it.
        :param over: called with the reason when a stream cannot wait any longer.
        """
        self.reason: str | None = None
        self._loop = loop
        self._grace = grace
        self._over = over
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, reason: str, for_good: bool) -> None:
        """Say what is wrong; what is wrong for good ends the stream now."""
        self.reason = reason
        if for_good:
            self._give_up()
        elif self._timer is None:
            self._timer = self._loop.call_later(self._grace, self._give_up)

    def end(self) -> None:
        """Say that nothing is wrong any more."""
        self.reason = None
        self.stop_waiting()

    def stop_waiting(self) -> None:
        """Say that there is no stream any more that could be ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self.stop_waiting()
        assert self.reason is not None
        self._over(self.reason)
