"""Moving a Linux guest from one QEMU to another through a daemon, and checking that it arrived."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

from tests.daemon.daemon_process import RunningDaemon
from tests.interop.linux_guest import LinuxGuest
from tests.interop.qemu import Qemu
from tests.interop.qemu_machine import Backend, Machine
from tests.interop.qemu_versions import QemuVersion
from tests.interop.receiving import Command, postcopyctl

VERSIONS: Final[list[QemuVersion]] = ["7.2", "10.0"]
MEMORY: Final = 256 << 20
"""Bytes of a guest."""


def linux(version: QemuVersion, backend: Backend = "memfd", **options: Any) -> Machine:
    """A machine with the checker in 100 MiB of its memory; `options` are those of `Machine`."""
    guest = LinuxGuest(checked_mib=100)
    return Machine(guest, version=version, memory=MEMORY, backend=backend, **options)


@contextlib.asynccontextmanager
async def receiving(
    daemon: RunningDaemon, destination: Qemu, name: str = ""
) -> AsyncIterator[Command]:
    """Have the daemon wait for a source that fills the destination."""
    async with postcopyctl(
        daemon.control,
        *("receive-qemu", "--qmp", str(destination.qmp_path), "--listen", "tcp:127.0.0.1:0"),
        *(("--name", name) if name else ()),
    ) as command:
        yield command


async def move(
    daemon: RunningDaemon, source: Qemu, destination: Qemu, *, rounds: int = 0
) -> dict[str, Any]:
    """Move the guest by post-copy; return the report of postcopyctl."""
    async with receiving(daemon, destination) as command:
        await source.migrate(await command.address())
        await source.precopy_rounds(rounds)
        await source.start_postcopy()
        report = await command.report()
        assert await source.migration_status("completed", "failed") == "completed"
        return report


async def check_moved(source: Qemu, destination: Qemu) -> None:
    """The guest is at the destination, whole and at work, and nobody has complained."""
    last = source.heartbeat.beats[-1]
    *_, beat = await destination.heartbeats(5)
    assert beat.count > last.count
    assert beat.iterations > last.iterations
    destination.heartbeat.assert_no_bad_page()
    assert await destination.status() == "running"
    assert destination.stderr() == ""
    assert not list(userfaultfds(destination.pid))


def userfaultfds(pid: int) -> Iterator[Path]:
    """The userfaultfds that a process has open."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "userfaultfd" in str(entry.readlink()):
                yield entry
