"""A relay to which every kind of bad luck happens that a network has.

It knows nothing of what it passes on: what happens is told in bytes and seconds, before.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from tests.silent import hear_again, make_deaf

Connect: TypeAlias = Callable[[int], Awaitable[socket.socket]]

Way: TypeAlias = Literal["forward", "backward"]
"""Forward is from the source to the destination."""

Kind: TypeAlias = Literal[
    "reset", "close", "half-close", "swallow", "stale", "trickle", "delay", "silence", "duplicate"
]

CUTS: Final[tuple[Kind, ...]] = ("reset", "close", "half-close", "swallow")
"""After these nothing passes on that way any more."""

_ABORT: Final = struct.pack("ii", 1, 0)
_PIECE: Final = 1 << 16
_RECORDED: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one connection when so many bytes have passed on one way.

    ========== ====================================================================================
    reset      both ends see a reset
    close      both ends see an end
    half-close the end towards which `way` goes sees an end; the other way goes on
    swallow    the next `size` bytes, or those of the next `seconds`, are taken and never arrive;
               then both ends see a reset
    stale      the end from which `way` comes sees a reset; the other one nothing, for `seconds`
    trickle    the next `size` bytes go one at a time
    delay      nothing passes on that way for `seconds`
    silence    both ends hear nothing, not even from the other's kernel, for `seconds`
    duplicate  the first `size` bytes are said to the destination once more, on a connection of
               their own, which stays for `seconds`
    ========== ====================================================================================
    """

    way: Way
    after: int
    kind: Kind
    size: int = 0
    seconds: float = 0.0


class _Cut(Exception):
    """Nothing passes any more."""

    def __init__(self, stays: socket.socket | None = None, seconds: float = 0.0) -> None:
        """Close both ends, but one of them so much later than the other."""
        self.stays = stays
        self.seconds = seconds


