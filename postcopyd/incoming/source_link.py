"""The connections of one source: the main stream, its return path, and the preempt channel.

Nothing in a stream names its connection, so the first bytes tell (qemu-wire, 5.4): the main stream
speaks first and at once; whatever comes while there is one and begins with a RAM record is its
preempt channel.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

from postcopyd.incoming.return_path import ReturnPath
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.stream import StreamConnection, prepare
from postcopyd.kernel.memory import HOST_PAGE_SIZE
from postcopyd.wire.messages import BlockEntry, Message
from postcopyd.wire.preempt_reader import FIRST_BYTE, PreemptReader
from postcopyd.wire.return_path import ReturnPathWriter
from postcopyd.wire.stream_reader import StreamLimits, StreamReader

_SILENT_LIMIT: Final = 4
"""Connections beside the main one that have not said what they are."""


class SourceLink:
    """What connects us with one source. For one main stream; made when that has connected."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: Settings,
        connection: socket.socket,
        peer: str,
        *,
        deliver: Callable[[Message], None],
        deliver_urgent: Callable[[Message], None],
        faults_first: Callable[[], None],
        lost: Callable[[Exception], None],
        preempt_attached: Callable[[str], None],
        refused: Callable[[str], None],
    ) -> None:
        """Take over the main connection; nothing is received before `resume`.

        :param deliver: called with each message of the main stream; may raise `ProtocolError` or
            `OSError`.
        :param deliver_urgent: the same for the preempt channel.
        :param faults_first: called between receives.
        :param lost: called once, when one of the connections stops or is wrong: both are of no use
            then, because the source closes both (qemu-wire, 5.4).
        :param preempt_attached: told when there is a preempt channel, and where it comes from.
        :param refused: told why a further connection was closed.
        """
        self._loop = loop
        self._settings = settings
        self.connection = connection
        self.peer = peer
        self._deliver_urgent = deliver_urgent
        self._faults_first = faults_first
        self._lost = lost
        self._preempt_attached = preempt_attached
        self._refused = refused
        self._stream = StreamReader(StreamLimits(package=settings.package_limit))
        self.main = StreamConnection(
            loop,
            connection,
            self._stream,
            deliver=deliver,
            faults_first=self.urgent_first,
            lost=self._stop,
            fault_window=settings.fault_window,
        )
        self._return_path = ReturnPath(loop, connection, self._stop)
        self.preempt: StreamConnection | None = None
        self._silent: dict[int, tuple[socket.socket, str]] = {}
        self._blocks: tuple[BlockEntry, ...] = ()
        self._urgent = False
        self._closed = False

    @property
    def bytes_received(self) -> int:
        """Of both channels."""
        urgent = self.preempt.bytes_received if self.preempt else 0
        return self.main.bytes_received + urgent

    @property
    def package_begun(self) -> bool:
        """True once the source has begun to send its device package."""
        return self._stream.package_begun

    @property
    def writer(self) -> ReturnPathWriter:
        """Makes return path messages; each must be sent, in the order in which it was made."""
        return self._return_path.writer

    def send(self, message: bytes) -> None:
        """Send on the return path."""
        self._return_path.send(message)

    # -- further connections ---------------------------------------------------------------------

    def add(self, connection: socket.socket, peer: str) -> None:
        """Take over a connection beside the main one, which may be its preempt channel."""
        if (
            self.preempt is not None
            or len(self._silent) >= _SILENT_LIMIT
            or not _same_origin(connection, self.connection)
        ):
            self._refuse(connection)
            return
        prepare(connection, self._settings.fault_window)
        descriptor = connection.fileno()
        self._silent[descriptor] = (connection, peer)
        self._loop.add_reader(descriptor, self._look, descriptor)

    def blocks_known(self, blocks: tuple[BlockEntry, ...]) -> None:
        """Say what a preempt channel may bring. One that speaks before waits for this."""
        self._blocks = blocks
        for descriptor in self._silent:
            self._loop.add_reader(descriptor, self._look, descriptor)

    def _look(self, descriptor: int) -> None:
        """See by its first byte what a connection is."""
        connection, peer = self._silent[descriptor]
        try:
            first = connection.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            first = b""
        self._loop.remove_reader(descriptor)
        if first and first[0] == FIRST_BYTE and not self._blocks:
            return
        del self._silent[descriptor]
        if not first:
            connection.close()  # it has gone without a word
        elif first[0] != FIRST_BYTE or self.preempt is not None:
            self._refuse(connection)
        else:
            self._begin_preempt(connection, peer)

    def _refuse(self, connection: socket.socket) -> None:
        connection.close()
        self._refused(f"already has a source: {self.peer}")

    def _begin_preempt(self, connection: socket.socket, peer: str) -> None:
        self.preempt = StreamConnection(
            self._loop,
            connection,
            PreemptReader(self._blocks, HOST_PAGE_SIZE),
            deliver=self._deliver_urgent,
            faults_first=self._faults_first,
            lost=self._preempt_lost,
            fault_window=self._settings.fault_window,
            urgent=True,
        )
        self.main.requests_come_elsewhere()
        self._preempt_attached(peer)
        if not self.main.paused:
            self.preempt.resume()

    def _preempt_lost(self, error: Exception) -> None:
        preempt = self.preempt
        assert preempt is not None
        if preempt.reader.ended and isinstance(error, ConnectionResetError):
            preempt.pause()  # a 7.2 has said that nothing follows
            return
        self._stop(error)

    # -- receiving -------------------------------------------------------------------------------

    def urgent_first(self) -> None:
        """Between two receives of the main stream: what the guest waits for comes first."""
        if self.preempt is not None and not self._urgent:
            self._urgent = True
            try:
                self.preempt.receive_waiting()
            finally:
                self._urgent = False
        self._faults_first()

    def pause(self) -> None:
        """Deliver and receive nothing until `resume`."""
        self.main.pause()
        if self.preempt is not None:
            self.preempt.pause()

    def resume(self) -> None:
        """Deliver what is waiting, urgent pages first, then receive again."""
        self.resume_preempt()
        if not self._closed:
            self.main.resume()

    def resume_preempt(self) -> None:
        """As `resume`, for the preempt channel alone: the main stream has ended."""
        if self.preempt is not None:
            self.preempt.resume()

    # -- the end ---------------------------------------------------------------------------------

    def _stop(self, error: Exception) -> None:
        if not self._closed:
            self._lost(error)

    def close(self) -> None:
        """Close all connections. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for descriptor, (connection, _) in self._silent.items():
            self._loop.remove_reader(descriptor)
            connection.close()
        self._silent.clear()
        if self.preempt is not None:
            self.preempt.close()
        self._return_path.close()
        self.main.close()


def _same_origin(one: socket.socket, other: socket.socket) -> bool:
    """Tell whether two connections come from the same host; those of this host do."""
    if one.family == socket.AF_UNIX:
        return True
    try:
        return bool(one.getpeername()[0] == other.getpeername()[0])
    except OSError:  # it has gone; the next look at it tells
        return True
