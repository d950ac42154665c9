"""The source's connection: batches out, return path in, and no long queue in between.

What waits in the kernel waits in front of every page that is asked for later. So a batch is only
made when the kernel wants more, and the kernel wants more only when little of what it has is still
unsent (TCP_NOTSENT_LOWAT, tcp(7)). The event loop gets its turn between any two batches, and with
it the requests.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

from postcopyd.outgoing.liveness import INFO_LENGTH, Liveness
from postcopyd.outgoing.records import Batch, Buffer, Pause

BREAK_AFTER: Final = 10.0
"""Seconds without an answer from the destination's host that break a connection."""
SHORTEST_BREAK: Final = 1.0
"""Less is no sign of a break: answers to probes of a full window are that far apart."""
LONGEST_BREAK: Final = 3600.0
_NOT_SENT_LIMIT: Final = 128 << 10
"""TCP: bytes that the kernel takes beyond what it has sent."""
_KEEPALIVE_PROBES: Final = 3
_LOOKS: Final = 8
"""How often an answer is looked for, in the time in which one must come."""
_TCP_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_CLOSED: Final = frozenset({errno.ECONNRESET, errno.EPIPE})
_MOST_BUFFERS: Final = 1024
"""IOV_MAX: more are an error (sendmsg(2))."""
_RECEIVE_BYTES: Final = 64 << 10
_NOTHING: Final[Iterator[Batch | Pause]] = iter(())


class ConnectionLost(Exception):
    """The connection cannot be used any more; the text says what happened to it."""


class PeerClosed(ConnectionLost):
    """The other end has closed it."""


class Stream(Protocol):
    """As much of a connected stream socket as is used here: that is one, or what encrypts.

    Every method may raise `OSError`, and those that send or receive `ConnectionLost`.
    """

    @property
    def family(self) -> int:
        """AF_INET, AF_INET6 or AF_UNIX."""

    def fileno(self) -> int:
        """Return the descriptor, which tells when to read and to write."""

    def setblocking(self, flag: bool, /) -> None:
        """Have reading and writing wait, or not."""

    def getsockopt(self, level: int, option: int, length: int, /) -> bytes:
        """Return an option of the socket."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Set an option of the socket."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Receive into `buffer`; return how many bytes, 0 at the end.

        :raise BlockingIOError: if nothing is here.
        """

    def sendmsg(self, buffers: Iterable[Buffer], /) -> int:
        """Send the beginning of `buffers`; return how many bytes that is.

        :raise BlockingIOError: if nothing can be sent now. What is sent next begins with the same
            bytes.
        """

    def close(self) -> None:
        """Close it. Idempotent."""


class Connection:
    """One connection to the destination. Used by one coroutine at a time."""

    def __init__(
        self,
        connection: Stream,
        received: Callable[[memoryview], None],
        break_after: float = BREAK_AFTER,
    ) -> None:
        """Take over `connection` and read from it at once.

        :param received: called with what the destination sent; what it raises ends the connection
            and is raised by `send` and `until`.
        :param break_after: seconds; the connection is lost when the destination's host has not
            answered for so long. One that answers may leave data unread for any time.
        :raise OSError: if the socket, closed then, is no stream socket that can be set up.
        """
        try:
            _set_up(connection, break_after)
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
        self._break_after = break_after
        self._liveness = Liveness()
        self._look: asyncio.TimerHandle | None = None
        if connection.family in _TCP_FAMILIES:
            self._look_for_answer()

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
        except ConnectionLost as error:
            self._hear_last_words()
            self._fail(error)
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
                raise PeerClosed("the destination closed the connection")
            self._received(self._receive_buffer[:count])
            # libuv tells of a reset once, and it may have been now.
            self._loop.call_soon(self._look_again)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(_lost(error))
        except Exception as error:
            self._fail(error)
        self._notify()

    def _look_again(self) -> None:
        if self._descriptor >= 0 and self._failure is None:
            self._readable()

    def _hear_last_words(self) -> None:
        """Receive what came before the connection was lost: it may say why."""
        try:
            while self._failure is None and (count := self._socket.recv_into(self._receive_buffer)):
                self._received(self._receive_buffer[:count])
        except OSError:
            return
        except Exception as error:
            self._fail(error)

    # -- the end -----------------------------------------------------------------------------

    def _look_for_answer(self) -> None:
        """See whether the destination's host still answers, and again in a while."""
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO_LENGTH)
        if self._liveness.unanswered(info, self._loop.time()) >= self._break_after:
            self._fail(
                ConnectionLost(
                    "the connection was lost: no answer from the destination's host for "
                    f"{self._break_after:g} s"
                )
            )
            return
        self._look = self._loop.call_later(self._break_after / _LOOKS, self._look_for_answer)

    def _stop(self) -> None:
        self._remove_writer()
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._look is not None:
            self._look.cancel()
            self._look = None
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


def _set_up(connection: Stream, break_after: float) -> None:
    connection.setblocking(False)
    if connection.family in _TCP_FAMILIES:
        # An idle connection: the first probe at half of the time, the last one when it is over.
        interval = math.ceil(break_after / 2 / _KEEPALIVE_PROBES)
        for level, option, value in (
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _NOT_SENT_LIMIT),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, math.ceil(break_after / 2)),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES),
        ):
            connection.setsockopt(level, option, value)


def _lost(error: OSError) -> ConnectionLost:
    what = f"the connection was lost: {reason_of(error)}"
    return PeerClosed(what) if error.errno in _CLOSED else ConnectionLost(what)


def reason_of(error: OSError) -> str:
    """Return what the system says of it; event loops put texts of their own in its place."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error)  # of a name that is not resolved
