"""A TLS connection behaves as a socket does, whatever goes on below."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import closing, suppress

import pytest

from postcopyd.daemon.config import Tls
from postcopyd.daemon.tls_connection import TlsConnection
from postcopyd.daemon.tls_files import TlsFiles
from postcopyd.incoming.goodbye import Goodbye
from tests.certificates import SERVER, Authority, Issued, client_context
from tests.support import LIMIT, wait_readable

RECORD = 16 << 10
"""Bytes that fit one record of TLS."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> TlsFiles:
    issued = authority.issue("server", dns=[SERVER])
    return TlsFiles.load(Tls(str(issued.certificate), str(issued.key), str(authority.file)))


@pytest.fixture(scope="module")
def client(authority: Authority) -> Issued:
    return authority.issue("client")


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = socket.create_connection(listener.getsockname())
        return listener.accept()[0], there


def accept(server: TlsFiles, raw: socket.socket) -> TlsConnection:
    """Do the server's part of a handshake; blocks."""
    raw.settimeout(LIMIT)
    tls = server.context.wrap_socket(raw, server_side=True)
    tls.setblocking(False)
    return TlsConnection(tls)


@pytest.fixture
async def pair(
    authority: Authority, server: TlsFiles, client: Issued
) -> AsyncIterator[tuple[TlsConnection, ssl.SSLSocket]]:
    """Both ends of a connection; that of the source blocks."""
    raw, there = connected()
    context = client_context(authority, client)
    shaking = asyncio.to_thread(context.wrap_socket, there, server_hostname=SERVER)
    task = asyncio.ensure_future(shaking)
    connection = await asyncio.to_thread(accept, server, raw)
    source = await task
    source.settimeout(LIMIT)
    with closing(connection), source:
        yield connection, source


def read(connection: TlsConnection, count: int, *sizes: int) -> bytes:
    """Receive `count` bytes, in buffers of `sizes`, and as often as it takes."""
    received = bytearray()
    while len(received) < count:
        room = [memoryview(bytearray(size)) for size in sizes]
        try:
            (got,) = connection.recvmsg_into(room)
        except BlockingIOError:
            wait_readable(connection.fileno())
            continue
        assert got
        received += b"".join(room)[:got]
    return bytes(received)


def assert_nothing_here(connection: TlsConnection) -> None:
    with pytest.raises(BlockingIOError):
        connection.recvmsg_into([memoryview(bytearray(10))])


@pytest.mark.parametrize("sizes", [(8, 4096) * 128, (1,), (RECORD,), (3, 5 * RECORD)])
async def test_everything_comes_in_order_whatever_the_buffers(
    pair: tuple[TlsConnection, ssl.SSLSocket], sizes: tuple[int, ...]
) -> None:
    connection, source = pair
    data = random.Random(1).randbytes(5 * RECORD + 17 if sizes == (1,) else 100 * RECORD + 17)
    sending = asyncio.ensure_future(asyncio.to_thread(source.sendall, data))
    assert await asyncio.to_thread(read, connection, len(data), *sizes) == data
    await sending
    assert_nothing_here(connection)


async def test_what_is_decrypted_already_is_read_though_no_descriptor_tells(
    pair: tuple[TlsConnection, ssl.SSLSocket],
) -> None:
    connection, source = pair
    source.sendall(b"0123456789")
    assert read(connection, 3, 3) == b"012"
    assert read(connection, 7, 7) == b"3456789"
    assert_nothing_here(connection)


async def test_peeking_leaves_what_is_there(pair: tuple[TlsConnection, ssl.SSLSocket]) -> None:
    connection, source = pair
    source.sendall(b"0123456789")
    wait_readable(connection.fileno())
    assert connection.recv(1, socket.MSG_PEEK) == b"0"
    assert connection.recv(2, socket.MSG_PEEK) == b"01"
    room = [memoryview(bytearray(size)) for size in (1, 2, 20)]
    assert connection.recvmsg_into(room) == (10,)
    assert b"".join(room)[:10] == b"0123456789"
    assert_nothing_here(connection)
    source.sendall(b"abc")
    wait_readable(connection.fileno())
    assert connection.recv(2, socket.MSG_PEEK) == b"ab"
    assert connection.recv(10, 0) == b"abc"


@pytest.mark.parametrize("politely", [True, False], ids=["with close_notify", "without"])
async def test_the_end_is_an_end_behind_the_last_bytes(
    pair: tuple[TlsConnection, ssl.SSLSocket], politely: bool
) -> None:
    connection, source = pair
    source.sendall(b"last words")
    if politely:
        await asyncio.to_thread(_say_goodbye, source)
    source.close()
    assert read(connection, 10, 100) == b"last words"
    for _ in range(3):
        wait_readable(connection.fileno())
        assert connection.recvmsg_into([memoryview(bytearray(100))]) == (0,)
    assert connection.recv(1, socket.MSG_PEEK) == b""


