"""One migration after the other through a broken network: a daemon, a guest and a source for each.

The source is the library's, in this process; `postcopyctl send` is little more than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from postcopyd.outgoing.connecting import NobodyListens
from postcopyd.outgoing.connection import ConnectionLost
from postcopyd.outgoing.image import BlockFile, MemoryImage
from postcopyd.outgoing.report import Phase
from postcopyd.outgoing.source import MigrationFailed, OutgoingMigration, Settings
from postcopyd.wire.address import Address
from tests.daemon.daemon_process import RunningDaemon
from tests.daemon.whole_migration import DEVICE_STATE, LENGTHS, Image
from tests.support import ROOT, wait_until
from tests.torture.faulty_relay import Fault, FaultyRelay
from tests.torture.sampling import Tally
from tests.two_hosts import Host, TwoHosts

LIMIT: Final = 60.0
"""Seconds that a migration may take, with everything that happens to it."""
BREAK_AFTER: Final = 2
"""Seconds of silence that are a break, for the daemon and for the source."""
CONFIGURATION: Final = f"[timeouts]\nbreak_after = {BREAK_AFTER}\nidle = 5\n"
"""Of the daemon: before the package, too, it does not wait long for a source that is dead."""
KEPT_BY_DAEMON: Final = {"/control", "/handoff"}
"""What the service manager keeps when there is no migration."""


LOOPBACK: Final = "127.0.0.1"


def server_on(host: Host | None) -> socket.socket:
    """Listen on the loopback of a host; None for this one."""
    listen = partial(socket.create_server, (LOOPBACK, 0))
    return listen() if host is None else host.run(listen)


async def connect_from(host: Host | None, address: str, port: int) -> socket.socket:
    """Connect from a host; None for this one.

    :raise OSError: if that is not possible.
    """
    connection = socket.socket() if host is None else host.run(socket.socket)
    try:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (address, port))
    except BaseException:
        connection.close()
        raise
    return connection


@dataclass(frozen=True, slots=True)
class Case:
    """One migration, and what happens to its connections, one tuple of faults each."""

    number: int
    kind: str
    """Of the guest's memory."""
    precopy_passes: int
    bandwidth: int | None
    faults: tuple[tuple[Fault, ...], ...]


class CheckedGuest:
    """A guest of `checked_guest.py`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def says(self) -> dict[str, Any]:
        """The next thing that it tells."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line, "the guest has died"
        word: dict[str, Any] = json.loads(line)
        return word

    async def ended(self) -> int:
        """Its exit status."""
        return await self._process.wait()


@contextlib.asynccontextmanager
async def checked_guest(
    daemon: RunningDaemon, name: str, kind: str, image: Path
) -> AsyncIterator[CheckedGuest]:
    """Start a guest that hands its memory over to the daemon."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.torture.checked_guest"),
        *(str(daemon.handoff), name, kind, str(image), name),
        *(f"{block}={length}" for block, length in LENGTHS.items()),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield CheckedGuest(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class Destination:
    """A guest that waits for its source, and another one when that has failed before the package.

    The relay in front of it always leads to the guest that waits.
    """

    def __init__(
        self, daemon: RunningDaemon, relay: FaultyRelay, kind: str, name: str, image: Path
    ) -> None:
        self._daemon, self._relay = daemon, relay
        self._kind, self._name, self._image = kind, name, image
        self.guests = 0
        self.waits = asyncio.Event()
        """Set when the first guest waits."""

    async def receive(self) -> dict[str, Any]:
        """Return the last words of the guest that has got everything."""
        while True:
            self.guests += 1
            name = f"{self._name}.{self.guests}"
            async with checked_guest(self._daemon, name, self._kind, self._image) as guest:
                (listen,) = (await guest.says())["listen"]
                self._relay.lead_to(Address.parse(listen).port)
                self.waits.set()
                word = await guest.says()
                assert await guest.ended() == 0
            if "failed" not in word:
                return word
            assert not word["runs"], "there would be two of it"

    async def check(self) -> None:
        """The daemon has it all, and is done with it."""
        name = f"{self._name}.{self.guests}"
        report = await asyncio.to_thread(self._daemon.client.wait, name, LIMIT)
        assert report["state"] == "end", report
        assert report["received"] == report["length"] == sum(LENGTHS.values())


Connect = Callable[[], Awaitable[socket.socket]]


async def send(case: Case, image: Path, relay: FaultyRelay, connect: Connect) -> str:
    """Be the source, and its operator: begin again when that has failed before the package.

    :return: what came of it.
    """

    async def reconnect() -> socket.socket:
        if relay.refused:
            raise NobodyListens("the relay leads to nobody")
        try:
            return await connect()
        except OSError as error:
            raise ConnectionLost(str(error)) from error

    outcome = "complete"
    while True:
        with MemoryImage([BlockFile(name, image / name) for name in LENGTHS]) as memory:
            migration = OutgoingMigration(
                memory,
                DEVICE_STATE,
                Settings("pc", case.precopy_passes, case.bandwidth, break_after=BREAK_AFTER),
                jitter=random.Random(case.number),
            )
            try:
                report = await migration.run(await connect(), reconnect)
            except MigrationFailed as error:
                if "everything was sent, the destination may have completed" in str(error):
                    return "complete, and only the destination knows"
                assert not error.after_package, error
                outcome = "sent again by its operator"
            else:
                assert report.phase is Phase.COMPLETED
                return outcome


async def check_arrival(
    daemon: RunningDaemon, image: Image, case: Case, tally: Tally, hosts: TwoHosts | None = None
) -> None:
    """Migrate with everything that happens in this case, and see that nothing is wrong or left.

    :param hosts: where the daemon is here, source and relay are there; None if all are on this one.
    """
    print(case)  # shown if it fails
    source_host = hosts.there if hosts is not None else None
    destination_address = hosts.HERE if hosts is not None else LOOPBACK
    before = await asyncio.to_thread(daemon.descriptors_at_rest)
    async with (
        asyncio.timeout(LIMIT),
        FaultyRelay(
            case.faults, lambda port: connect_from(source_host, destination_address, port)
        ).listening(server_on(source_host)) as relay,
        asyncio.TaskGroup() as tasks,
    ):
        destination = Destination(daemon, relay, case.kind, f"case{case.number}", image.directory)
        receiving = tasks.create_task(destination.receive())
        await destination.waits.wait()
        outcome = await send(
            case,
            image.directory,
            relay,
            lambda: connect_from(source_host, LOOPBACK, relay.port),
        )
        word = await receiving
        await destination.check()
    assert word["wrong"] == []
    await asyncio.to_thread(nothing_left, daemon, before)
    if outcome == "complete":
        if not relay.happened:
            outcome += ", and nothing had happened"
        elif destination.guests > 1:
            outcome += " after a new beginning"
    tally.outcomes[outcome] += 1
    tally.pauses.append(word["longest_wait"])


def nothing_left(daemon: RunningDaemon, before: list[str]) -> None:
    """See that the daemon has nothing of a migration any more, and has not stumbled."""
    daemon.wait_for_descriptors(before)
    wait_until(lambda: set(daemon.manager.stored) == KEPT_BY_DAEMON)
    assert "Traceback" not in daemon.log


def numbered(metafunc: pytest.Metafunc, usual: int, full: int) -> None:
    """Have a test that takes `number` run once for each case."""
    if "number" in metafunc.fixturenames:
        count = full if metafunc.config.getoption("--full") else usual
        metafunc.parametrize("number", range(count))
