"""What a soak does to the connections of a migration.

All of it is promised to be survived (docs/reliability.md). What is not is left out: a break before
the package ends a migration by design, and nobody misses what a relay has acknowledged and lost on
a connection that it keeps open.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from typing import Final

from tests.certificates import SERVER
from tests.daemon.whole_migration import LENGTHS
from tests.torture.broken_migrations import LOOPBACK, connect_from
from tests.torture.faulty_relay import Fault, Kind, Way

BREAK_AFTER: Final = 2
"""Seconds of silence that are a break for the daemon. For a source they are 10, as usual: one that
waits for its first answer while the daemon is being started again gives up then, and a source that
gives up before the package ends the migration."""

_KINDS: Final[dict[Kind, int]] = {
    "reset": 5,
    "close": 5,
    "half-close": 3,
    "swallow": 2,
    "stale": 2,
    "duplicate": 2,
    "trickle": 2,
    "delay": 2,
    "silence": 2,
}
"""How often each."""
_FOR_GOOD: Final = 3600.0  # seconds
_SHORT: Final = BREAK_AFTER / 4
_SWALLOWING: Final = 0.2  # seconds, after which both ends see a reset
_SENT: Final = sum(LENGTHS.values()) // 2
"""Bytes that go forward at least, and the migration is not over."""
_SAID: Final = 4000
"""Bytes of requests that come back, about."""
_BEHIND_THE_PACKAGE: Final[dict[Way, int]] = {"forward": 64 << 10, "backward": 64}
"""Bytes of a first connection: more goes backward only when the guest runs."""
_TLS_HANDSHAKE: Final = 4 << 10
"""Bytes that come back before that, at most."""


def network_faults(
    numbers: random.Random, *, tls: bool, has_package: Callable[[], bool]
) -> Iterator[tuple[Fault, ...]]:
    """Say what happens to one connection after the other, each when it is made.

    :param has_package: whether the guest lives here: then any byte may be the last.
    """
    for _ in range(numbers.choice((0, 0, 1, 1, 2, 4))):
        first: dict[Way, int] = {"forward": 0, "backward": 0}
        if not has_package():
            first = dict(_BEHIND_THE_PACKAGE)
            first["backward"] += _TLS_HANDSHAKE if tls else 0
        faults = [_fault(numbers, first["forward"], first["backward"])]
        if numbers.random() < 0.3:
            faults.append(_fault(numbers, first["forward"], first["backward"]))
        yield tuple(faults)


def _fault(numbers: random.Random, forward: int, backward: int) -> Fault:
    kind = numbers.choices(list(_KINDS), list(_KINDS.values()))[0]
    # A relay that keeps the source's end open when ours has broken is found out late.
    way: Way = "forward" if kind == "stale" or numbers.random() < 0.5 else "backward"
    after = numbers.randrange(forward, _SENT)
    if way == "backward":
        after = numbers.randrange(backward, backward + numbers.choice((100, _SAID)))
    match kind:
        case "swallow":
            return Fault(way, after, kind, numbers.randrange(1, 100_000), _SWALLOWING)
        case "stale":
            return Fault(way, after, kind, seconds=numbers.choice((_SHORT, _FOR_GOOD)))
        case "duplicate":
            size = numbers.choice((1, 4, numbers.randrange(1, 400), 60_000))
            return Fault(way, after, kind, size, numbers.choice((_SHORT, _FOR_GOOD)))
        case "trickle":
            return Fault(way, after, kind, numbers.randrange(1, 2000))
        case "delay":
            return Fault(way, after, kind, seconds=numbers.uniform(0.0, 2 * _SHORT))
        case "silence":
            seconds = numbers.choice((_SHORT, numbers.uniform(0.5, 2.0) * BREAK_AFTER, _FOR_GOOD))
            return Fault(way, after, kind, seconds=seconds)
        case _:
            return Fault(way, after, kind)


def named(fault: Fault) -> str:
    """Return what it counts as."""
    if fault.kind == "duplicate":
        return "connection: duplicate"
    return f"connection: {fault.kind} {fault.way}"


class Ports:
    """Ports that the kernel gives to nobody by itself, one after the other.

    A source that has not heard the last word comes back for a minute. One that meets another
    migration at the address of its own ends that one, or is kept busy by it.
    """

    _RANGE: Final = range(12_000, 32_000)

    def __init__(self) -> None:
        """Begin with the first."""
        self._ports = itertools.cycle(self._RANGE)

    def listener(self) -> socket.socket:
        """Listen on the next one that is free, on the loopback."""
        while True:
            with contextlib.suppress(OSError):
                return socket.create_server((LOOPBACK, next(self._ports)))

    def free(self) -> int:
        """Return the next one that is free."""
        with self.listener() as listener:
            return int(listener.getsockname()[1])


_STRANGERS: Final = ("says garbage", "begins as a stream", "goes away", "is silent")
_NO_CERTIFICATE: Final = "shows no certificate"
_STAYS: Final = 60.0
"""Seconds after which a stranger should have been closed, with everything that goes on."""


async def be_a_stranger(numbers: random.Random, port: int, tls: ssl.SSLContext | None) -> str:
    """Connect to a migration as somebody who is not its source; return as whom.

    :param tls: without a certificate; None where there is no TLS.
    :raise ConnectionRefusedError: if nobody listens there any more.
    """
    who: str = numbers.choice((*_STRANGERS, *((_NO_CERTIFICATE,) * 2 if tls else ())))
    try:
        async with asyncio.timeout(_STAYS):
            match who:
                case "goes away" | "is silent":
                    seconds = 0.0 if who == "goes away" else numbers.uniform(0.1, _SHORT)
                    await _leave_after(port, seconds, abort=numbers.random() < 0.5)
                case "shows no certificate":
                    await _until_closed(port, b"", tls)
                case _:
                    first = b"QEVM" if who == "begins as a stream" else b"\x99"
                    said = first + numbers.randbytes(numbers.randrange(8, 5000))
                    await _until_closed(port, said, None)
    except TimeoutError:
        raise AssertionError(f"a stranger who {who} was not refused") from None
    return who


async def _leave_after(port: int, seconds: float, *, abort: bool) -> None:
    with await connect_from(None, LOOPBACK, port) as connection:
        await asyncio.sleep(seconds)
        if abort:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _until_closed(port: int, said: bytes, tls: ssl.SSLContext | None) -> None:
    connection = await connect_from(None, LOOPBACK, port)
    with contextlib.closing(connection), contextlib.suppress(ConnectionError, ssl.SSLError):
        reader, writer = await asyncio.open_connection(
            sock=connection, ssl=tls, server_hostname=SERVER if tls else None
        )
        try:
            writer.write(said)
            while await reader.read(1 << 16):
                pass
        finally:
            writer.transport.abort()
