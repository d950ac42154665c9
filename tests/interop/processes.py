"""The other two processes of an interop test: the daemon, and the VMM whose memory it fills."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import aiohttp

DEADLINE: Final = 20.0
"""Seconds for any one answer."""

MemoryKind = Literal["anonymous", "memory-file"]


@dataclass
class Daemon:
    """A running ``postcopyd serve``."""

    handoff: Path
    control: aiohttp.ClientSession
    log: Path

    async def ended(self, migration: str) -> dict[str, Any]:
        """The report of the migration when it has ended."""
        path = f"/v1/migrations/{migration}/wait?timeout={DEADLINE:.0f}"
        async with asyncio.timeout(DEADLINE + 5), self.control.get(path) as response:
            assert response.status == 200, (await response.text(), self.log.read_text())
            report: dict[str, Any] = await response.json()
            return report


@contextlib.asynccontextmanager
async def running_daemon(directory: Path) -> AsyncIterator[Daemon]:
    """Start the daemon, wait for its READY, and end it at the end with SIGTERM."""
    configuration = directory / "postcopyd.toml"
    configuration.write_text(
        f'handoff = "{directory}/handoff.sock"\n'
        f'control = "{directory}/control.sock"\n'
        'listen = "tcp:127.0.0.1:0"\n'
    )
    log = directory / "postcopyd.log"
    notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notified.bind(str(directory / "notify.sock"))
    notified.setblocking(False)
    with open(log, "wb") as output, notified:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *["-m", "postcopyd.cli.postcopyd", "serve", "--config", str(configuration)],
            env={"NOTIFY_SOCKET": str(directory / "notify.sock")},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        listening = None
        try:
            await _ready(process, notified, log)
            listening = asyncio.create_task(_go_on_listening(notified))
            connector = aiohttp.UnixConnector(str(directory / "control.sock"))
            async with aiohttp.ClientSession("http://postcopyd", connector=connector) as control:
                yield Daemon(directory / "handoff.sock", control, log)
            process.terminate()
            assert await asyncio.wait_for(process.wait(), DEADLINE) == 0, log.read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            if listening is not None:
                listening.cancel()
                await asyncio.wait((listening,))


async def _go_on_listening(notified: socket.socket) -> None:
    """Take what the daemon tells, as a service manager does; what it is to keep is dropped."""
    while True:
        await asyncio.get_running_loop().sock_recv(notified, 4096)


async def _ready(process: asyncio.subprocess.Process, notified: socket.socket, log: Path) -> None:
    """Return when the daemon has said READY=1; fail at once when it ends instead."""
    loop = asyncio.get_running_loop()

    async def ready() -> None:
        while b"READY=1" not in (await loop.sock_recv(notified, 4096)).splitlines():
            pass

    told, ended = loop.create_task(ready()), loop.create_task(process.wait())
    try:
        await asyncio.wait((told, ended), timeout=DEADLINE, return_when=asyncio.FIRST_COMPLETED)
        assert told.done(), f"the daemon is not ready: {log.read_text()}"
    finally:
        told.cancel()
        ended.cancel()


@dataclass
class StandInVmm:
    """A running stand_in_vmm.py."""

    process: asyncio.subprocess.Process
    directory: Path
    block_names: list[str]
    port: int
    """Where the daemon waits for the source."""

    async def next_word(self) -> dict[str, Any]:
        """The next thing that it tells; an empty object when it has gone."""
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), DEADLINE)
        word: dict[str, Any] = json.loads(line or "{}")
        return word

    def blocks(self) -> dict[str, bytes]:
        """What its blocks hold at the end, by name."""
        return {
            name: (self.directory / f"block-{index}").read_bytes()
            for index, name in enumerate(self.block_names)
        }

    def device_state(self) -> bytes:
        """The device state that it was given."""
        return (self.directory / "device-state").read_bytes()


@contextlib.asynccontextmanager
async def running_vmm(
    directory: Path, daemon: Daemon, migration: str, kind: MemoryKind, blocks: dict[str, int]
) -> AsyncIterator[StandInVmm]:
    """Start a VMM with these blocks (lengths by name), handed over; end it at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *["-m", "tests.interop.stand_in_vmm", str(daemon.handoff), migration, kind, str(directory)],
        *(f"{name}={length}" for name, length in blocks.items()),
        cwd=Path(__file__).parents[2],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        vmm = StandInVmm(process, directory, list(blocks), 0)
        (address,) = (await vmm.next_word())["listen"]
        vmm.port = int(address.rpartition(":")[2])
        yield vmm
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def thread_states(pid: int) -> str:
    """What each thread of a process is doing: its name, its state and where it waits."""
    told = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            name = (task / "comm").read_text().strip()
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            told.append(f"{name} {state} {(task / 'wchan').read_text()}")
    return ", ".join(told) or "gone"
