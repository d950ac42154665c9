"""Receives what a VMM sends first: a native handoff or Firecracker's array, with descriptors."""

from __future__ import annotations

import array
import os
import socket
from typing import TypeAlias

from postcopyd.vmm.checks import HandoffRefused
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.firecracker import Region, RegionsReader
from postcopyd.wire.handoff import Handoff, LineReader, handoff_reader

FirstContent: TypeAlias = Handoff | tuple[Region, ...]

_RECEIVE = 64 << 10
# SCM_MAX_FD: more come with no one message, and more than one message is enough for are refused.
_MOST_DESCRIPTORS = 253
_ROOM = socket.CMSG_SPACE(_MOST_DESCRIPTORS * array.array("i").itemsize)


class FirstMessage:
    """The first message of one connection while it comes in. Owns the descriptors it brings."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.descriptors: list[int] = []
        """In the order in which they were sent. Whoever takes one out closes it."""
        self.bytes_received = 0
        self._reader: LineReader[Handoff] | RegionsReader | None = None

    @property
    def of_firecracker(self) -> bool:
        """True once it is known to be Firecracker's: nobody there reads an answer."""
        return isinstance(self._reader, RegionsReader)

    def receive(self) -> FirstContent | None:
        """Receive once; return the message when it is complete, None when more must come.

        :raise HandoffRefused: if it is wrong, too large, or its sender has gone.
        """
        try:
            data, ancillary, flags, _ = self.connection.recvmsg(
                _RECEIVE, _ROOM, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise HandoffRefused(f"the VMM has gone: {error}") from error
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                self.descriptors += numbers
        if flags & socket.MSG_CTRUNC:
            raise HandoffRefused(
                "not all descriptors could be received: postcopyd has too many files open "
                "(LimitNOFILE=)"
            )
        if len(self.descriptors) > _MOST_DESCRIPTORS:
            raise HandoffRefused(f"more than {_MOST_DESCRIPTORS} descriptors came")
        if not data:
            raise HandoffRefused(self._stopped())
        self.bytes_received += len(data)
        try:
            return self._feed(data)
        except ProtocolError as error:
            raise HandoffRefused(str(error)) from error

    def _feed(self, data: bytes) -> FirstContent | None:
        if self._reader is None:
            self._reader = RegionsReader() if data.startswith(b"[") else handoff_reader()
        if isinstance(self._reader, RegionsReader):
            return self._reader.feed(data)
        lines = list(self._reader.feed(data))
        if not lines:
            return None
        if len(lines) > 1 or self._reader.pending:
            raise HandoffRefused("more than one line came before the handoff was answered")
        return lines[0]

    def _stopped(self) -> str:
        if self.bytes_received == 0:
            return "the VMM closed the connection before it sent anything"
        return (
            f"the VMM closed the connection after {self.bytes_received} bytes, in the middle of "
            "its message"
        )

    def close(self) -> None:
        """Close the descriptors that nobody has taken out. Idempotent."""
        while self.descriptors:
            os.close(self.descriptors.pop())
