"""A QEMU that the service adopts, by the right that its drop-in gives, and an upgrade meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.moving import linux
from tests.interop.qemu import running_qemu, waiting_qemu
from tests.support import wait_until
from tests.system.installed import UNIT, Installed
from tests.system.machine import INSIDE

SLOW = 16 << 20
"""Bytes a second: the upgrade falls into the migration."""


@pytest.fixture
def service_that_adopts(service: Installed) -> Iterator[Installed]:
    directory = f"/etc/systemd/system/{UNIT}.d"
    drop_in = f"{INSIDE}/systemd/adopt-qemu.conf"
    service.machine.run("install", "-D", "-m", "644", "-t", directory, drop_in)
    service.systemctl("daemon-reload")
    service.systemctl("restart", UNIT)
    yield service
    service.machine.run("rm", "-r", directory)
    service.systemctl("daemon-reload")
    service.systemctl("restart", UNIT)


async def test_a_qemu_is_adopted_and_survives_an_upgrade(
    service_that_adopts: Installed, tmp_path: Path
) -> None:
    service = service_that_adopts
    machine = linux("7.2")
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(service.directory_of_qemu(), machine, beside=service.beside) as destination,
    ):
        monitor = service.may_ask(destination.qmp_path)
        listen = "unix:/run/postcopyd/source.sock"
        service.client.receive_qemu(monitor, listen, "vm0")
        uri = f"unix:{service.machine.root}/run/postcopyd/source.sock"
        await source.migrate(uri, postcopy_bandwidth=SLOW)
        await source.start_postcopy()
        await destination.event("RESUME")
        before = service.supervisor
        await asyncio.to_thread(service.systemctl, "restart", UNIT)
        assert service.supervisor != before
        await source.paused()
        await source.resume(uri)
        assert await source.migration_status("completed", "failed") == "completed"
        await asyncio.to_thread(wait_until, lambda: service.client.show("vm0")["state"] == "end")
        last = source.heartbeat.beats[-1]
        *_, beat = await destination.heartbeats(5)
        assert beat.count > last.count
        destination.heartbeat.assert_no_bad_page()
        assert await destination.status() == "running"
        assert destination.stderr() == ""
