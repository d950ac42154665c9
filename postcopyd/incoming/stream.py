"""One stream connection: what is like a socket, a sans-IO reader, and the messages in between."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from postcopyd.incoming.connection import Connection
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import Message, Pages

_PAGES_A_LOOK = 16
"""Pages between two looks at the faults and the preempt channel."""
_OTHER_MESSAGE = 4
"""What any other message counts for: one receive can bring tens of thousands of zero pages."""

_ENTRY = 2048
"""Bytes that an entry of a scatter list holds at least, on average: words and pages take turns."""

_RECEIVES_A_TURN = 4
"""Receives in one turn of the event loop."""

_READ_AHEAD = 128
_READ_AHEAD_CAREFULLY = 16
_READ_AHEAD_BESIDE = 64
_READ_AHEAD_IN_COMPANY = 32
"""Pages that one receive may bring: at most, while the guest faults, while it faults and what it
waits for comes on another connection, and while another guest faults. What was received stands
before a requested page."""

_CAREFUL_FOR = 64
"""Receives for which the guest is taken to be faulting after a fault."""


class Reader(Protocol):
    """What takes the bytes: `StreamReader` or `PreemptReader`, which tell how it is used."""

    read_ahead_pages: int

    @property
    def position(self) -> int:
        """How many bytes of the connection have been consumed."""

    def buffers(self) -> list[memoryview]:
        """Return where the next bytes must be written."""

    def received(self, count: int) -> Iterable[Message]:
        """Take `count` bytes, written there; return the messages that they complete."""

    def connection_lost(self) -> None:
        """Say that no byte follows."""


class StreamConnection:
    """Receives a stream straight into the reader's buffers and delivers its messages in order.

    The deliverer may call `pause`: no further message is delivered, nothing further is received
    and the views of the last message stay valid until `resume`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: Connection,
        reader: Reader,
        *,
        deliver: Callable[[Message], None],
        faults_first: Callable[[], None],
        lost: Callable[[Exception], None],
        fault_window: int,
        others_fault: Callable[[], bool] = lambda: False,
        urgent: bool = False,
    ) -> None:
        """Take over `connection`; nothing is received before `resume`.

        :param deliver: called with each message; may raise `ProtocolError` or `OSError`.
        :param faults_first: called between receives, so that no burst of pages delays a fault.
        :param lost: called once, when the stream stops or is wrong; the connection is of no use
            any more.
        :param fault_window: bytes that may queue in a TCP connection before a requested page.
        :param others_fault: asked once a turn: whether other guests wait for theirs.
        :param urgent: what comes is waited for: acknowledge it at once.
        """
        prepare(connection, fault_window)
        self._loop = loop
        self.connection = connection
        self._descriptor = connection.fileno()
        self._receive_into = connection.recvmsg_into
        # A source sends what does not fill a segment only when all before it is acknowledged
        # (Nagle), unless it says otherwise, and QEMU does not for its preempt channel. Acknowledged
        # late, the second of two pages would come 40 ms after the first.
        self._acknowledge = urgent and connection.family in (socket.AF_INET, socket.AF_INET6)
        self.reader = reader
        self._deliver = deliver
        self._faults_first = faults_first
        self._lost = lost
        self._others_fault = others_fault
        self._in_company = False
        self._waiting: Iterator[Message] = iter(())
        self._careful = 0
        self._read_ahead_carefully = _READ_AHEAD_CAREFULLY
        self._gently = False
        self._reading = False
        self._turn_follows = False
        self._paused = True
        self.ending: Exception | None = None
        """Why the stream ends behind what is here, once that is so."""
        self.closed = False
        self.bytes_received = 0

    @property
    def paused(self) -> bool:
        """True while it is we who hold the stream up, not the source."""
        return self._paused

    def go_gently(self, gently: bool) -> None:
        """Receive little in a turn of the event loop, because others wait for theirs; or not."""
        self._gently = gently
        self._read_ahead()

    def go_carefully(self) -> None:
        """Receive little at once for a while, and look at the faults often: the guest faults."""
        self._careful = _CAREFUL_FOR
        self._read_ahead()

    def requests_come_elsewhere(self) -> None:
        """Say that what is asked for comes on another connection, past this one."""
        self._read_ahead_carefully = _READ_AHEAD_BESIDE

    def _read_ahead(self) -> None:
        if self._gently:
            pages = _READ_AHEAD_CAREFULLY
        elif self._careful:
            pages = self._read_ahead_carefully
        elif self._in_company:
            pages = _READ_AHEAD_IN_COMPANY
        else:
            pages = _READ_AHEAD
        self.reader.read_ahead_pages = pages

    def pause(self) -> None:
        """Deliver and receive nothing until `resume`."""
        self._paused = True
        if self._reading:
            self._loop.remove_reader(self._descriptor)
            self._reading = False

    def resume(self) -> None:
        """Deliver what is waiting, then receive again."""
        if self.closed or not self._paused:
            return
        self._paused = False
        if self._deliver_waiting() and not self._reading:
            self._loop.add_reader(self._descriptor, self._readable)
            self._reading = True
            # What has been decrypted already makes no descriptor readable.
            self._take_further_turn()

    def end_behind_what_is_here(self, error: Exception) -> None:
        """Receive what the source has sent already, then stop with `error`.

        For when it is lost, but what it has said is not: a package that lies in the socket must be
        taken, because its source cannot take the guest back.
        """
        if self.ending is None:
            self.ending = error
            if self._reading:
                self._take_further_turn()

    def receive_waiting(self) -> None:
        """Receive what is there now, ahead of the event loop's turn."""
        if self._reading:
            self._take_turn()

    def _readable(self) -> None:
        if not self._turn_follows:
            self._take_turn()

    def _go_on(self) -> None:
        self._turn_follows = False
        if self._reading:
            self._take_turn()

    def _take_turn(self) -> None:
        """Receive until the socket is empty, in this turn of the event loop or in further ones.

        libuv tells of a connection that was reset once, and then watches it no more. Who reads only
        a part of what is there would never learn that nothing follows.
        """
        try:
            if not self._receive() and self._reading:
                self._take_further_turn()
        except Exception as error:
            # A mistake of ours: it ends this stream, not the daemon, and it is logged.
            self._stop(error)
            raise

    def _take_further_turn(self) -> None:
        if not self._turn_follows:
            self._turn_follows = True
            self._loop.call_soon(self._go_on)

    def _receive(self) -> bool:
        """Receive for one turn; True if there is nothing more."""
        reader = self.reader
        in_company = self._others_fault()
        if in_company is not self._in_company:
            self._in_company = in_company
            self._read_ahead()
        for _ in range(1 if self._gently or in_company else _RECEIVES_A_TURN):
            room = reader.buffers()
            try:
                count = self._receive_into(room)[0]
            except BlockingIOError:
                if self.ending is not None:
                    self._stop(self.ending)
                return True
            except InterruptedError:
                continue
            except OSError as error:
                self._stop(self.ending or error)
                return True
            if count == 0:
                self._end_of_file()
                return True
            self.bytes_received += count
            if self._acknowledge:
                self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            try:
                messages = reader.received(count)
            except ProtocolError as error:
                self._stop(error)
                return True
            if self._careful:
                self._waiting = _in_parts(messages)
                self._careful -= 1
                if not self._careful:
                    self._read_ahead()
            else:
                self._waiting = iter(messages)
            if not self._deliver_waiting():
                return True
            if count >= len(room) * _ENTRY:
                self._faults_first()
                if self._paused or self.closed:
                    return True
        return False

    def _deliver_waiting(self) -> bool:
        """Deliver until all is delivered (True), or somebody paused or closed us (False)."""
        work = 0
        try:
            for message in self._waiting:
                self._deliver(message)
                work += len(message) if type(message) is Pages else _OTHER_MESSAGE
                if work >= _PAGES_A_LOOK:
                    work = 0
                    self._faults_first()
                if self._paused or self.closed:
                    return False
        except (ProtocolError, OSError) as error:
            self._stop(error)
            return False
        return True

    def _end_of_file(self) -> None:
        if self.ending is not None:
            self._stop(self.ending)
            return
        try:
            self.reader.connection_lost()
        except ProtocolError as error:
            self._stop(error)
        else:
            self._stop(ConnectionResetError("the source closed the connection"))

    def _stop(self, error: Exception) -> None:
        self.pause()
        self._lost(error)

    def close(self) -> None:
        """Close the connection. Idempotent."""
        if not self.closed:
            self.release()
            self.connection.close()

    def release(self) -> None:
        """Receive nothing more; the connection stays open, and is the caller's."""
        self.pause()
        self.closed = True
        self._waiting = iter(())


def _in_parts(messages: Iterable[Message]) -> Iterator[Message]:
    """Give the messages, those with many pages in parts: in between the faults are looked after."""
    for message in messages:
        if type(message) is Pages and len(message) > _PAGES_A_LOOK:
            yield from message.parts(_PAGES_A_LOOK)
        else:
            yield message


def prepare(connection: Connection, fault_window: int) -> None:
    """Set a connection up before its first byte: nothing waits, and little is in front of a fault.

    :param fault_window: bytes that may queue in a TCP connection before a requested page.
    """
    connection.setblocking(False)
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What the source has sent already is in front of whatever it is asked for now, so this
        # buffer is the delay. It is set before the first byte: one that shrinks later drops what
        # is on its way, which costs a retransmission timeout of 0.2 s.
        size = _with_room(connection, fault_window)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def _with_room(connection: Connection, window: int) -> int:
    """Return `window`, or the smallest size above it that has room for three segments.

    The kernel doubles what it is told. A source sends no part of a segment, so a buffer with room
    for one and a half stalls until a timer looks after it, 0.2 s later; the loopback's segments
    have 64 KiB.
    """
    segment = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    return max(window, segment * 3 // 2)
