"""A daemon that is killed in the last instant of a QEMU's stream over TLS: what becomes of whom."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import pytest

from tests.certificates import SERVER, Authority, tls_settings
from tests.daemon.daemon_process import running_daemon
from tests.interop.moving import VERSIONS, linux, receiving
from tests.interop.qemu import running_qemu, waiting_qemu
from tests.interop.qemu_versions import QemuVersion
from tests.interop.tls import speak_tls, with_credentials
from tests.support import wait_until
from tests.torture.kills import Point, arm, happened

_TOLD: Final = Point("before", "postcopyd.incoming.source_link:SourceLink.confirm")


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_guest_is_here_whole_though_its_qemu_source_could_not_be_told(
    tmp_path: Path, version: QemuVersion
) -> None:
    """What the source does then is QEMU's own, and why docs/reliability.md warns of it."""
    authority = Authority(tmp_path / "authority")
    server = authority.issue("server", dns=[SERVER])
    (directory := tmp_path / "daemon").mkdir()
    more = f'plain_tcp = "never"\n[timeouts]\nclose = 2\n{tls_settings(authority, server)}'
    machine = linux(version)
    with_tls = with_credentials(machine, authority, "source", tmp_path / "source-tls")
    with running_daemon(directory, more, environment=arm(tmp_path, [(_TOLD, "worker")])) as daemon:
        async with (
            running_qemu(tmp_path, with_tls) as source,
            waiting_qemu(tmp_path, machine) as destination,
            receiving(daemon, destination) as command,
        ):
            await speak_tls(source)
            await source.migrate(await command.address())
            await source.start_postcopy()
            report = await command.report()
            await asyncio.to_thread(wait_until, lambda: happened(tmp_path))
            assert (report["state"], report["received"]) == ("end", report["length"])
            await destination.heartbeats(5)
            destination.heartbeat.assert_no_bad_page()
            assert await destination.status() == "running"
            if version == "7.2":
                assert await source.status() == "finish-migrate"  # and stays so: it is not told
            else:
                assert await source.migration_status("completed", "failed") == "failed"
                await source.guest_goes_on()
        assert "Traceback" not in daemon.log
