"""Images and connections for the source's tests."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from postcopyd.outgoing.image import BlockFile
from tests.outgoing.destination import tcp_pair

PAGE = 4096


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
