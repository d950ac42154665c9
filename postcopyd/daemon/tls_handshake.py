"""TLS handshakes of sources that have connected: bounded in time and number.

A source makes its handshake at once on each of its connections (qemu-wire, 5.6). Who does not is
in nobody's way: when there are too many, the one that has taken longest has to go.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Final

from postcopyd.daemon.tls_identity import TlsIdentity
from postcopyd.wire.stream_format import MAGIC

_LIMIT: Final = 16
"""Handshakes at a time on one listener."""

_TLS_HANDSHAKE: Final = 0x16  # RFC 8446, 5.1
_LOOK: Final = 8  # bytes of what is no TLS that are told

_REASONS: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate: give the source's tls-creds one",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the authority of our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "our certificate has expired",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept our certificate",
    "UNSUPPORTED_PROTOCOL": "it speaks no version of TLS that tls.minimum_version allows",
}


class _NoTls(Exception):
    """There will be no TLS connection; the text says why."""


class Handshakes:
    """The handshakes on one listener."""

    def __init__(
        self,
        identity: TlsIdentity,
        timeout: float,
        *,
        done: Callable[[ssl.SSLSocket, str], None],
        refused: Callable[[str, str], None],
        expect: Callable[[socket.socket], Callable[[bool], None]],
    ) -> None:
        """Begin with none.

        :param timeout: seconds that one may take.
        :param done: takes over a connection whose other end has a valid certificate, and is told
            its address.
        :param refused: told the address and why a connection was closed.
        :param expect: told of each connection; what it returns is called when its handshake is
            over, with True if it was broken off: nobody knows then whose it was.
        """
        self._expect = expect
        self._identity = identity
        self._timeout = timeout
        self._done = done
        self._refused = refused
        self._under_way: dict[asyncio.Task[bool], str] = {}

    def begin(self, connection: socket.socket, address: str) -> None:
        """Take over a non-blocking connection, and see to it."""
        if len(self._under_way) >= _LIMIT:
            oldest = next(iter(self._under_way))
            self._refused(
                self._under_way.pop(oldest),
                f"its TLS handshake has taken longest, and {_LIMIT} others are under way",
            )
            oldest.cancel()
        over = self._expect(connection)
        task = asyncio.get_running_loop().create_task(self._see_to(connection, address))
        self._under_way[task] = address

        def ended(task: asyncio.Task[bool]) -> None:
            self._under_way.pop(task, None)
            if task.cancelled():
                connection.close()  # it may not even have begun
            over(task.cancelled() or task.exception() is not None or task.result())

        task.add_done_callback(ended)

    async def close(self) -> None:
        """Give up those under way."""
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _see_to(self, connection: socket.socket, address: str) -> bool:
        """Return when it is done or has failed: then True if it may have been a source's."""
        lost = False
        try:
            async with asyncio.timeout(self._timeout):
                await _check_first_byte(connection)
                context = await self._identity.context()
                connection = context.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
                await self._shake(connection)
        except TimeoutError:
            reason = f"its TLS handshake was not done within {self._timeout:g} s"
            lost = True
        except _NoTls as error:
            reason = str(error)
        except ssl.SSLError as error:
            reason = _explain(error)
            lost = isinstance(error, ssl.SSLEOFError)
        except (OSError, ValueError) as error:
            reason = f"it went away in the middle of its TLS handshake: {error}"
            lost = True
        except BaseException:
            connection.close()
            raise
        else:
            self._done(connection, address)
            return False
        connection.close()
        self._refused(address, reason)
        return lost

    async def _shake(self, tls: ssl.SSLSocket) -> None:
        while True:
            try:
                await self._identity.aside(tls.do_handshake)
            except ssl.SSLWantReadError:
                await _readable(tls)
            except ssl.SSLWantWriteError:
                await _writable(tls)
            else:
                return


async def _check_first_byte(connection: socket.socket) -> None:
    """Wait for the first byte, and leave it there.

    :raise _NoTls: if it does not begin TLS; what is there is told. OpenSSL would find out, too, but
        not tell a migration stream from anything else.
    """
    while True:
        try:
            first = connection.recv(_LOOK, socket.MSG_PEEK)
        except BlockingIOError:
            await _readable(connection)
            continue
        if not first:
            raise _NoTls("it went away before its TLS handshake")
        if first[0] == _TLS_HANDSHAKE:
            return
        what = "a migration stream without TLS" if first.startswith(MAGIC) else first.hex(" ")
        raise _NoTls(f"it speaks no TLS, which this address takes: it begins with {what}")


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    descriptor = connection.fileno()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


async def _writable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    descriptor = connection.fileno()
    loop.add_writer(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(descriptor)


def _explain(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError):
        return "it went away in the middle of its TLS handshake"
    reason = error.reason or str(error)
    return _REASONS.get(reason, f"its TLS handshake failed: {reason.lower().replace('_', ' ')}")
