"""The receive window: narrow while faults come, wide again afterwards, never stalling."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from postcopyd.incoming.stream import StreamConnection
from postcopyd.wire.stream_reader import StreamReader
from tests.incoming.guest import LIMIT

_SO_BUF_LOCK = 72


@pytest.fixture
async def connected() -> AsyncIterator[tuple[StreamConnection, socket.socket, socket.socket]]:
    listener = socket.create_server(("127.0.0.1", 0))
    source = socket.create_connection(listener.getsockname())
    ours, _ = listener.accept()
    listener.close()
    stream = StreamConnection(
        asyncio.get_running_loop(),
        ours,
        StreamReader(),
        deliver=lambda message: None,
        faults_first=lambda: None,
        lost=lambda error: None,
        fault_window=80 << 10,
    )
    yield stream, ours, source
    stream.close()
    source.close()


def window(ours: socket.socket) -> int:
    return ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


async def test_the_window_has_room_for_two_segments_while_faults_come(
    connected: tuple[StreamConnection, socket.socket, socket.socket],
) -> None:
    stream, ours, _ = connected
    stream.faults_wait()
    segment = ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    assert window(ours) >= 2 * segment


async def test_the_window_is_wide_again_when_no_fault_has_come_for_a_while(
    connected: tuple[StreamConnection, socket.socket, socket.socket],
) -> None:
    stream, ours, _ = connected
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1 << 20)  # as large as a burst makes it
    wide = window(ours)
    stream.faults_wait()
    assert window(ours) < wide
    assert ours.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK)
    async with asyncio.timeout(LIMIT):
        while window(ours) < wide:
            await asyncio.sleep(0)
    assert not ours.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK)


async def test_a_stream_that_is_closed_meanwhile_is_left_alone(
    connected: tuple[StreamConnection, socket.socket, socket.socket],
) -> None:
    stream, _, _ = connected
    stream.faults_wait()
    stream.close()
    stream.faults_wait()
    assert stream.closed
