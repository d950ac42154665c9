"""A TLS connection as a migration reads and writes it: like a socket, with plain text in it."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final, Literal, cast

_RECORD: Final = 16 << 10
"""Most bytes of plain text in one record (RFC 8446, 5.1)."""


class TlsConnection:
    """A non-blocking TLS connection whose handshake is done: a `Connection` of the engine.

    What comes is decrypted into the buffers of whoever reads. An end without close_notify is an
    end: QEMU closes so (qemu-wire, 5.6), and a migration stream has an end of its own.
    """

    def __init__(self, tls: ssl.SSLSocket) -> None:
        """Take `tls` over."""
        self._tls = tls
        # It returns how many bytes it has written into a buffer.
        self._read = cast(Callable[[int, memoryview], int], tls.read)
        self._write = tls.write
        self._peeked = b""
        self._follows: Literal["more", "end", "error"] = "more"
        """What comes behind the bytes that were returned last. That nothing is there is not kept:
        the next one to ask may be the only one who is told of a reset (`StreamConnection`)."""
        self._error = ""

    @property
    def socket(self) -> socket.socket:
        """The socket below."""
        return self._tls

    @property
    def family(self) -> int:
        """Of the socket."""
        return self._tls.family

    def fileno(self) -> int:
        """Return the descriptor of the socket."""
        return self._tls.fileno()

    def getpeername(self) -> Any:
        """Return where the socket is connected to."""
        return self._tls.getpeername()

    def setblocking(self, flag: bool, /) -> None:
        """Have reading and writing wait, or not."""
        self._tls.setblocking(flag)

    def getsockopt(self, level: int, option: int, /) -> int:
        """Return an option of the socket."""
        return self._tls.getsockopt(level, option)

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Set an option of the socket."""
        self._tls.setsockopt(level, option, value)

    # -- receiving -------------------------------------------------------------------------------

    def recv(self, count: int, flags: int, /) -> bytes:
        """Receive up to `count` bytes; MSG_PEEK leaves them to be received again."""
        room = bytearray(count)
        (got,) = self.recvmsg_into((memoryview(room),))
        received = bytes(room[:got])
        if flags & socket.MSG_PEEK:
            self._peeked = received + self._peeked
        return received

    def recvmsg_into(self, buffers: Iterable[memoryview], /) -> tuple[int]:
        """Decrypt into `buffers` all that is here, as far as they reach.

        :return: how many bytes, 0 at the end.
        :raise BlockingIOError: if nothing is here.
        :raise ConnectionResetError: if it is no TLS any more. A reset may look like the end.
        """
        count = 0
        if self._peeked:
            buffers, count = self._give_peeked(buffers)
        if self._follows == "more":
            count += self._decrypt(buffers)
        if not count and self._follows != "end":
            if self._follows == "error":
                raise ConnectionResetError(errno.ECONNRESET, self._error)
            raise BlockingIOError(errno.EAGAIN, "nothing is here yet")
        return (count,)

    def _decrypt(self, buffers: Iterable[memoryview]) -> int:
        read = self._read
        count = 0
        try:
            for buffer in buffers:
                left = len(buffer)
                while left:
                    got = read(left, buffer)
                    if not got:
                        self._follows = "end"
                        return count
                    count += got
                    left -= got
                    if left:  # a record ends within the buffer
                        buffer = buffer[got:]
        except ssl.SSLWantReadError:
            pass
        except OSError as error:
            self._follows = "error"
            self._error = _reason(error)
        return count

    def _give_peeked(self, buffers: Iterable[memoryview]) -> tuple[list[memoryview], int]:
        """Return the buffers that are left after the bytes that were peeked at, and their count."""
        left: list[memoryview] = []
        count = 0
        for buffer in buffers:
            piece = self._peeked[: len(buffer)]
            buffer[: len(piece)] = piece
            self._peeked = self._peeked[len(piece) :]
            count += len(piece)
            if len(piece) < len(buffer):
                left.append(buffer[len(piece) :])
        return left, count

    # -- sending ---------------------------------------------------------------------------------

    def send(self, data: bytes | bytearray, /) -> int:
        """Encrypt and send as much of `data` as the socket takes; return how much that is.

        :raise BlockingIOError: if it takes nothing. What is sent next begins with the same bytes.
        :raise ConnectionResetError: if the connection is broken.
        """
        sent = 0
        with memoryview(data) as view:
            try:
                # OpenSSL counts what it is given in one call only when all of it is sent.
                while sent < len(view):
                    sent += self._write(view[sent : sent + _RECORD])
            except ssl.SSLWantWriteError:
                if not sent:
                    raise BlockingIOError(errno.EAGAIN, "the socket is full") from None
            except OSError as error:
                if not sent:
                    raise ConnectionResetError(errno.ECONNRESET, _reason(error)) from None
        return sent

    def close(self) -> None:
        """Close the connection, saying so if that can be said at once. Idempotent."""
        with suppress(OSError, ValueError):
            self._tls.unwrap()
        self._tls.close()


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLWantWriteError):
        # Its answer to a request for new keys does not fit the socket: nobody reads there.
        return "the source asks for new keys, and does not read its return path"
    if isinstance(error, ssl.SSLError):
        return "TLS: " + (error.reason or str(error)).lower().replace("_", " ")
    return error.strerror or str(error)
