"""What the checker in the Linux guest tells: its heartbeats, and every page that it finds bad."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from tests.interop import lost_writes

_BEAT: Final = re.compile(
    r"HB (?P<count>\d+) iterations=(?P<iterations>\d+) bad=(?P<bad>\d+) waits=(?P<waits>\d+)"
    r" wait_us=(?P<wait_us>\d+) max_wait_us=(?P<max_wait_us>\d+) late_us=(?P<late_us>\d+)"
)
_KEPT_LINES: Final = 12


@dataclass(frozen=True)
class Heartbeat:
    """One line of guest/checker.c, which says what is counted, and when it was received here."""

    count: int
    iterations: int
    """Visits of pages, from the beginning."""
    bad: int
    """Pages that were found bad, from the beginning."""
    waits: int
    """Visits that had to wait for their page, from the beginning."""
    wait_us: int
    """Microseconds that they waited together."""
    max_wait_us: int
    """Microseconds of the longest wait since the heartbeat before."""
    late_us: int
    """Microseconds that this heartbeat came too late."""
    received: float
    """Seconds of `time.time`, which is the clock of QMP's events as well."""


class HeartbeatMonitor:
    """Reads QEMU's debug console from the beginning on.

    After a switchover the source falls silent and the destination goes on, perhaps in the middle of
    a line; what is not a whole line is left out.
    """

    def __init__(self) -> None:
        self.beats: list[Heartbeat] = []
        """All that have come from this QEMU, oldest first."""
        self.bad_pages: list[str] = []
        """The lines about bad pages."""
        self.is_ready = False
        """Whether the checker has begun, in this QEMU."""
        self._lines: list[str] = []
        self._news = asyncio.Event()

    async def read(self, console: socket.socket) -> None:
        """Take in what comes on the console, until QEMU is gone or this is cancelled."""
        reader, writer = await asyncio.open_connection(sock=console)
        try:
            with contextlib.suppress(ConnectionError):
                while line := await reader.readline():
                    self._take(line.decode(errors="replace").strip())
                    self._news.set()
        finally:
            writer.close()

    async def ready(self) -> None:
        """Return when the checker has filled its memory."""
        while not self.is_ready:
            await self._more()

    async def next(self, count: int) -> list[Heartbeat]:
        """The next `count` heartbeats from now on."""
        begin = len(self.beats)
        while len(self.beats) < begin + count:
            await self._more()
        return self.beats[begin : begin + count]

    async def next_bad_page(self) -> str:
        """The line about the first bad page from now on."""
        begin = len(self.bad_pages)
        while len(self.bad_pages) == begin:
            await self._more()
        return self.bad_pages[begin]

    def assert_no_bad_page(self) -> None:
        """Fail if the checker has ever found a bad page, on the source or here."""
        lost_writes.check(self.bad_pages)
        assert self.beats, "no heartbeat has come"
        assert self.beats[-1].bad == 0, self.beats[-1]

    def last_lines(self) -> str:
        """The last lines, for the message of a failure."""
        return " | ".join(self._lines) or "nothing"

    async def _more(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _take(self, line: str) -> None:
        self._lines = [*self._lines[1 - _KEPT_LINES :], line]
        if line == "READY":
            self.is_ready = True
        elif line.startswith("BAD"):
            self.bad_pages.append(line)
        elif found := _BEAT.fullmatch(line):
            numbers = {name: int(number) for name, number in found.groupdict().items()}
            self.beats.append(Heartbeat(received=time.time(), **numbers))


@contextlib.asynccontextmanager
async def reading(console: socket.socket) -> AsyncIterator[HeartbeatMonitor]:
    """Read the console, QEMU's end of which is another, for as long as the context lasts."""
    monitor = HeartbeatMonitor()
    task = asyncio.create_task(monitor.read(console))
    try:
        yield monitor
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
