"""Receives what a VMM sends first: a native handoff or Firecracker's array, with descriptors."""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
import sys
from collections.abc import Callable
from typing import TypeAlias

from postcopyd.vmm.checks import HandoffRefused
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.firecracker import Region, RegionsReader
from postcopyd.wire.handoff import Handoff, LineReader, handoff_reader

FirstContent: TypeAlias = Handoff | tuple[Region, ...]

_CONNECTION = b"\0"
"""What the connection itself goes along with when it is passed on."""
_RECEIVE = 64 << 10
# SCM_MAX_FD: more come with no one message, and more than one message is enough for are refused.
_MOST_DESCRIPTORS = 253
_ROOM = socket.CMSG_SPACE(_MOST_DESCRIPTORS * array.array("i").itemsize)


class FirstMessage:
    """The first message of one connection while it comes in. Owns the descriptors it brings."""

    def __init__(self, connection: socket.socket, source: socket.socket | None = None) -> None:
        """Receive from `connection`, or from `source` what somebody else has received from it."""
        self.connection = connection
        self.source = source or connection
        self.descriptors: list[int] = []
        """In the order in which they were sent. Whoever takes one out closes it."""
        self.received = bytearray()
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
            data, ancillary, flags, _ = self.source.recvmsg(
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
        self.received += data
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
        if not self.received:
            return "the VMM closed the connection before it sent anything"
        return (
            f"the VMM closed the connection after {len(self.received)} bytes, in the middle of "
            "its message"
        )

    async def pass_on(self, to: socket.socket, announce: Callable[[], None]) -> None:
        """Give the connection and all that came on it to another process.

        It takes the connection with `take_connection`, and then receives from the other end of
        `to` as from the connection.

        :param to: a connected stream socket, non-blocking.
        :param announce: hands the other end of `to` over.
        :raise OSError: if the other process has gone, or there is no descriptor to spare.
        """
        to.sendmsg([_CONNECTION], [_rights([self.connection.fileno()])])
        sent = to.sendmsg([self.received], [_rights(self.descriptors)] if self.descriptors else [])
        announce()
        await asyncio.get_running_loop().sock_sendall(to, self.received[sent:])

    def close(self) -> None:
        """Close the descriptors that nobody has taken out. Idempotent."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def take_connection(source: socket.socket) -> socket.socket:
    """Return the connection of which somebody else passes the first message on.

    :raise OSError: if none comes first.
    """
    _, ancillary, _, _ = source.recvmsg(len(_CONNECTION), _ROOM, socket.MSG_CMSG_CLOEXEC)
    for _, _, content in ancillary:
        connection = socket.socket(fileno=int.from_bytes(content, sys.byteorder))
        connection.setblocking(False)
        return connection
    raise ConnectionResetError(errno.ECONNRESET, "no connection was handed over")


def _rights(descriptors: list[int]) -> tuple[int, int, array.array[int]]:
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors)
