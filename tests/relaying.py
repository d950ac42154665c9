"""What relays have in common: they take connections, and pass each of them on in a task."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Self

from tests.accepting import accept


class Relay(ABC):
    """Takes connections on a port of this host."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.connections = 0

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Self]:
        """Take connections on `self.port`."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            self.port = listener.getsockname()[1]
            accepting = asyncio.ensure_future(self._accept(listener))
            try:
                yield self
            finally:
                for task in (accepting, *self._tasks):
                    task.cancel()
                await asyncio.gather(accepting, *self._tasks, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            near = await accept(listener)
            self.connections += 1
            task = asyncio.ensure_future(self._relay(near, self.connections))
            self._tasks.add(task)
            # A task that is cancelled before its first step would leave it open.
            task.add_done_callback(lambda _, near=near: near.close())  # type: ignore[misc]
            task.add_done_callback(self._tasks.discard)

    @abstractmethod
    async def _relay(self, near: socket.socket, number: int) -> None:
        """Pass a connection on; `number` is 1 for the first one."""
