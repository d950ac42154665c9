"""A request of the control API that another worker answers: HTTP/1.1 over a pair of sockets.

Both ends are ours, so there is one request a connection, and an answer has its length. The request
is sent when the other worker has said that it is there to answer it: until then nothing was done.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from typing import NamedTuple

_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_LENGTH = re.compile(rb"^Content-Length: (\d+)\r$", re.IGNORECASE | re.MULTILINE)


_TAKEN = b"\0"


class NotTaken(Exception):
    """The other worker has gone before it could do anything."""


class Answer(NamedTuple):
    """What the other worker has said."""

    status: int
    body: bytes


def encode_request(method: str, target: str, body: bytes) -> bytes:
    """Return a request after whose answer the connection is closed.

    :param target: path and query as a client sends them: quoted, in ASCII.
    """
    head = f"{method} {target} HTTP/1.1\r\nHost: postcopyd\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode("ascii") + body


def decode_answer(data: bytes) -> Answer | None:
    """Return what came until the connection was closed; None if it is no whole answer."""
    head, _, body = data.partition(b"\r\n\r\n")
    status, length = _HEAD.match(head), _LENGTH.search(head + b"\r\n")
    if status is None or length is None or len(body) != int(length[1]):
        return None
    return Answer(int(status[1]), body)


def take(connection: socket.socket) -> None:
    """Say that a connection was taken, and its request will be answered."""
    with contextlib.suppress(OSError):  # it has gone again, which who serves it finds out
        connection.send(_TAKEN, socket.MSG_NOSIGNAL)


async def ask(connection: socket.socket, method: str, target: str, body: bytes) -> Answer:
    """Send a request and return its answer. Takes `connection` over.

    :raise NotTaken: if the other end goes away before it has the request.
    :raise ConnectionResetError: if it goes away later, before its answer is here.
    """
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    try:
        try:
            await reader.readexactly(len(_TAKEN))
        except (asyncio.IncompleteReadError, OSError):
            raise NotTaken from None
        writer.write(encode_request(method, target, body))
        try:
            answer = decode_answer(await reader.read())
        except OSError:
            answer = None
        if answer is None:
            raise ConnectionResetError
        return answer
    finally:
        writer.close()
