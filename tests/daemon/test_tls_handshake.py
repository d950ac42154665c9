"""After which handshakes something of a source may be lost."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from postcopyd.daemon.config import Tls
from postcopyd.daemon.tls_handshake import Handshakes
from postcopyd.daemon.tls_identity import TlsIdentity
from tests.certificates import SERVER, Authority, Issued, client_context
from tests.support import LIMIT

Act = Callable[[socket.socket, Authority, Issued], None]


def do_it(source: socket.socket, authority: Authority, good: Issued) -> None:
    shake(source, client_context(authority, good))


def show_no_certificate(source: socket.socket, authority: Authority, good: Issued) -> None:
    with contextlib.suppress(OSError):
        shake(source, client_context(authority, None))


def shake(source: socket.socket, context: ssl.SSLContext) -> None:
    with context.wrap_socket(source, server_hostname=SERVER) as tls:
        tls.recv(1)


def speak_no_tls(source: socket.socket, authority: Authority, good: Issued) -> None:
    source.sendall(b"QEVM")


def go_away(source: socket.socket, authority: Authority, good: Issued) -> None:
    source.sendall(b"\x16\x03\x01")
    source.close()


def stall(source: socket.socket, authority: Authority, good: Issued) -> None:
    source.sendall(b"\x16\x03\x01")


@pytest.mark.parametrize(
    ("act", "lost"),
    [
        (do_it, False),
        (show_no_certificate, False),
        (speak_no_tls, False),
        (go_away, True),
        (stall, True),
    ],
)
async def test_only_one_that_is_broken_off_may_have_been_the_source_s(
    tmp_path: Path, act: Act, lost: bool
) -> None:
    authority = Authority(tmp_path)
    server, good = authority.issue("server", dns=[SERVER]), authority.issue("good")
    identity = TlsIdentity(Tls(str(server.certificate), str(server.key), str(authority.file)))
    over: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    handshakes = Handshakes(
        identity,
        0.5 if act is stall else LIMIT,
        done=lambda tls, _: tls.close(),
        refused=lambda *_: None,
        expect=lambda _: over.set_result,
    )
    ours, source = socket.socketpair()
    ours.setblocking(False)
    source.settimeout(LIMIT)
    try:
        handshakes.begin(ours, "a source")
        await asyncio.to_thread(act, source, authority, good)
        async with asyncio.timeout(LIMIT):
            assert await over is lost
    finally:
        source.close()
        await handshakes.close()
        identity.close()
