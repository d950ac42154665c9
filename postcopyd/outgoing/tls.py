"""TLS to a destination: the handshake, and a connection that encrypts what it is given.

QEMU's own sources do the same (qemu-wire, 5.6): each connection makes a handshake of its own, and
both sides show a certificate.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final, cast

from postcopyd.outgoing.connection import ConnectionLost, PeerClosed, reason_of
from postcopyd.outgoing.records import Buffer

_HANDSHAKE_SECONDS: Final = 10
_RECORD: Final = 16 << 10
"""Most bytes of plain text in one record (RFC 8446, 5.1)."""
_GATHER: Final = 4 * _RECORD
"""Bytes that are brought together for OpenSSL, which takes one piece of memory at a time."""

_REFUSALS: Final = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants to see a certificate, and was shown none",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "it wants to see a certificate, or shares no cipher with us",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the authority of our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "our certificate has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "our certificate is revoked",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept our certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not accept our certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "our certificate is not one for clients",
    "TLSV1_ALERT_ACCESS_DENIED": "our certificate may not be a source",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks no version of TLS that we do",
    "UNSUPPORTED_PROTOCOL": "it speaks no version of TLS that we do",
    "WRONG_VERSION_NUMBER": "it speaks no TLS there",
}
"""What cannot become right by itself, by the name that OpenSSL has for it."""


class NotTrusted(ConnectionLost):
    """One of both sides does not believe the other, or they cannot speak with each other."""


class Tls:
    """How to speak TLS with one destination."""

    def __init__(self, context: Callable[[], ssl.SSLContext], name: str) -> None:
        """Believe and show what `context` says, which is asked at each handshake.

        :param name: a DNS name or an address that the destination's certificate must have.
        """
        self._context = context
        self._name = name

    async def secure(self, connection: socket.socket) -> TlsStream:
        """Make the handshake on a connected non-blocking socket, which is taken over.

        :raise NotTrusted: if one side does not accept the other.
        :raise ConnectionLost: if the connection breaks, or that takes too long.
        """
        tls: socket.socket = connection
        try:
            async with asyncio.timeout(_HANDSHAKE_SECONDS):
                tls = shaking = self._context().wrap_socket(
                    connection, server_hostname=self._name, do_handshake_on_connect=False
                )
                await _shake(shaking)
        except BaseException as error:
            tls.close()
            if isinstance(error, TimeoutError):
                raise ConnectionLost(
                    f"the destination has not done its TLS handshake within {_HANDSHAKE_SECONDS} s"
                ) from None
            if isinstance(error, OSError):
                raise _lost(error, "in its TLS handshake", self._name) from None
            raise
        return TlsStream(shaking)


class TlsStream:
    """A non-blocking TLS connection, for `Connection`."""

    def __init__(self, tls: ssl.SSLSocket) -> None:
        """Take over `tls`, whose handshake is done."""
        self._tls = tls
        # It returns how many bytes it has written into a buffer.
        self._read = cast(Callable[[int, memoryview], int], tls.read)
        self._write = tls.write

    @property
    def family(self) -> int:
        """Of the socket below."""
        return self._tls.family

    def fileno(self) -> int:
        """Return the descriptor of the socket below."""
        return self._tls.fileno()

    def setblocking(self, flag: bool, /) -> None:
        """Have reading and writing wait, or not."""
        self._tls.setblocking(flag)

    def getsockopt(self, level: int, option: int, length: int, /) -> bytes:
        """Return an option of the socket below."""
        return self._tls.getsockopt(level, option, length)

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Set an option of the socket below."""
        self._tls.setsockopt(level, option, value)

    def recv_into(self, buffer: memoryview, /) -> int:
        """Decrypt into `buffer`; return how many bytes, 0 at the end.

        :raise BlockingIOError: if nothing is here.
        :raise ConnectionLost: if the connection is broken.
        """
        try:
            return self._read(len(buffer), buffer)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except OSError as error:
            raise _lost(error) from None

    def sendmsg(self, buffers: Iterable[Buffer], /) -> int:
        """Encrypt and send the beginning of `buffers`; return how many bytes that is.

        :raise BlockingIOError: if nothing can be sent now. What is sent next begins with the same
            bytes.
        :raise ConnectionLost: if the connection is broken.
        """
        head = memoryview(_head(buffers))
        sent = 0
        try:
            # OpenSSL counts what it is given in one call only when all of it is sent.
            while sent < len(head):
                sent += self._write(head[sent : sent + _RECORD])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not sent:
                raise BlockingIOError from None
        except OSError as error:
            if not sent:
                raise _lost(error) from None
        return sent

    def close(self) -> None:
        """Close the connection, saying so if that can be said at once. Idempotent."""
        with suppress(OSError, ValueError):
            self._tls.unwrap()
        self._tls.close()


def _head(buffers: Iterable[Buffer]) -> bytes:
    """Return the first bytes of all buffers together, as many as are sent at once."""
    pieces = []
    room = _GATHER
    for buffer in buffers:
        piece = memoryview(buffer).cast("B")[:room]
        pieces.append(piece)
        room -= len(piece)
        if not room:
            break
    return b"".join(pieces)


async def _shake(tls: ssl.SSLSocket) -> None:
    loop = asyncio.get_running_loop()
    descriptor = tls.fileno()
    while True:
        ready = asyncio.Event()
        try:
            tls.do_handshake()
            return
        except ssl.SSLWantReadError:
            add: Callable[..., Any] = loop.add_reader
            remove: Callable[[int], bool] = loop.remove_reader
        except ssl.SSLWantWriteError:
            add, remove = loop.add_writer, loop.remove_writer
        add(descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            remove(descriptor)


def _lost(error: OSError, where: str = "", name: str = "") -> ConnectionLost:
    """Return what it means that OpenSSL, or the socket below it, gave this error."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return NotTrusted(
            f"the destination's certificate is not accepted for {name}: {error.verify_message}"
        )
    broken = f"the connection was lost {where}".rstrip()
    if isinstance(error, ssl.SSLEOFError):
        return PeerClosed(f"{broken}: the destination closed it without a word")
    if isinstance(error, ssl.SSLError):
        reason = error.reason or str(error)
        if reason in _REFUSALS:
            return NotTrusted(f"the destination does not take us as a source: {_REFUSALS[reason]}")
        return ConnectionLost(f"{broken}: TLS: {reason.lower().replace('_', ' ')}")
    return PeerClosed(f"{broken}: {reason_of(error)}")
