"""A connection that has read what nobody has asked it for yet, as one that decrypts does."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from typing import Any


class ReadAhead(socket.socket):
    """Of what it holds its descriptor tells nothing: who waits for that waits for ever."""

    def __init__(self, made: socket.socket) -> None:
        super().__init__(made.family, made.type, made.proto, made.detach())
        self._ahead = bytearray()

    def recv(self, count: int, flags: int = 0) -> bytes:
        self._read_ahead()
        received = bytes(self._ahead[:count])
        if not flags & socket.MSG_PEEK:
            del self._ahead[:count]
        return received or super().recv(count, flags)

    def recvmsg_into(self, buffers: Iterable[memoryview], *rest: Any) -> Any:  # type: ignore[override]
        self._read_ahead()
        if not self._ahead:
            return super().recvmsg_into(buffers, *rest)
        count = 0
        for buffer in buffers:
            piece = self._ahead[: len(buffer)]
            buffer[: len(piece)] = piece
            del self._ahead[: len(piece)]
            count += len(piece)
        return (count,)

    def _read_ahead(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while data := super().recv(1 << 16, socket.MSG_DONTWAIT):
                self._ahead += data
