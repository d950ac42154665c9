"""The service under a systemd that has booted: it is killed, restarted, stopped and reloaded."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from postcopyd.wire.address import Address
from postcopyd.wire.messages import BlockEntry
from tests.daemon.test_network import Scene
from tests.daemon.whole_migration import LENGTHS, PAGE, Image, assert_sent, running_guest
from tests.incoming.engine import Source
from tests.support import LIMIT, wait_until
from tests.system.installed import UNIT, Installed, upgrade

PACKAGE_RECEIVED = "7c28d341dc114f078eeac615808fd96a"
HELD = "4b7cf0e9d0a84d0cb8a3a9c3f5d3c1e2"

Deed = Callable[[Installed], None]


class BootedScene(Scene):
    """The service on its machine, a guest beside it, and a source outside."""

    service: Installed
    image: Image
    address: str

    def connect(self) -> Source:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(Address.parse(self.address).path)
        connection.setblocking(False)
        blocks = [BlockEntry(name, length, PAGE) for name, length in LENGTHS.items()]
        self.sources.append(Source(connection, blocks))
        return self.sources[-1]

    async def send_all(self, source: Source) -> None:
        for name, content in self.memory.items():
            await source.postcopy(name, content, range(0, len(content), PAGE))

    async def verify(self) -> None:
        """The guest has all its memory, has seen none of it change, and ends."""
        assert await asyncio.to_thread(self.guest.says) == {"complete": True, "changed": 0}
        assert await asyncio.to_thread(self.guest.process.wait, LIMIT) == 0
        assert self.guest.memory() == self.memory


@asynccontextmanager
async def scene(service: Installed, kind: str = "memory-file") -> AsyncIterator[BootedScene]:
    image = Image(service.directory / "image", seed=9)
    address = service.wait_for_source("vm0")
    with running_guest(service, "vm0", kind) as guest:
        it = BootedScene(None, service, guest, image)  # type: ignore[arg-type]
        it.service, it.image, it.address = service, image, address
        try:
            yield it
        finally:
            for source in it.sources:
                source.connection.close()


# -- as it is installed ------------------------------------------------------------------------


def test_systemctl_shows_what_it_does(service: Installed) -> None:
    service.client.create("vm0")
    shown = service.machine.run("systemctl", "status", UNIT)
    assert "active (running)" in shown
    assert 'Status: "1 migration under way: 1 none"' in shown
    assert service.told("Type") == "notify"


@pytest.mark.parametrize("way", ["control", "handoff"])
def test_whoever_comes_to_its_sockets_starts_it(service: Installed, way: str) -> None:
    service.systemctl("stop", UNIT)
    assert service.told("ActiveState") == "inactive"
    if way == "control":
        assert service.machine.run("postcopyctl", "list", "--json")
    else:
        with running_guest(service, "vm0", "anonymous") as guest:
            assert guest.says()["listen"]
    service.wait_until_active()  # the workers are ready one after the other


def test_it_may_do_what_it_promises_and_no_more(service: Installed) -> None:
    status = service.machine.run("cat", f"/proc/{service.supervisor}/status")
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    findings = {finding["key"]: finding for finding in service.client.check()["findings"]}
    assert findings["copy"]["available"], findings


async def test_a_migration_is_whole_and_told_in_the_journal(service: Installed) -> None:
    async with scene(service) as it:
        await asyncio.to_thread(assert_sent, it.image.start_sending(it.address))
        await it.verify()
    (entry,) = service.log("POSTCOPYD_MIGRATION=vm0", f"MESSAGE_ID={PACKAGE_RECEIVED}")
    assert entry["SYSLOG_IDENTIFIER"] == "postcopyd"
    assert entry["PRIORITY"] == "6"
    assert int(entry["POSTCOPYD_LENGTH"]) > 0


async def test_a_source_may_come_over_tcp(service: Installed) -> None:
    image = Image(service.directory / "image", seed=10)
    with running_guest(service, "vm0", "anonymous") as guest:
        address = guest.says()["listen"][0]
        assert address.startswith("tcp:127.0.0.1:")
        sending = image.start_sending(address, wrapper=service.beside)
        await asyncio.to_thread(assert_sent, sending)
        assert guest.says() == {"complete": True, "changed": 0}
        assert guest.process.wait(LIMIT) == 0
    assert guest.memory() == image.memory


# -- killed, restarted -------------------------------------------------------------------------


def kill_supervisor(service: Installed) -> None:
    service.kill(service.supervisor)


def kill_worker(service: Installed) -> None:
    service.kill(service.worker)


def kill_all(service: Installed) -> None:
    service.systemctl("kill", "--signal=KILL", UNIT)


def restart(service: Installed) -> None:
    service.systemctl("restart", UNIT)


def have_it_leave(service: Installed) -> None:
    before = service.supervisor
    service.systemctl("kill", "--kill-who=main", "--signal=USR1", UNIT)
    wait_until(lambda: service.supervisor != before)


def restart_socket(service: Installed) -> None:
    service.systemctl("restart", "postcopyd.socket")


def reexecute_systemd(service: Installed) -> None:
    service.systemctl("daemon-reexec")
    kill_supervisor(service)


DEEDS = [
    *(kill_supervisor, kill_worker, kill_all),
    *(restart, have_it_leave, restart_socket, reexecute_systemd),
]


@pytest.mark.parametrize("deed", DEEDS)
async def test_the_guest_goes_on(service: Installed, deed: Deed) -> None:
    async with scene(service, "anonymous") as it:
        await it.begin()
        await asyncio.to_thread(deed, service)
        await it.reach("paused")
        await it.resume()


@pytest.mark.parametrize("deed", DEEDS)
async def test_the_source_comes_back_by_itself(service: Installed, deed: Deed) -> None:
    moments = random.Random(deed.__name__)
    async with scene(service) as it:
        source = it.image.start_sending(it.address, "--max-bandwidth", "8M")
        await it.reach("running")
        for _ in range(2):
            await asyncio.sleep(moments.uniform(0, 0.2))
            await asyncio.to_thread(deed, service)
        await asyncio.to_thread(assert_sent, source)
        await it.verify()


async def test_a_supervisor_that_stands_still_is_replaced(service: Installed) -> None:
    with service.set_to("WatchdogSec=1"):
        async with scene(service) as it:
            await it.begin()
            stands_still = service.supervisor
            await asyncio.to_thread(service.kill, stands_still, "STOP")
            await it.reach("paused")
            assert service.supervisor != stands_still
            await it.resume()


# -- restarted before the package ----------------------------------------------------------------


async def test_a_vmm_that_waits_for_its_source_goes_on_waiting(service: Installed) -> None:
    async with scene(service) as it:
        await it.until(lambda migration: migration["vmm"] is not None)
        await asyncio.to_thread(restart, service)
        assert it.show()["vmm"] is not None
        await asyncio.to_thread(assert_sent, it.image.start_sending(it.address))
        await it.verify()


async def test_a_source_that_still_is_the_vm_begins_anew(service: Installed) -> None:
    async with scene(service) as it:
        first = it.connect()
        await first.advise()
        await it.reach("advise")
        await asyncio.to_thread(restart, service)
        await it.reach("none")
        await it.begin()


# -- stopped, reloaded ---------------------------------------------------------------------------


async def test_who_stops_it_waits_for_the_guests_that_live_here(service: Installed) -> None:
    async with scene(service) as it:
        source = await it.begin()
        stopping = asyncio.create_task(asyncio.to_thread(service.systemctl, "stop", UNIT))
        waits = "stopping as soon as these have ended: vm0"
        await asyncio.to_thread(wait_until, lambda: waits in service.told("StatusText"))
        assert service.told("ActiveState") == "deactivating"
        await it.send_all(source)
        await source.end()
        await source.wait_for_shut()
        source.connection.close()
        await it.verify()
        await stopping
    assert service.told("Result") == "success"
    assert service.told("ActiveState") == "inactive"


async def test_a_reload_changes_nothing_for_the_guests(service: Installed) -> None:
    async with scene(service) as it:
        source = await it.begin()
        supervisor = service.supervisor
        await asyncio.to_thread(service.systemctl, "reload", UNIT)
        assert service.supervisor == supervisor
        await it.send_all(source)
        await it.finish(source)


# -- another version -----------------------------------------------------------------------------


async def test_a_version_that_cannot_read_the_journal_holds_it_for_one_that_can(
    service: Installed,
) -> None:
    journal = Path("incoming/journal.py")
    versions = ("VERSION: Final = 1", "VERSION: Final = 1000")
    async with scene(service, "anonymous") as it:
        await it.begin()
        service.edit(journal, *versions)
        await asyncio.to_thread(restart, service)
        (entry,) = service.log("POSTCOPYD_MIGRATION=vm0", f"MESSAGE_ID={HELD}")
        assert "start the version that wrote it" in entry["MESSAGE"]
        service.edit(journal, *reversed(versions))
        await asyncio.to_thread(restart, service)
        await it.resume()


async def test_an_upgrade_goes_as_the_readme_says(service: Installed) -> None:
    async with scene(service, "anonymous") as it:
        await it.begin()
        await asyncio.to_thread(upgrade, service.machine)
        command = service.machine.run("cat", f"/proc/{service.supervisor}/cmdline")
        assert command.startswith("/opt/postcopyd-2/")
        await it.reach("paused")
        await it.resume()
