"""Hostile destinations: what they may answer to `postcopyctl send`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from postcopyd.outgoing.connection import ConnectionLost
from postcopyd.outgoing.image import BlockFile, MemoryImage
from postcopyd.outgoing.source import MigrationFailed, OutgoingMigration, Settings
from postcopyd.wire.return_path import ReturnPathWriter
from tests.fuzz.hostile_streams import HostileStreams
from tests.support import LIMIT, belongings
from tests.torture.sampling import Sampling, Tally
from tests.torture.test_hostile_engine import no_mistake_of_ours

PAGE = 4096
_BLOCKS = {"pc.ram": 16, "rom": 3}
_PACKAGE_COMES = 400
"""Bytes of a stream behind which its package is, or nearly."""


class HostileDestination:
    """Takes what comes, and says what is nearly right."""

    def __init__(self, streams: HostileStreams, numbers: Random) -> None:
        self._streams = streams
        self._numbers = numbers
        self.acting: list[asyncio.Future[None]] = []

    def connect(self) -> socket.socket:
        """Return the source's end of a new connection to it."""
        near, far = socket.socketpair()
        far.setblocking(False)
        said = self._streams.return_path(self._numbers)
        # A source that comes back says little before it has an answer.
        patient = not self.acting and self._numbers.random() < 0.7
        self.acting.append(asyncio.ensure_future(self._act(far, said, patient)))
        return near

    async def _act(self, connection: socket.socket, said: list[bytes], patient: bool) -> None:
        loop = asyncio.get_running_loop()
        received = 0
        with contextlib.suppress(ConnectionError), connection:
            if patient:  # nothing of the guest comes to one that has not answered
                await loop.sock_sendall(connection, ReturnPathWriter().pong(1))
            for message in said:
                while patient and received < _PACKAGE_COMES:
                    if not (data := await loop.sock_recv(connection, 1 << 20)):
                        return
                    received += len(data)
                await loop.sock_sendall(connection, message)
                await asyncio.sleep(0)
            if self._numbers.random() < 0.5:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.005):
                        while await loop.sock_recv(connection, 1 << 20):
                            pass


async def send_to(
    image: MemoryImage, destination: HostileDestination, connections: int, jitter: Random
) -> str:
    """Migrate once; return how it has ended."""
    made = 1

    async def reconnect() -> socket.socket:
        nonlocal made
        made += 1
        if made > connections:
            raise ConnectionLost("there is no destination any more")
        return destination.connect()

    migration = OutgoingMigration(
        image, settings=Settings(break_after=1.0, retry_for=0.02), jitter=jitter
    )
    try:
        async with asyncio.timeout(LIMIT):
            await migration.run(destination.connect(), reconnect if connections > 1 else None)
    except MigrationFailed as failed:
        assert failed.reason == migration.report().failure
        assert "the guest" in failed.reason
        return "failed behind the package" if failed.after_package else "failed before the package"
    finally:
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(*destination.acting)
    return "completed"


@pytest.mark.timeout(900)
async def test_a_hostile_destination_ends_the_migration_with_one_reason(
    sampling: Sampling, tally: Callable[[str], Tally], tmp_path: Path
) -> None:
    outcomes = tally("hostile destinations").outcomes
    numbers = sampling.numbers("hostile destinations")
    files = []
    for name, pages in _BLOCKS.items():
        (tmp_path / name).write_bytes(numbers.randbytes(pages * PAGE))
        files.append(BlockFile(name, tmp_path / name, page_size=PAGE))
    with MemoryImage(files) as image, no_mistake_of_ours():
        streams = HostileStreams([block.entry for block in image.blocks])
        before = belongings()
        for _ in range(sampling.count(80, 5000)):
            connections = numbers.choice((1, 1, 1, 1, 1, 1, 1, 3))
            destination = HostileDestination(streams, numbers)
            outcomes[await send_to(image, destination, connections, numbers)] += 1
        assert not belongings() - before
    assert "failed before the package" in outcomes and "failed behind the package" in outcomes
