"""The daemon is killed while it feeds a QEMU its devices: another QEMU takes the guest.

A QEMU reads its ROMs behind its devices. So where the source does not hear that they are wanted, it
stays in the middle of what it is fed until somebody ends that. One that was fed everything takes
the guest itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from postcopyd.wire.feed import FEED_END
from tests.daemon.daemon_process import RunningDaemon
from tests.interop.breaking_relay import BreakingRelay
from tests.interop.lost_writes import again_after_a_lost_write
from tests.interop.moving import check_moved, linux, receiving
from tests.interop.qemu import POSTCOPY_BANDWIDTH, Qemu, running_qemu, waiting_qemu
from tests.interop.qemu_machine import Backend
from tests.interop.qemu_versions import QemuVersion
from tests.interop.receiving import postcopyctl
from tests.support import wait_until
from tests.torture.crashing import restarted_daemon
from tests.torture.kills import Point, arm, happened

NAME: Final = "moving"
SLOW: Final = 8 << 20
"""Bytes a second; the ROMs, which come last, would take half a minute."""

WHY: Final = ("postcopyd was killed while it fed QEMU", "the VMM has gone")
"""A 7.2 whose feed ends exits at once."""


def kill_worker(daemon: RunningDaemon) -> None:
    daemon.kill_worker()


def kill_all(daemon: RunningDaemon) -> None:
    daemon.kill()
    daemon.start()


@pytest.mark.parametrize(
    ("version", "backend", "kill"),
    [("7.2", "anonymous", kill_worker), ("10.0", "memfd", kill_all)],
    ids=["7.2, worker", "10.0, all"],
)
@again_after_a_lost_write
async def test_a_daemon_killed_while_it_feeds_a_qemu_keeps_everything_for_another(
    daemon: RunningDaemon,
    tmp_path: Path,
    version: QemuVersion,
    backend: Backend,
    kill: Callable[[RunningDaemon], None],
) -> None:
    machine = linux(version, backend)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
        receiving(daemon, destination, NAME) as command,
    ):
        port = int((await command.address()).rsplit(":", 1)[1])
        async with BreakingRelay(port).listening() as relay:
            relay.answers.clear()
            await source.migrate(relay.uri, bandwidth=SLOW, postcopy_bandwidth=SLOW)
            await source.start_postcopy()
            await destination.migration_status("active")  # it reads what it is fed
            await asyncio.to_thread(kill, daemon)
            relay.answers.set()
            # It may wait for a page in the middle, and says nothing before the source is back.
            await asyncio.to_thread(wait_until, lambda: is_of_no_use_or_waits(daemon))
            if not daemon.client.show(NAME)["waits_for_vmm"]:
                await destination.kill()
            await command.line_with(f"postcopyctl retry {NAME} --qmp OTHER")
            migration = daemon.client.show(NAME)
            assert migration["state"] == "paused"
            assert migration["waits_for_vmm"]
            assert any(why in migration["failure"] for why in WHY)
            assert not destination.events("RESUME"), "it must never run"
            await source.paused()

            async with waiting_qemu(tmp_path, machine, name="other") as other:
                await retry_and_resume(daemon, source, relay, other)
                await check_moved(source, other)
        assert not destination.events("RESUME"), "it must never run"
        assert (await command.report())["state"] == "end"


@again_after_a_lost_write
async def test_a_qemu_that_was_fed_everything_when_the_daemon_was_killed_takes_the_guest(
    tmp_path: Path,
) -> None:
    machine = linux("7.2")
    fed = Point("after", "postcopyd.vmm.qemu_feed:Feed._send", mentions=repr((FEED_END,)))
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
    ):
        with restarted_daemon(tmp_path, arm(tmp_path, [(fed, "worker")])) as daemon:
            async with receiving(daemon, destination, NAME) as command:
                address = await command.address()
                await source.migrate(address)
                await source.precopy_rounds(2)
                await source.start_postcopy()
                await source.paused()
                await source.resume(address)
                assert await source.migration_status("completed", "failed") == "completed"
                await command.report()
        assert len(happened(tmp_path)) == 1, "it was not killed there"
        await check_moved(source, destination)


def is_of_no_use_or_waits(daemon: RunningDaemon) -> bool:
    migration = daemon.client.show(NAME)
    return bool(migration["waits_for_vmm"] or migration["outstanding"])


async def retry_and_resume(
    daemon: RunningDaemon, source: Qemu, relay: BreakingRelay, other: Qemu
) -> None:
    """Have another QEMU take the guest, whose source is told then to go on."""
    async with postcopyctl(daemon.control, "retry", NAME, "--qmp", str(other.qmp_path)) as command:
        await asyncio.to_thread(wait_until, lambda: not daemon.client.show(NAME)["waits_for_vmm"])
        await source.execute("migrate-set-parameters", max_postcopy_bandwidth=POSTCOPY_BANDWIDTH)
        await source.resume(relay.uri)
        report = await command.report()
    assert await source.migration_status("completed", "failed") == "completed"
    assert report["received"] == report["length"]
