"""A daemon and its source on two hosts, and what becomes of the network between them."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from postcopyd.wire import stream_writer
from postcopyd.wire.address import Address
from postcopyd.wire.messages import BlockEntry
from postcopyd.wire.return_path import ReceivedBitmap, ResumeAck, Shut
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.whole_migration import (
    DEVICE_STATE,
    LENGTHS,
    PAGE,
    Guest,
    Image,
    assert_sent,
    running_guest,
)
from tests.incoming.engine import Source
from tests.silent import make_forgotten
from tests.support import LIMIT, ROOT, wait_until
from tests.two_hosts import TwoHosts, link, set_link, two_hosts

Change = Callable[[TwoHosts], None]
FIRST = 100
"""Pages of each block that come before the break; fewer if it has fewer."""


@pytest.fixture
def hosts(assert_nothing_left: None) -> Iterator[TwoHosts]:
    with two_hosts() as hosts:
        yield hosts


class Scene:
    """A daemon here, its guest, and a source there."""

    def __init__(self, hosts: TwoHosts, daemon: RunningDaemon, guest: Guest, image: Image) -> None:
        self.hosts = hosts
        self.daemon = daemon
        self.guest = guest
        self.memory = image.memory
        self._address = Address.parse(guest.says()["listen"][0])
        self.sources: list[Source] = []

    def connect(self) -> Source:
        """A connection of the source, from the host there."""
        connection = self.hosts.there.connect(self._address.host, self._address.port)
        connection.setblocking(False)
        blocks = [BlockEntry(name, length, PAGE) for name, length in LENGTHS.items()]
        self.sources.append(Source(connection, blocks))
        return self.sources[-1]

    async def begin(self) -> Source:
        """A guest that runs, with some of its memory."""
        source = self.connect()
        await source.advise()
        await source.switch_over(
            {name: [(0, length)] for name, length in LENGTHS.items()}, DEVICE_STATE
        )
        for name, content in self.memory.items():
            await source.postcopy(name, content, range(0, min(len(content), FIRST * PAGE), PAGE))
        await self.reach("running")
        return source

    def show(self) -> dict[str, Any]:
        migration: dict[str, Any] = self.daemon.client.show("vm0")
        return migration

    def show_as_text(self) -> str:
        """What an operator sees."""
        command = [sys.executable, "-m", "postcopyd.cli.postcopyctl"]
        return subprocess.check_output(
            [*command, "--control", self.daemon.control, "show", "vm0"], cwd=ROOT, text=True
        )

    async def until(self, predicate: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the migration when `predicate` holds for it."""
        await asyncio.to_thread(wait_until, lambda: predicate(self.show()))
        return self.show()

    async def reach(self, state: str) -> dict[str, Any]:
        return await self.until(lambda migration: migration["state"] == state)

    async def resume(self) -> None:
        """Come back on a new connection, send what is not here, and see that all is well."""
        source = await asyncio.to_thread(self.connect)
        missing: dict[str, list[int]] = {}
        for name, length in LENGTHS.items():
            await source.send(stream_writer.received_bitmap_request(name))
            answer = await source.wait_for(
                lambda message, name=name: (  # type: ignore[misc]
                    isinstance(message, ReceivedBitmap) and message.block == name
                )
            )
            assert isinstance(answer, ReceivedBitmap)
            here = int.from_bytes(answer.bitmap, "little")
            missing[name] = [page * PAGE for page in range(length // PAGE) if not here >> page & 1]
        await source.send(stream_writer.postcopy_resume())
        await source.wait_for(lambda message: isinstance(message, ResumeAck))
        for name, offsets in missing.items():
            await source.postcopy(name, self.memory[name], offsets)
        await self.finish(source)

    async def finish(self, source: Source) -> None:
        await source.end()
        assert await source.wait_for_shut() == Shut(0)
        source.connection.close()
        assert await asyncio.to_thread(self.guest.says) == {"complete": True, "changed": 0}
        assert await asyncio.to_thread(self.guest.process.wait, LIMIT) == 0
        assert self.guest.memory() == self.memory
        assert (await self.reach("end"))["network"] is None


@asynccontextmanager
async def scene(hosts: TwoHosts, directory: Path, timeouts: str) -> AsyncIterator[Scene]:
    image = Image(directory / "image", seed=8)
    listen = f'listen = "tcp:{hosts.HERE}:0"\nplain_tcp = "always"\n[timeouts]\n{timeouts}\n'
    with (
        running_daemon(directory, listen, wrapper=hosts.here.wrapper) as daemon,
        running_guest(daemon, "vm0", "memory-file") as guest,
    ):
        scene = Scene(hosts, daemon, guest, image)
        try:
            yield scene
        finally:
            for source in scene.sources:
                source.connection.close()
        assert "Traceback" not in daemon.log


def remove_link(hosts: TwoHosts) -> None:
    hosts.here.configure(lambda network: network.link("del", index=link(network, "stream")))


def remove_route(hosts: TwoHosts) -> None:
    hosts.here.configure(lambda network: network.route("del", dst="192.0.2.0/24", scope=255))


def add_route(hosts: TwoHosts) -> None:
    hosts.here.configure(
        lambda network: network.route("add", dst="192.0.2.0/24", oif=link(network, "stream"))
    )


def set_port(state: str) -> Change:
    """Set the other end of our link up or down."""
    return lambda hosts: hosts.switch.configure(set_link("here", state))


def set_our_link(state: str) -> Change:
    return lambda hosts: hosts.here.configure(set_link("stream", state))


DOWN = (set_our_link("down"), set_our_link("up"), "link stream is down")
NO_CARRIER = (set_port("down"), set_port("up"), "link stream has no carrier")


@pytest.mark.parametrize(
    ("lose", "restore", "reason"),
    [
        DOWN,
        NO_CARRIER,
        (
            remove_link,
            lambda hosts: hosts.plug(hosts.here, "here", {hosts.HERE: 24}),
            "link stream has been removed",
        ),
        (
            lambda hosts: hosts.remove_address(hosts.here, hosts.HERE, 24),
            lambda hosts: hosts.add_address(hosts.here, hosts.HERE, 24),
            f"address {TwoHosts.HERE} has been removed from this host",
        ),
        (remove_route, add_route, f"there is no route to {TwoHosts.THERE}"),
    ],
    ids=["link down", "no carrier", "link removed", "address removed", "route removed"],
)
async def test_a_stream_without_network_is_paused_and_taken_up_again(
    hosts: TwoHosts, tmp_path: Path, lose: Change, restore: Change, reason: str
) -> None:
    async with scene(hosts, tmp_path, "break_after = 3600\npath_grace = 0.2") as it:
        await it.begin()
        lose(hosts)
        migration = await it.reach("paused")
        assert f"the network path to the source at {hosts.THERE}:" in migration["failure"]
        assert migration["failure"].endswith(f" is gone: {reason}")
        assert migration["network"] == reason
        restore(hosts)
        await it.until(lambda migration: migration["network"] is None)
        await it.resume()


async def test_a_short_loss_of_the_network_breaks_nothing(hosts: TwoHosts, tmp_path: Path) -> None:
    lose, restore, reason = NO_CARRIER
    async with scene(hosts, tmp_path, "path_grace = 3600") as it:
        source = await it.begin()
        lose(hosts)
        migration = await it.until(lambda migration: migration["network"] is not None)
        assert (migration["state"], migration["network"]) == ("running", reason)
        shown = await asyncio.to_thread(it.show_as_text)
        assert re.search(rf"^network +{reason} *$", shown, re.MULTILINE)
        restore(hosts)
        await it.until(lambda migration: migration["network"] is None)
        for name, content in it.memory.items():
            rest = range(min(len(content), FIRST * PAGE), len(content), PAGE)
            await source.postcopy(name, content, rest)
        await it.finish(source)


async def test_before_the_package_it_fails_and_the_source_learns_it_with_the_network_back(
    hosts: TwoHosts, tmp_path: Path
) -> None:
    lose, restore, reason = DOWN
    async with scene(hosts, tmp_path, "path_grace = 0.2") as it:
        source = it.connect()
        await source.advise()
        await it.reach("advise")
        lose(hosts)
        migration = await it.reach("failed")
        assert migration["failure"].endswith(f" is gone: {reason}")
        assert not migration["guest_lost"]
        restore(hosts)
        assert await source.wait_for_shut() == Shut(1)


async def test_a_source_of_which_nothing_is_heard_is_given_up_after_the_time_that_is_set(
    hosts: TwoHosts, tmp_path: Path
) -> None:
    async with scene(hosts, tmp_path, "break_after = 2") as it:
        await it.begin()
        hosts.silence()
        migration = await it.reach("paused")
        assert "its host has been silent for 2 s" in migration["failure"]
        assert migration["network"] is None
        hosts.silence(False)
        await it.resume()


async def test_a_source_that_is_back_before_that_time_is_met_at_once(
    hosts: TwoHosts, tmp_path: Path
) -> None:
    async with scene(hosts, tmp_path, "break_after = 3600") as it:
        source = await it.begin()
        hosts.silence()
        make_forgotten(source.connection)
        hosts.silence(False)
        await it.resume()


def test_a_daemon_that_cannot_watch_the_network_says_so_once_and_does_its_work(
    tmp_path: Path,
) -> None:
    broken = tmp_path / "modules" / "pyroute2"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('it is broken')")
    image = Image(tmp_path / "image", seed=9)
    modules = {"PYTHONPATH": str(broken.parent)}
    with (
        running_daemon(tmp_path, environment=modules) as daemon,
        running_guest(daemon, "vm0", "memory-file") as guest,
    ):
        assert_sent(image.start_sending(guest.says()["listen"][0]))
        assert guest.says() == {"complete": True, "changed": 0}
        lines = [line for line in daemon.log.splitlines() if "cannot be watched" in line]
        assert len(lines) == daemon.number  # each worker for itself
        assert all("it is broken" in line for line in lines)
