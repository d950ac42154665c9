"""A daemon whose processes are killed, and the guests that must not notice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from postcopyd.cli.control_client import ControlError
from postcopyd.cli.postcopyd import TO_BE_STARTED_AGAIN
from postcopyd.kernel.memory import Mapping
from postcopyd.vmm.client import Block, Destination
from postcopyd.wire import stream_writer
from postcopyd.wire.messages import BlockEntry
from postcopyd.wire.return_path import Shut
from tests.daemon import hosted
from tests.daemon.daemon_process import RunningDaemon, configuration, running_daemon
from tests.daemon.test_network import Scene
from tests.daemon.whole_migration import (
    DEVICE_STATE,
    LENGTHS,
    PAGE,
    Image,
    assert_sent,
    running_guest,
)
from tests.incoming.engine import Source
from tests.support import LIMIT, ROOT, wait_until

OWN = {"/control", "/handoff"}
"""What the service manager keeps when there is no migration."""


class LocalScene(Scene):
    """A daemon, its guest and a source on this host."""

    image: Image

    def connect(self) -> Source:
        connection = socket.create_connection((self._address.host, self._address.port))
        connection.setblocking(False)
        blocks = [BlockEntry(name, length, PAGE) for name, length in LENGTHS.items()]
        self.sources.append(Source(connection, blocks))
        return self.sources[-1]

    @property
    def listen(self) -> str:
        return str(self._address)

    async def verify(self) -> None:
        """The guest has all its memory, has seen none of it change, and ends."""
        assert await asyncio.to_thread(self.guest.says) == {"complete": True, "changed": 0}
        assert await asyncio.to_thread(self.guest.process.wait, LIMIT) == 0
        assert self.guest.memory() == self.memory

    async def kill_worker(self) -> None:
        """Kill the process that serves the guest, and return when another one does."""
        await asyncio.to_thread(self.daemon.kill_worker)

    async def kill_all(self) -> None:
        """Kill every process of the daemon, and start it anew as the service manager does."""
        await asyncio.to_thread(self.daemon.kill)
        await asyncio.to_thread(self.daemon.start)


@asynccontextmanager
async def scene(directory: Path, kind: str) -> AsyncIterator[LocalScene]:
    image = Image(directory / "image", seed=8)
    with running_daemon(directory) as daemon, running_guest(daemon, "vm0", kind) as guest:
        scene = LocalScene(None, daemon, guest, image)  # type: ignore[arg-type]
        scene.image = image
        try:
            yield scene
        finally:
            for source in scene.sources:
                source.connection.close()
        assert "Traceback" not in daemon.log


@pytest.mark.parametrize("kind", ["memory-file", "anonymous"])
async def test_a_worker_that_is_killed_is_replaced_and_its_guest_goes_on(
    tmp_path: Path, kind: str
) -> None:
    async with scene(tmp_path, kind) as it:
        await it.begin()
        await it.kill_worker()
        await it.reach("paused")
        await it.resume()


@pytest.mark.parametrize("attempt", range(3))
async def test_a_vmm_that_was_told_that_it_is_accepted_is_there_after_a_kill(
    tmp_path: Path, attempt: int
) -> None:
    async with scene(tmp_path, "anonymous") as it:
        assert it.listen  # the guest has said it, because it was told
        await it.kill_all()
        migration = it.show()
        assert (migration["state"], migration["listen"]) == ("none", [it.listen])
        assert str(it.guest.process.pid) in migration["vmm"]


@pytest.mark.parametrize("kind", ["memory-file", "anonymous"])
async def test_a_daemon_that_is_killed_goes_on_with_what_the_service_manager_has_kept(
    tmp_path: Path, kind: str
) -> None:
    async with scene(tmp_path, kind) as it:
        await it.begin()
        for _ in range(2):
            await it.kill_all()
            await it.reach("paused")
        await it.resume()
        await asyncio.to_thread(wait_until, lambda: set(it.daemon.manager.stored) == OWN)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("victim", ["worker", "all"])
async def test_a_migration_completes_whenever_and_whoever_is_killed(
    tmp_path: Path, victim: str, seed: int
) -> None:
    """The instants are at random: what they hit is told by the seed and by how fast we are."""
    moments = random.Random(f"{victim} {seed}")
    async with scene(tmp_path, moments.choice(["memory-file", "anonymous"])) as it:
        source = it.image.start_sending(it.listen, "--max-bandwidth", "16M")
        for _ in range(2):
            await asyncio.sleep(moments.uniform(0.05, 0.4))
            if victim == "worker":
                await it.kill_worker()
            else:
                await it.kill_all()
        await asyncio.to_thread(assert_sent, source)
        await it.verify()


async def test_who_waits_for_a_migration_does_not_notice(tmp_path: Path) -> None:
    async with scene(tmp_path, "memory-file") as it:
        await it.begin()
        waiting = asyncio.create_task(asyncio.to_thread(it.daemon.client.wait, "vm0", LIMIT))
        await it.kill_worker()
        await it.resume()
        assert (await waiting)["state"] == "end"


def test_a_daemon_that_is_stopped_leaves_nothing_with_the_service_manager(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        assert set(daemon.manager.stored) == OWN
        daemon.terminate()
        assert daemon.ended() == 0
        wait_until(lambda: not daemon.manager.stored)
        assert not daemon.control.exists() and not daemon.handoff.exists()
        daemon.start()
        assert daemon.client.list() == []


async def test_a_guest_whose_source_is_gone_for_good_gets_an_error_and_no_zeros(
    tmp_path: Path,
) -> None:
    async with scene(tmp_path, "anonymous") as it:
        await it.begin()
        it.sources[-1].connection.close()
        await it.reach("paused")
        await it.kill_all()
        await it.reach("paused")
        await asyncio.to_thread(it.daemon.client.abandon, "vm0")
        # This VMM has no handler for memory errors.
        assert await asyncio.to_thread(it.guest.process.wait, LIMIT) == -signal.SIGBUS


# -- memory files that come more than once -------------------------------------------------------


def hand_over(daemon: RunningDaemon, *blocks: Block) -> Destination:
    """Let a VMM that is this process come so far that it has its device state."""
    vmm = Destination(daemon.handoff, "vm0", list(blocks), timeout=LIMIT)
    if daemon.client.show("vm0")["state"] == "none":
        source = hosted.Source(vmm.listen[0])

        async def switch_over() -> None:
            await source.begin([BlockEntry(block.name, block.length, PAGE) for block in blocks])
            await source.send_package()

        asyncio.run(switch_over())
        source.close()
    assert vmm.wait_for_device_state(LIMIT) == b""
    return vmm


def assert_survives_a_kill(daemon: RunningDaemon) -> None:
    """The daemon goes on with the guest when all of it is killed."""
    wait_until(lambda: daemon.client.show("vm0")["state"] == "paused")
    daemon.kill()
    daemon.start()
    assert daemon.client.show("vm0")["state"] == "paused"
    daemon.client.cancel("vm0", force=True)


def test_a_vmm_in_the_place_of_another_may_bring_the_same_memory_file(tmp_path: Path) -> None:
    length = 16 * PAGE
    with (  # memory goes last: as long as the daemon watches it, that would wait for it
        closing(Block.memory_file("pc.ram", length)) as block,
        Mapping.of_file(block.descriptor or 0, length) as anew,
        running_daemon(tmp_path) as daemon,
    ):
        hand_over(daemon, block).close()  # it could not load its devices
        wait_until(lambda: daemon.client.show("vm0")["vmm"] is None)
        second = Block.at("pc.ram", anew.address, length, descriptor=block.descriptor)
        with closing(hand_over(daemon, second)) as vmm:
            vmm.loaded()
            assert_survives_a_kill(daemon)


def test_two_blocks_may_be_of_one_memory_file_that_comes_twice(tmp_path: Path) -> None:
    length = 16 * PAGE
    with (
        closing(Block.memory_file("low", 2 * length)) as both,
        running_daemon(tmp_path) as daemon,
    ):
        copy = os.dup(both.descriptor or 0)
        low = Block.at("low", both.address, length, descriptor=both.descriptor)
        high = Block.at("high", both.address + length, length, descriptor=copy, file_offset=length)
        with closing(hand_over(daemon, low, high)) as vmm:
            vmm.loaded()
            assert_survives_a_kill(daemon)
        os.close(copy)


# -- one daemon after the other ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory-file", "anonymous"])
async def test_a_daemon_that_leaves_is_followed_by_one_that_goes_on(
    tmp_path: Path, kind: str
) -> None:
    async with scene(tmp_path, kind) as it:
        await it.begin()
        for _ in range(2):
            it.daemon.leave()
            assert await asyncio.to_thread(it.daemon.ended) == TO_BE_STARTED_AGAIN
            assert it.daemon.control.is_socket()  # who connects meanwhile waits
            await asyncio.to_thread(it.daemon.start)
            await it.reach("paused")
        await it.resume()
        await asyncio.to_thread(wait_until, lambda: set(it.daemon.manager.stored) == OWN)


async def test_a_daemon_does_not_leave_while_a_guest_is_just_beginning(tmp_path: Path) -> None:
    """A QEMU that loses its connection then may lose its guest."""
    async with scene(tmp_path, "memory-file") as it:
        source = it.connect()
        await source.advise()
        await source.send(stream_writer.discard("pc.ram", [(0, LENGTHS["pc.ram"])]))
        await it.reach("discard")
        it.daemon.leave()
        await asyncio.to_thread(wait_until, lambda: "leaves as soon as" in it.daemon.log)
        await source.switch_over({}, DEVICE_STATE)
        assert await asyncio.to_thread(it.daemon.ended) == TO_BE_STARTED_AGAIN
        await asyncio.to_thread(it.daemon.start)
        assert (await it.reach("paused"))["downtime_seconds"] is not None
        await it.resume()


async def test_a_daemon_does_not_leave_a_source_whose_last_pages_are_on_their_way(
    tmp_path: Path,
) -> None:
    async with scene(tmp_path, "memory-file") as it:
        source = await it.begin()
        last = LENGTHS["pc.ram"] - PAGE
        await source.postcopy("pc.ram", it.memory["pc.ram"], range(0, last, PAGE))
        await it.until(lambda migration: migration["received"] >= last)
        it.daemon.leave()
        await asyncio.to_thread(wait_until, lambda: "leaves as soon as" in it.daemon.log)
        await source.postcopy("pc.ram", it.memory["pc.ram"], [last])
        await source.end()
        assert await source.wait_for_shut() == Shut(0)
        source.connection.close()
        await it.verify()
        assert await asyncio.to_thread(it.daemon.ended) == TO_BE_STARTED_AGAIN


def test_a_daemon_stays_if_nobody_would_come_after_it(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.terminate()
        assert daemon.ended() == 0
        daemon.environment["NOTIFY_SOCKET"] = ""
        daemon.launch()
        wait_until(lambda: daemon.log.count("ready") == 2)
        daemon.leave()
        wait_until(lambda: "none would come" in daemon.log)
        assert daemon.client.list() == []


async def test_a_daemon_that_is_being_stopped_stays_with_its_guests(tmp_path: Path) -> None:
    """What the service manager keeps is lost when the service has stopped."""
    async with scene(tmp_path, "memory-file") as it:
        source = await it.begin()
        it.daemon.terminate()
        await asyncio.to_thread(it.daemon.wait_for_status, lambda status: "vm0" in status)
        it.daemon.leave()
        await asyncio.to_thread(wait_until, lambda: "none would come" in it.daemon.log)
        await it.reach("running")
        for name, content in it.memory.items():
            await source.postcopy(name, content, range(0, len(content), PAGE))
        await source.end()
        assert await source.wait_for_shut() == Shut(0)
        source.connection.close()
        await it.verify()
        assert await asyncio.to_thread(it.daemon.ended) == 0


async def test_a_daemon_that_cannot_start_leaves_the_guests_as_they_are(tmp_path: Path) -> None:
    async with scene(tmp_path, "anonymous") as it:
        await it.begin()
        it.daemon.leave()
        assert await asyncio.to_thread(it.daemon.ended) == TO_BE_STARTED_AGAIN
        configuration(tmp_path, '[[migration]]\nname = "vm1"\nlisten = "unix:/no/such/socket"\n')
        it.daemon.launch()
        assert await asyncio.to_thread(it.daemon.ended) == 1
        assert "migration 'vm1': cannot listen" in it.daemon.log
        configuration(tmp_path)
        await asyncio.to_thread(it.daemon.start)
        await it.reach("paused")
        await it.resume()


async def test_a_version_that_fails_in_any_way_leaves_the_guests_as_they_are(
    tmp_path: Path,
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "aiohttp.py").write_text("raise ImportError('no such module: multidict')\n")
    async with scene(tmp_path, "anonymous") as it:
        await it.begin()
        it.daemon.leave()
        assert await asyncio.to_thread(it.daemon.ended) == TO_BE_STARTED_AGAIN
        it.daemon.manager.catch_up()
        kept = set(it.daemon.manager.stored)
        it.daemon.environment["PYTHONPATH"] = str(broken)
        it.daemon.launch()
        assert await asyncio.to_thread(it.daemon.ended) == 1
        assert "cannot start: ImportError: no such module: multidict" in it.daemon.log
        it.daemon.manager.catch_up()
        assert set(it.daemon.manager.stored) >= kept - OWN
        del it.daemon.environment["PYTHONPATH"]
        await asyncio.to_thread(it.daemon.start)
        await it.reach("paused")
        await it.resume()


def test_a_worker_that_fails_while_it_stops_leaves_its_guest_to_another_one(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_FAILS_ONCE_WHILE_IT_STOPS)
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "FAILED": str(tmp_path / "failed")}
    with (
        running_daemon(tmp_path, "workers = 1\n", environment=environment) as daemon,
        running_guest(daemon, "vm0", "anonymous") as guest,
    ):
        source = Image(tmp_path / "image", seed=8).start_sending(
            guest.says()["listen"][0], "--max-bandwidth", "4M"
        )
        wait_until(lambda: daemon.client.show("vm0")["state"] == "running")
        daemon.terminate()
        wait_until(lambda: "the worker has died" in daemon.log)
        assert "this worker cannot go on: another one is to" in daemon.log
        assert "RuntimeError: a mistake of ours" in daemon.log
        assert_sent(source)
        assert guest.says() == {"complete": True, "changed": 0}
        assert daemon.ended() == 0
        assert "Traceback" not in daemon.log


_FAILS_ONCE_WHILE_IT_STOPS = """
import os
from postcopyd.daemon.registry import Registry

