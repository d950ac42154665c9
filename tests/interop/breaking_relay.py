"""A relay whose connections can be broken at any moment."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class BreakingRelay:
    """Passes connections on to `port` of this host, in both directions, until they are cut."""

    def __init__(self, port: int) -> None:
        self._destination = port
        self._connections: list[list[asyncio.StreamWriter]] = []
        """The two ends of each, oldest first."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.passed = 0
        """Bytes that went forward, over all connections."""
        self.cuts = 0
        """How often it has cut."""
        self._cut_at: int | None = None
        self._cut_last = False
        self.answers = asyncio.Event()
        """What the destination says waits until this is set, as it is at first."""
        self.answers.set()

    @property
    def uri(self) -> str:
        """Where a QEMU source finds it."""
        return f"tcp:127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[BreakingRelay]:
        """Take connections on `self.port`."""
        server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def will_cut(self) -> bool:
        """True until the cut has been made that it was told to make."""
        return self._cut_at is not None

    def cut_after(self, count: int, *, last: bool = False) -> None:
        """Cut when `count` more bytes have gone forward; `last` for the last connection alone."""
        self._cut_at = self.passed + count
        self._cut_last = last

    def cut(self, *, last: bool = False) -> None:
        """Break all connections at once, or the last one, with what is on its way.

        Both ends see a reset.
        """
        self._cut_at = None
        self.cuts += 1
        for ends in self._connections[-1:] if last else self._connections:
            for writer in ends:
                writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        ends = [writer]
        self._connections.append(ends)
        try:
            with contextlib.suppress(ConnectionError):
                there, onward = await asyncio.open_connection("127.0.0.1", self._destination)
                ends.append(onward)
                await asyncio.gather(
                    self._copy(reader, onward, forward=True),
                    self._copy(there, writer, forward=False),
                )
        finally:
            self._connections.remove(ends)

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, forward: bool
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if not forward:
                    await self.answers.wait()
                writer.write(data)
                await writer.drain()
                if forward:
                    self.passed += len(data)
                    if self._cut_at is not None and self.passed >= self._cut_at:
                        self.cut(last=self._cut_last)
        writer.close()
