"""A QEMU pair whose stream goes over TLS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import SERVER, Authority, tls_settings
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.interop.breaking_relay import BreakingRelay
from tests.interop.moving import VERSIONS, check_moved, linux, receiving
from tests.interop.qemu import running_qemu, waiting_qemu
from tests.interop.qemu_versions import QemuVersion
from tests.interop.tls import speak_tls, with_credentials

BEFORE_THE_BREAK = 8 << 20


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def daemon(tmp_path: Path, authority: Authority) -> Iterator[RunningDaemon]:
    """A daemon that takes TLS alone, from the sources whose names begin with `good`."""
    directory = tmp_path / "daemon"
    directory.mkdir()
    server = authority.issue("server", dns=[SERVER])
    settings = tls_settings(authority, server, 'allowed_sources = ["CN=good*,O=Tests"]\n')
    with running_daemon(directory, f'plain_tcp = "never"\n{settings}') as daemon:
        yield daemon


@pytest.mark.parametrize(
    ("preempt", "breaks"), [(False, 0), (True, 3)], ids=["main alone", "preempt, broken often"]
)
@pytest.mark.parametrize("version", VERSIONS)
async def test_a_guest_moves_over_tls(
    daemon: RunningDaemon,
    authority: Authority,
    tmp_path: Path,
    version: QemuVersion,
    preempt: bool,
    breaks: int,
) -> None:
    machine = linux(version)
    with_tls = with_credentials(machine, authority, "good-1", tmp_path / "source-tls")
    async with (
        running_qemu(tmp_path, with_tls) as source,
        waiting_qemu(tmp_path, machine) as destination,
        receiving(daemon, destination) as command,
    ):
        if preempt:
            await source.set_capabilities("postcopy-preempt")
        await speak_tls(source)
        port = int((await command.address()).rsplit(":", 1)[1])
        async with BreakingRelay(port).listening() as relay:
            await source.migrate(relay.uri)
            await source.start_postcopy()
            await destination.event("RESUME")
            for _ in range(breaks):
                relay.cut_after(BEFORE_THE_BREAK)
                await source.paused()
                await source.resume(relay.uri)
            assert await source.migration_status("completed", "failed") == "completed"
        report = await command.report()
        assert report["received"] == report["length"]
        assert report["peer"].endswith(", CN=good-1,O=Tests")
        assert (report["preempt"] is not None) == preempt
        await check_moved(source, destination)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_source_that_is_not_allowed_keeps_its_guest(
    daemon: RunningDaemon, authority: Authority, tmp_path: Path, version: QemuVersion
) -> None:
    machine = linux(version)
    with_tls = with_credentials(machine, authority, "evil", tmp_path / "source-tls")
    async with (
        running_qemu(tmp_path, with_tls) as source,
        waiting_qemu(tmp_path, machine) as destination,
        receiving(daemon, destination) as command,
    ):
        await speak_tls(source)
        await source.migrate(await command.address())
        assert await source.migration_status("completed", "failed") == "failed"
        await source.guest_goes_on()
        assert "'CN=evil,O=Tests'" in daemon.log
        (migration,) = daemon.client.list()
        assert migration["state"] == "none"