stop = Registry.stop

async def fail_once(self, wait):
    if not os.path.exists(os.environ["FAILED"]):
        open(os.environ["FAILED"], "w").close()
        raise RuntimeError("a mistake of ours")
    await stop(self, wait)

Registry.stop = fail_once
"""


async def test_what_cannot_be_read_is_not_let_go_of_by_stopping(tmp_path: Path) -> None:
    async with scene(tmp_path, "anonymous") as it:
        await it.begin()
        it.daemon.leave()
        assert await asyncio.to_thread(it.daemon.ended) == TO_BE_STARTED_AGAIN
        journal = it.daemon.manager.stored["vm0/journal"]
        os.pwrite(journal, b"\xff", len("postcopyd-journal") + 3)
        await asyncio.to_thread(it.daemon.start)
        (listed,) = it.daemon.client.list()
        assert (listed["name"], listed["state"]) == ("vm0", "unreadable")
        assert it.daemon.client.show("vm0")["failure"] == listed["failure"]
        with pytest.raises(ControlError, match="is held, and cannot be read"):
            it.daemon.client.cancel("vm0")
        it.daemon.terminate()
        await asyncio.to_thread(it.daemon.wait_for_status, lambda status: "ended: vm0" in status)
        assert it.daemon.process.poll() is None
        it.daemon.client.cancel("vm0", force=True)
        assert await asyncio.to_thread(it.daemon.ended) == 0
        await asyncio.to_thread(wait_until, lambda: not it.daemon.manager.stored)
