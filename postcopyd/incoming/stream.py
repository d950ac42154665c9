"""One stream connection: a non-blocking socket, a sans-IO reader, and the messages in between."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator

from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import Message
from postcopyd.wire.stream_reader import StreamReader

_RECEIVES_A_TURN = 4
"""Receives in one turn of the event loop; in between the faults are looked after."""


class StreamConnection:
    """Receives a stream straight into the reader's buffers and delivers its messages in order.

    The deliverer may call `pause`: no further message is delivered, nothing further is received
    and the views of the last message stay valid until `resume`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        reader: StreamReader,
        *,
        deliver: Callable[[Message], None],
        faults_first: Callable[[], None],
        lost: Callable[[Exception], None],
    ) -> None:
        """Take over `connection`; nothing is received before `resume`.

        :param deliver: called with each message; may raise `ProtocolError` or `OSError`.
        :param faults_first: called between receives, so that no burst of pages delays a fault.
        :param lost: called once, when the stream stops or is wrong; the connection is of no use
            any more.
        """
        connection.setblocking(False)
        self._loop = loop
        self._socket = connection
        self._descriptor = connection.fileno()
        self._receive_into = connection.recvmsg_into
        self.reader = reader
        self._deliver = deliver
        self._faults_first = faults_first
        self._lost = lost
        self._waiting: Iterator[Message] = iter(())
        self._reading = False
        self._paused = True
        self.closed = False
        self.bytes_received = 0

    @property
    def paused(self) -> bool:
        """True while it is we who hold the stream up, not the source."""
        return self._paused

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

    def _readable(self) -> None:
        try:
            self._receive()
        except Exception as error:
            # A mistake of ours: it ends this stream, not the daemon, and it is logged.
            self._stop(error)
            raise

    def _receive(self) -> None:
        reader = self.reader
        for _ in range(_RECEIVES_A_TURN):
            try:
                count = self._receive_into(reader.buffers())[0]
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._stop(error)
                return
            if count == 0:
                self._end_of_file()
                return
            self.bytes_received += count
            try:
                self._waiting = iter(reader.received(count))
            except ProtocolError as error:
                self._stop(error)
                return
            if not self._deliver_waiting():
                return
            self._faults_first()
            if self._paused or self.closed:
                return

    def _deliver_waiting(self) -> bool:
        """Deliver until all is delivered (True), or somebody paused or closed us (False)."""
        try:
            for message in self._waiting:
                self._deliver(message)
                if self._paused or self.closed:
                    return False
        except (ProtocolError, OSError) as error:
            self._stop(error)
            return False
        return True

    def _end_of_file(self) -> None:
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
        if self.closed:
            return
        self.pause()
        self.closed = True
        self._waiting = iter(())
        self._socket.close()
