"""The source's connection: batches out, return path in, and no long queue in between.

What waits in the kernel waits in front of every page that is asked for later. So a batch is only
made when the kernel wants more, and the kernel wants more only when little of what it has is still
unsent (TCP_NOTSENT_LOWAT, tcp(7)). The event loop gets its turn between any two batches, and with
it the requests.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from postcopyd.outgoing.records import Batch, Pause
from postcopyd.wire.address import Address

_CONNECT_SECONDS: Final = 10
_NOT_SENT_LIMIT: Final = 128 << 10
"""TCP: bytes that the kernel takes beyond what it has sent."""
_KEEPALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)
"""A destination whose machine has gone is noticed after 40 s, also while nothing is to be sent."""
_MOST_BUFFERS: Final = 1024
"""IOV_MAX: more are an error (sendmsg(2))."""
_RECEIVE_BYTES: Final = 64 << 10
_NOTHING: Final[Iterator[Batch | Pause]] = iter(())


class ConnectionLost(Exception):
    """The connection cannot be used any more; the text says what happened to it."""


async def connect(address: Address) -> socket.socket:
    """Return a connected non-blocking socket.

    :raise ConnectionLost: if nobody answers there.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
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
    except TimeoutError:
        raise ConnectionLost(
            f"cannot connect to {address}: no answer in {_CONNECT_SECONDS} s"
        ) from None
    except OSError as error:
        raise ConnectionLost(f"cannot connect to {address}: {_reason(error)}") from error


async def _connect_one(
    loop: asyncio.AbstractEventLoop, family: int, place: str | tuple[object, ...]
) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.setblocking(False)
        await loop.sock_connect(connection, place)
    except BaseException:
        connection.close()
        raise
    return connection


class Connection:
    """One connection to the destination. Used by one coroutine at a time."""

    def __init__(self, connection: socket.socket, received: Callable[[memoryview], None]) -> None:
        """Take over `connection` and read from it at once.

        :param received: called with what the destination sent; what it raises ends the connection
            and is raised by `send` and `until`.
        :raise OSError: if the socket, closed then, is no stream socket that can be set up.
        """
        try:
            _set_up(connection)
        except OSError:
            connection.close()
            raise
        self._loop = asyncio.get_running_loop()
        self._socket = connection
        self._descriptor = connection.fileno()
        self._send_message = connection.sendmsg
        self._received = received
        self._receive_buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._batches: Iterator[Batch | Pause] = _NOTHING
        self._batch: Batch = []
        self._sending = False
        self._writer_added = False
        self._pause: asyncio.TimerHandle | None = None
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.bytes_sent = 0
        """Bytes that the kernel has taken."""
        self.crowded = False
        """True when the kernel did not take the last batch at once."""
        self._loop.add_reader(self._descriptor, self._readable)

    # -- what a coroutine asks for ---------------------------------------------------------------

    async def send(self, batches: Iterable[Batch | Pause]) -> None:
        """Send all batches, each made when the one before it has been taken by the kernel.

        If this is cancelled, half a batch may have been sent: the connection is of no use then.

        :raise Exception: what making a batch, or `received`, raised.
        :raise ConnectionLost: if the connection is lost.
        """
        if self._failure is not None:
            raise self._failure
        self._batches = iter(batches)
        self._sending = True
        self._advance()
        await self.until(lambda: not self._sending)

    async def until(self, done: Callable[[], bool]) -> None:
        """Return when `done()` is true; it is asked whenever something was received or all is sent.

        :raise Exception: what `received` raised.
        :raise ConnectionLost: if the connection is lost before.
        """
        while not done():
            if self._failure is not None:
                raise self._failure
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def wake(self) -> None:
        """End a pause: there may be something to send that does not wait."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
            self._advance()

    def close(self) -> None:
        """Close the socket, whatever still waits to be sent. Idempotent."""
        if self._descriptor < 0:
            return
        self._stop()
        self._loop.remove_reader(self._descriptor)
        self._descriptor = -1
        self._socket.close()

    # -- sending -----------------------------------------------------------------------------

    def _advance(self) -> None:
        """Send one batch, or what is left of one; arrange for the next."""
        try:
            if not self._batch and not self._next_batch():
                return
            self._send_some()
            # A lone batch, such as the answer to a request in a pause, needs no writer.
            if not self._writer_added and not self._batch and not self._next_batch():
                return
        except Exception as error:
            self._fail(error)
            return
        if not self._writer_added:
            # It stays until there is nothing to send: the loop then comes back between batches.
            self._loop.add_writer(self._descriptor, self._advance)
            self._writer_added = True

    def _next_batch(self) -> bool:
        """Have the next batch made; False if there is none now."""
        batch = next(self._batches, None)
        if isinstance(batch, list):
            self._batch = batch
            self.crowded = False
            return True
        self._remove_writer()
        if batch is None:
            self._batches = _NOTHING
            self._sending = False
            self._notify()
        else:
            self._pause = self._loop.call_later(batch.seconds, self.wake)
        return False

    def _send_some(self) -> None:
        batch = self._batch
        if not batch:
            return
        try:
            sent = self._send_message(batch[:_MOST_BUFFERS])
        except (BlockingIOError, InterruptedError):
            self.crowded = True
            return
        except OSError as error:
            raise _lost(error) from error
        self.bytes_sent += sent
        for place, buffer in enumerate(batch):
            if sent < len(buffer):
                self.crowded = True
                batch[: place + 1] = [memoryview(buffer)[sent:]]
                return
            sent -= len(buffer)
        self._batch = []

    def _remove_writer(self) -> None:
        if self._writer_added:
            self._loop.remove_writer(self._descriptor)
            self._writer_added = False

    # -- receiving ---------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            count = self._socket.recv_into(self._receive_buffer)
            if not count:
                raise ConnectionLost("the destination closed the connection")
            self._received(self._receive_buffer[:count])
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(_lost(error))
        except Exception as error:
            self._fail(error)
        self._notify()

    # -- the end -----------------------------------------------------------------------------

    def _stop(self) -> None:
        self._remove_writer()
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self._batches = _NOTHING
        self._batch = []

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
            self._stop()
            self._loop.remove_reader(self._descriptor)
            self._notify()

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _set_up(connection: socket.socket) -> None:
    connection.setblocking(False)
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _NOT_SENT_LIMIT)
        for option in _KEEPALIVE:
            connection.setsockopt(*option)


def _lost(error: OSError) -> ConnectionLost:
    return ConnectionLost(f"the connection was lost: {_reason(error)}")


def _reason(error: OSError) -> str:
    """Return what the system says of it; event loops put texts of their own in its place."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error)  # of a name that is not resolved
