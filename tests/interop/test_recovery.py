"""A QEMU pair whose connection breaks after the switchover, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.daemon.daemon_process import RunningDaemon
from tests.interop.breaking_relay import BreakingRelay
from tests.interop.moving import VERSIONS, check_moved, linux, receiving
from tests.interop.qemu import running_qemu, waiting_qemu
from tests.interop.qemu_versions import QemuVersion

NAME = "moving"
BREAKS = 3
BETWEEN_BREAKS = 8 << 20


@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
@pytest.mark.parametrize("version", VERSIONS)
async def test_a_connection_that_breaks_again_and_again_after_the_switchover_is_resumed(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion, preempt: bool
) -> None:
    machine = linux(version)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
        receiving(daemon, destination, NAME) as command,
    ):
        if preempt:
            await source.set_capabilities("postcopy-preempt")
        port = int((await command.address()).rsplit(":", 1)[1])
        async with BreakingRelay(port).listening() as relay:
            await source.migrate(relay.uri)
            await source.start_postcopy()
            await destination.event("RESUME")
            relay.cut_after(BETWEEN_BREAKS)
            for number in range(1, BREAKS + 1):
                await source.paused()
                if number < BREAKS:
                    relay.cut_after(BETWEEN_BREAKS)
                await source.resume(relay.uri)
            assert await source.migration_status("completed", "failed") == "completed"
        report = await command.report()
        assert report["received"] == report["length"]
        await check_moved(source, destination)
