"""The receive buffer: what queues in front of a page that a fault waits for."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from postcopyd.incoming.stream import StreamConnection
from postcopyd.wire.stream_reader import StreamReader


def connection_over(ours: socket.socket, fault_window: int) -> StreamConnection:
    return StreamConnection(
        asyncio.get_running_loop(),
        ours,
        StreamReader(),
        deliver=lambda message: None,
        faults_first=lambda: None,
        lost=lambda error: None,
        fault_window=fault_window,
    )


@pytest.fixture
def tcp() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    yield ours
    ours.close()
    source.close()


def buffer_of(connection: socket.socket) -> int:
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


async def test_a_tcp_stream_queues_no_more_than_its_window_before_a_requested_page(
    tcp: socket.socket,
) -> None:
    before = buffer_of(tcp)
    stream = connection_over(tcp, 200_000)
    assert buffer_of(tcp) == 2 * 200_000  # the kernel doubles it for its own accounts
    assert buffer_of(tcp) != before
    stream.close()


async def test_the_buffer_has_room_for_three_segments_however_small_the_window(
    tcp: socket.socket,
) -> None:
    segment = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    stream = connection_over(tcp, 4096)
    assert buffer_of(tcp) >= 3 * segment - 2
    stream.close()


async def test_a_unix_stream_is_left_as_it_is() -> None:
    ours, source = socket.socketpair()
    before = buffer_of(ours)
    stream = connection_over(ours, 4096)
    assert buffer_of(ours) == before
    stream.close()
    source.close()
