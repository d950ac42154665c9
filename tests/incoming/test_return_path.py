"""What waits for a source that does not read its return path."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from postcopyd.incoming.return_path import ReturnPath
from postcopyd.incoming.sourcing import _pieces
from postcopyd.ram.block import RamBlock
from tests.support import LIMIT

MUCH = 4 << 20
"""Bytes that are kept, beside what the socket takes."""


class End:
    """A return path, and the source's end of it."""

    def __init__(self) -> None:
        self.ours, self.source = socket.socketpair()
        for each in (self.ours, self.source):
            each.setblocking(False)
        self.lost: list[Exception] = []
        self.path = ReturnPath(asyncio.get_running_loop(), self.ours, self.lost.append)

    async def read(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(LIMIT):
            while count:
                count -= len(await loop.sock_recv(self.source, min(count, 1 << 20)))

    def close(self) -> None:
        self.path.close()
        self.ours.close()
        self.source.close()


@pytest.fixture
async def end() -> AsyncIterator[End]:
    end = End()
    yield end
    end.close()


async def test_who_does_not_read_is_lost_when_too_much_waits(end: End) -> None:
    end.path.send(bytes(MUCH))
    assert not end.lost
    for _ in range(2):
        end.path.send(bytes(MUCH))
    (error,) = end.lost
    assert "does not read its return path" in str(error)


async def test_what_the_source_has_asked_for_does_not_count(end: End) -> None:
    bitmap = bytes(8 << 20)  # of 256 GiB
    for _ in range(2):
        end.path.send(bitmap, asked_for=True)
    end.path.send(b"a request")
    await end.read(2 * len(bitmap) + len(b"a request"))
    assert not end.lost
    for _ in range(3):
        end.path.send(bytes(MUCH))
    assert end.lost, "once it is read it makes no room for anything else"


@pytest.mark.parametrize("page_size", [4096, 2 << 20, 1 << 30])
def test_what_is_asked_for_again_is_asked_for_in_pieces_whose_length_fits(page_size: int) -> None:
    pages = (9 << 30) // page_size
    block = RamBlock("pc.ram", pages * page_size, page_size, 1 << 30, 0)
    pieces = [pages for _, pages in _pieces(block, range(pages))]
    assert all(len(piece) * page_size < 1 << 32 for piece in pieces)
    assert [page for piece in pieces for page in piece] == list(range(pages))
