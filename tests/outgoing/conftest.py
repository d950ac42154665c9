"""Images and connections for the source's tests."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from postcopyd.outgoing.image import BlockFile

PAGE = 4096


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Small, and before the handshake: what queues at the receiver is not ours to bound.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


@pytest.fixture(params=["tcp", "unix"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected stream sockets: the source's, which it closes, and the destination's."""
    near, far = tcp_pair() if request.param == "tcp" else socket.socketpair()
    with near, far:
        yield near, far


@pytest.fixture
def make_block(tmp_path: Path) -> Callable[..., BlockFile]:
    """Write content to a file and return the block that it is."""

    def make(name: str, content: bytes, page_size: int = PAGE) -> BlockFile:
        path = tmp_path / name.replace("/", "_")
        path.write_bytes(content)
        return BlockFile(name, path, page_size=page_size)

    return make