def _say_goodbye(source: ssl.SSLSocket) -> None:
    source.setblocking(False)
    with pytest.raises(ssl.SSLWantReadError):
        source.unwrap()


async def test_a_reset_is_an_end(pair: tuple[TlsConnection, ssl.SSLSocket]) -> None:
    connection, source = pair
    source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    source.close()
    wait_readable(connection.fileno())
    for _ in range(3):
        with suppress(ConnectionResetError):  # as which Python 3.11 does not know it
            assert connection.recvmsg_into([memoryview(bytearray(100))]) == (0,)


async def test_who_has_emptied_it_is_told_of_a_reset_at_the_next_look(
    pair: tuple[TlsConnection, ssl.SSLSocket],
) -> None:
    connection, source = pair
    source.sendall(b"last words")
    assert read(connection, 10, 100) == b"last words"
    source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    source.close()
    wait_readable(connection.fileno())
    with suppress(ConnectionResetError):
        assert connection.recvmsg_into([memoryview(bytearray(100))]) == (0,)


async def test_bytes_that_are_not_tls_break_it(
    pair: tuple[TlsConnection, ssl.SSLSocket],
) -> None:
    connection, source = pair
    with socket.socket(fileno=source.detach()) as raw:
        raw.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        wait_readable(connection.fileno())
        with pytest.raises(ConnectionResetError, match="TLS: decryption failed or bad record mac"):
            connection.recvmsg_into([memoryview(bytearray(100))])


async def test_sending_takes_as_much_as_fits_and_goes_on_where_it_stopped(
    pair: tuple[TlsConnection, ssl.SSLSocket],
) -> None:
    connection, source = pair
    data = random.Random(2).randbytes(32 << 20)
    backlog = bytearray(data)
    sent = connection.send(backlog)
    assert RECORD < sent < len(data)
    with pytest.raises(BlockingIOError):
        while True:
            del backlog[:sent]
            sent = connection.send(backlog)
    receiving = asyncio.ensure_future(asyncio.to_thread(_receive, source, len(data)))
    while backlog:
        try:
            del backlog[: connection.send(backlog)]
        except BlockingIOError:
            await _writable(connection)
    assert await receiving == data


def _receive(source: ssl.SSLSocket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        received += source.recv(1 << 20)
    return bytes(received)


async def _writable(connection: TlsConnection) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(connection.fileno(), ready.set)
    await asyncio.wait_for(ready.wait(), LIMIT)
    loop.remove_writer(connection.fileno())


async def test_closing_says_so_to_the_source(pair: tuple[TlsConnection, ssl.SSLSocket]) -> None:
    connection, source = pair
    connection.close()
    connection.close()
    with socket.socket(fileno=source.detach()) as raw:
        raw.settimeout(LIMIT)
        assert raw.recv(1)[0] == 0x17  # an encrypted record: close_notify
    assert connection.fileno() == -1


async def test_a_source_may_change_its_keys(
    authority: Authority, server: TlsFiles, client: Issued
) -> None:
    raw, there = connected()
    port = there.getpeername()[1]
    there.close()
    raw.close()
    with socket.create_server(("127.0.0.1", port)) as listener:
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3"]
        command += ["-cert", str(client.certificate), "-key", str(client.key)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            listener.settimeout(LIMIT)
            with closing(accept(server, listener.accept()[0])) as connection:
                for line in (b"before\n", b"after\n", b"at last\n"):
                    process.stdin.write(line)
                    process.stdin.flush()
                    assert await asyncio.to_thread(read, connection, len(line), 100) == line
                    process.stdin.write(b"K\n")  # new keys, for both directions
                    process.stdin.flush()
                    wait_readable(connection.fileno())
                    assert_nothing_here(connection)
                connection.send(b"and back\n")
                while process.stdout.readline() != b"and back\n":
                    pass
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


async def test_waiting_for_the_close_drops_what_comes(
    pair: tuple[TlsConnection, ssl.SSLSocket],
) -> None:
    connection, source = pair
    waiting = asyncio.ensure_future(Goodbye(connection).wait_for_close(LIMIT))
    await asyncio.to_thread(source.sendall, bytes(10 * RECORD))
    assert not waiting.done()
    source.close()
    await asyncio.wait_for(waiting, LIMIT / 2)
