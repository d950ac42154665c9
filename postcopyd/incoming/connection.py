"""What a stream connection is: as much of a socket as a migration uses.

A `socket.socket` is one. So is whatever decrypts: then bytes may be here of which its descriptor
tells nothing, so whoever reads goes on until `BlockingIOError`, and looks without being called
after it has stopped reading for a while.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any, Protocol, cast


class Connection(Protocol):
    """A connected stream socket, as in `socket.socket`. Every method may raise `OSError`."""

    @property
    def family(self) -> int:
        """AF_INET, AF_INET6 or AF_UNIX."""

    def fileno(self) -> int:
        """Return the descriptor, which tells when to read and to write; -1 when it is closed."""

    def getpeername(self) -> Any:
        """Return the address of the other end."""

    def setblocking(self, flag: bool, /) -> None:
        """Have reading and writing wait, or not."""

    def getsockopt(self, level: int, option: int, /) -> int:
        """Return an option of the socket."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Set an option of the socket."""

    def recv(self, count: int, flags: int, /) -> bytes:
        """Receive up to `count` bytes, none at the end; MSG_PEEK leaves them to be received again.

        :raise BlockingIOError: if nothing is here.
        """

    def recvmsg_into(self, buffers: Iterable[memoryview], /) -> tuple[Any, ...]:
        """Receive into `buffers`, one after the other.

        :return: how many bytes, 0 at the end; what follows in the tuple is of no matter.
        :raise BlockingIOError: if nothing is here.
        """

    def send(self, data: bytes | bytearray, /) -> int:
        """Send the beginning of `data` and return how many bytes that is.

        :raise BlockingIOError: if nothing can be sent now. What is sent next begins with the same
            bytes.
        """

    def close(self) -> None:
        """Close it. Idempotent."""


class Wrapping(Connection, Protocol):
    """A connection that is no socket itself."""

    @property
    def socket(self) -> socket.socket:
        """The socket below: to be asked and set up, not to be read or written."""


def socket_of(connection: Connection) -> socket.socket:
    """Return the socket of a connection, which the kernel is asked about."""
    if isinstance(connection, socket.socket):
        return connection
    return cast(Wrapping, connection).socket
