"""The two that receive: the destination QEMU by itself, and postcopyd for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Protocol

from tests.daemon.daemon_process import RunningDaemon
from tests.interop.moving import receiving
from tests.interop.qemu import Qemu
from tests.interop.receiving import Command

_NAME: Final = "bench"


class Reception(Protocol):
    """A migration that is being received."""

    uri: str
    """Where the source is to send to."""

    async def blocked(self) -> float:
        """Wait until it has ended well; return the seconds that the processors were blocked."""


@dataclass
class _Native:
    uri: str
    _destination: Qemu

    async def blocked(self) -> float:
        told = await self._destination.migration()
        return float(sum(told["postcopy-vcpu-blocktime"])) / 1e3


@dataclass
class _ByDaemon:
    uri: str
    _command: Command

    async def blocked(self) -> float:
        threads = (await self._command.report())["threads"]
        seconds = [thread["seconds"] for thread in threads if thread["name"].startswith("vcpu")]
        return float(sum(seconds))


@contextlib.asynccontextmanager
async def receive_with_qemu(destination: Qemu, preempt: bool) -> AsyncIterator[Reception]:
    """Have the destination receive by itself."""
    names = ["postcopy-ram", "postcopy-blocktime", *(["postcopy-preempt"] if preempt else [])]
    await destination.set_capabilities(*names)
    yield _Native(await destination.listen(), destination)


@contextlib.asynccontextmanager
async def receive_with_postcopyd(
    daemon: RunningDaemon, destination: Qemu
) -> AsyncIterator[Reception]:
    """Have the daemon receive for the destination, by `postcopyctl receive-qemu`."""
    async with receiving(daemon, destination, _NAME) as command:
        yield _ByDaemon(await command.address(), command)
        await asyncio.to_thread(daemon.client.cancel, _NAME)  # it has ended: this forgets it
