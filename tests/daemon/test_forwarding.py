"""A request that another worker answers."""

from __future__ import annotations

import asyncio
import socket

import pytest

from postcopyd.daemon.forwarding import Answer, NotTaken, ask, decode_answer, encode_request, take
from tests.support import LIMIT

ANSWER = b"HTTP/1.1 201 Created\r\nContent-Type: x\r\nContent-Length: 2\r\nDate: y\r\n\r\n{}"


def test_a_request_has_all_that_the_other_needs() -> None:
    assert encode_request("POST", "/v1/migrations?a=%20b", b"{}") == (
        b"POST /v1/migrations?a=%20b HTTP/1.1\r\nHost: postcopyd\r\nConnection: close\r\n"
        b"Content-Length: 2\r\n\r\n{}"
    )


def test_an_answer_is_its_status_and_its_body() -> None:
    assert decode_answer(ANSWER) == Answer(201, b"{}")


@pytest.mark.parametrize("length", range(len(ANSWER)))
def test_an_answer_that_was_cut_off_is_none(length: int) -> None:
    assert decode_answer(ANSWER[:length]) is None


@pytest.mark.parametrize("said", [b"", ANSWER[:-1]])
async def test_who_goes_away_before_its_answer_is_told_of(said: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        take(theirs)
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(LIMIT):
            with pytest.raises(ConnectionResetError):
                await ask(ours, "GET", "/", b"")


async def test_who_is_not_there_is_not_told_what_to_do() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(LIMIT):
            with pytest.raises(NotTaken):
                await ask(ours, "DELETE", "/", b"")
            theirs.setblocking(False)
            assert await asyncio.get_running_loop().sock_recv(theirs, 100) == b""


async def test_an_answer_comes_back_whole() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        take(theirs)
        theirs.sendall(ANSWER)
        theirs.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(LIMIT):
            assert await ask(ours, "GET", "/", b"") == Answer(201, b"{}")
        assert theirs.recv(100) == encode_request("GET", "/", b"")