class FaultyRelay:
    """Passes the connections that it takes on, and has the faults happen."""

    def __init__(
        self,
        faults: Iterable[tuple[Fault, ...]],
        connect: Connect,
        *,
        ends_with_destination: bool = False,
    ) -> None:
        """Make a relay; each connection has the faults that come next, then there are none.

        :param connect: connects to a port of the destination's host.
        :param ends_with_destination: listen no more when nobody listens there any more.
        """
        self._faults = iter(faults)
        self._connect = connect
        self._ends_with_destination = ends_with_destination
        self._listener: socket.socket | None = None
        self._destination = 0
        self.refused = True
        """True once nobody listens there any more: a relay takes connections nevertheless."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.connections = 0
        self.happened: list[Fault] = []

    @contextlib.asynccontextmanager
    async def listening(self, listener: socket.socket) -> AsyncIterator[FaultyRelay]:
        """Take connections on `listener`, whose port is `self.port`; it is closed at the end."""
        with listener:
            listener.setblocking(False)
            self.port = listener.getsockname()[1]
            self._listener = listener
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)
            try:
                yield self
            finally:
                self._listen_no_more()
                while self._tasks:
                    for task in self._tasks:
                        task.cancel()
                    await asyncio.wait(self._tasks)

    def _listen_no_more(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()

    def lead_to(self, port: int) -> None:
        """Pass on to this port the connections that follow."""
        self._destination = port
        self.refused = False

    def _begin(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            near, _ = listener.accept()
            self.connections += 1
            self._begin(self._relay(near, next(self._faults, ())))

    async def _relay(self, near: socket.socket, faults: tuple[Fault, ...]) -> None:
        with near, contextlib.suppress(OSError), await self._reach() as far:
            connection = _Connection(self, near, far, faults)
            ways = {
                asyncio.ensure_future(connection.copy("forward")),
                asyncio.ensure_future(connection.copy("backward")),
            }
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for way in ways:
                    way.cancel()
                ends = await asyncio.gather(*ways, return_exceptions=True)
            for ended in ends:
                if isinstance(ended, _Cut) and ended.stays is not None:
                    (near if ended.stays is far else far).close()
                    await asyncio.sleep(ended.seconds)
                elif isinstance(ended, Exception) and not isinstance(ended, OSError | _Cut):
                    raise ended

    async def _reach(self) -> socket.socket:
        destination = self._destination
        try:
            return await self._connect(destination)
        except ConnectionRefusedError:
            self.refused = destination == self._destination
            if self.refused and self._ends_with_destination:
                self._listen_no_more()
            raise

    def say_again(self, said: bytes, seconds: float) -> None:
        """Have a connection of its own say this, and drop what comes back."""

        async def say() -> None:
            loop = asyncio.get_running_loop()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(seconds):
                    with await self._connect(self._destination) as again:
                        await loop.sock_sendall(again, said)
                        while await loop.sock_recv(again, _PIECE):
                            pass

        self._begin(say())


class _Connection:
    """Two ends, and what happens between them."""

    def __init__(
        self, relay: FaultyRelay, near: socket.socket, far: socket.socket, faults: tuple[Fault, ...]
    ) -> None:
        self._relay = relay
        self._near, self._far = near, far
        for end in (near, far):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._faults = faults
        self._recorded = bytearray()
        self._passes = asyncio.Event()
        self._passes.set()

    async def copy(self, way: Way) -> None:
        """Pass everything on until the end; say then that nothing follows.

        :raise OSError: if one of the ends broke.
        :raise _Cut: if it is to break.
        """
        reader, writer = (self._near, self._far) if way == "forward" else (self._far, self._near)
        faults = sorted(
            (fault for fault in self._faults if fault.way == way), key=lambda fault: fault.after
        )
        passed = 0
        for fault in faults:
            while passed < fault.after:
                if not (count := await self._pass(reader, writer, fault.after - passed)):
                    return
                passed += count
            self._relay.happened.append(fault)
            passed += await self._happen(fault, reader, writer)
            if fault.kind == "half-close":
                writer.shutdown(socket.SHUT_WR)
                return
        while await self._pass(reader, writer, _PIECE):
            pass

    async def _pass(self, reader: socket.socket, writer: socket.socket, most: int) -> int:
        """Pass on up to `most` bytes; return how many, 0 at the end."""
        loop = asyncio.get_running_loop()
        data = await loop.sock_recv(reader, min(most, _PIECE))
        await self._passes.wait()
        if not data:
            with contextlib.suppress(OSError):
                writer.shutdown(socket.SHUT_WR)
            return 0
        if reader is self._near and len(self._recorded) < _RECORDED:
            self._recorded += data
        await loop.sock_sendall(writer, data)
        return len(data)

    async def _happen(self, fault: Fault, reader: socket.socket, writer: socket.socket) -> int:
        """Have it happen; return how many bytes have passed in it."""
        passed = 0
        match fault.kind:
            case "reset":
                self._cut(reader, writer)
            case "close":
                raise _Cut
            case "swallow":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(fault.seconds):
                        while passed < fault.size:
                            passed += await self._drop(reader, fault.size - passed)
                self._cut(reader, writer)
            case "stale":
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
                raise _Cut(writer, fault.seconds)
            case "trickle":
                while passed < fault.size and await self._pass(reader, writer, 1):
                    passed += 1
            case "delay":
                await asyncio.sleep(fault.seconds)
            case "silence":
                self._passes.clear()
                for end in (reader, writer):
                    make_deaf(end)
                await asyncio.sleep(fault.seconds)
                for end in (reader, writer):
                    hear_again(end)
                self._passes.set()
            case "duplicate":
                self._relay.say_again(bytes(self._recorded[: fault.size]), fault.seconds)
        return passed

    @staticmethod
    async def _drop(reader: socket.socket, most: int) -> int:
        """Take up to `most` bytes; return how many. At the end all are taken."""
        data = await asyncio.get_running_loop().sock_recv(reader, min(most, _PIECE))
        return len(data) or most

    @staticmethod
    def _cut(*ends: socket.socket) -> None:
        for end in ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        raise _Cut
