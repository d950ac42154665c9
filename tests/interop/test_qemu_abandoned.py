"""The source of a QEMU's guest is gone for good, in the middle: what has not come is abandoned.

The guest stands still until then, so that what has come can be compared with what was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
from qemu.qmp import QMPError

from tests.daemon.daemon_process import RunningDaemon
from tests.interop.guest_program import firmware_machine
from tests.interop.moving import VERSIONS, linux, receiving, userfaultfds
from tests.interop.qemu import Qemu, running_qemu, waiting_qemu
from tests.interop.qemu_machine import MEMORY_BLOCK, Machine, accelerators
from tests.interop.qemu_versions import QemuVersion
from tests.support import wait_until

NAME: Final = "moving"
SLOW: Final = 8 << 20
"""Bytes a second; of 64 MiB most are missing for seconds."""
ENOUGH: Final = 8 << 20
"""Bytes that are here when the source goes, pc.ram's first ones in any case."""
MAPPED: Final = 0x80000
"""Bytes at the guest's address 0 that are the block's first ones: nothing else is mapped there."""


@dataclass
class Abandoned:
    """A QEMU whose guest lacks a part of its memory, and has not gone on yet."""

    qemu: Qemu
    report: dict[str, Any]
    sent: int
    """Descriptor of the memory file of the source."""
    here: int
    """Descriptor of the memory file of the QEMU."""

    @property
    def length(self) -> int:
        return self.qemu.machine.memory

    def listed(self) -> list[tuple[int, int]]:
        """What the list says that is missing: offsets and lengths."""
        listed = json.loads(Path(self.report["missing_list"]).read_text())
        assert {missing["block"] for missing in listed["missing"]} == {MEMORY_BLOCK}
        ranges = [(missing["offset"], missing["length"]) for missing in listed["missing"]]
        assert sum(length for _, length in ranges) == listed["length"]
        return ranges


def data_begins(file: int, offset: int, length: int) -> int:
    """Where a file of that length has something, from an offset on."""
    try:
        return os.lseek(file, offset, os.SEEK_DATA)
    except OSError:  # nothing more
        return length


@contextlib.asynccontextmanager
async def abandoned(
    daemon: RunningDaemon, directory: Path, machine: Machine
) -> AsyncIterator[Abandoned]:
    """Move a guest that stands still, end its source in the middle, and abandon the rest."""
    async with (
        running_qemu(directory, machine) as source,
        waiting_qemu(directory, machine) as destination,
        receiving(daemon, destination, NAME) as command,
    ):
        await source.execute("stop")
        with (
            source.memory_file().open("rb", buffering=0) as sent,
            destination.memory_file().open("rb", buffering=0) as here,
        ):
            await source.migrate(await command.address(), postcopy_bandwidth=SLOW)
            await source.start_postcopy()

            def has_come() -> bool:
                migration = daemon.client.show(NAME)
                return bool(migration["state"] == "running" and migration["received"] > ENOUGH)

            await asyncio.to_thread(wait_until, has_come)
            await source.kill()
            await asyncio.to_thread(
                wait_until, lambda: daemon.client.show(NAME)["state"] == "paused"
            )
            report = await asyncio.to_thread(daemon.client.abandon, NAME)
            assert report["state"] == "abandoned"
            status, _ = await command.ended()
            assert status == 1
            assert "a part of its memory never came" in command.lines[-2]
            yield Abandoned(destination, report, sent.fileno(), here.fileno())


async def assert_kept(it: Abandoned) -> None:
    """What is not listed is as it was sent, and of what is listed nothing is here."""
    ranges = it.listed()
    assert ranges and ranges[0][0] > MAPPED
    assert it.report["missing_length"] == sum(length for _, length in ranges)
    begin = 0
    for offset, length in [*ranges, (it.length, 0)]:
        kept = os.pread(it.sent, offset - begin, begin)
        assert os.pread(it.here, offset - begin, begin) == kept
        # Who shares the memory file reads zeros of it: there is nothing in it.
        assert length == 0 or data_begins(it.here, offset, it.length) >= offset + length
        begin = offset + length
    assert await it.qemu.read_memory(0, MAPPED) == os.pread(it.sent, MAPPED, 0)
    assert await it.qemu.status() == "paused"
    assert not list(userfaultfds(it.qemu.pid))


@pytest.mark.parametrize("version", VERSIONS)
async def test_an_abandoned_guest_keeps_what_came_and_its_qemu_ends_with_the_first_memory_error(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion
) -> None:
    async with abandoned(daemon, tmp_path, linux(version)) as it:
        await assert_kept(it)
        assert await ended(it.qemu) == -signal.SIGBUS


@pytest.mark.skipif("kvm" not in accelerators(), reason="KVM does not work here")
async def test_an_abandoned_guest_under_kvm_ends_with_the_first_memory_error(
    daemon: RunningDaemon, tmp_path: Path, firmware: Path
) -> None:
    machine = replace(firmware_machine(firmware, "kvm"), version="10.0", backend="memfd")
    async with abandoned(daemon, tmp_path, machine) as it:
        await assert_kept(it)
        # Handed on to this guest, which knows nothing of memory errors, one ends its machine. A
        # kernel without CONFIG_MEMORY_FAILURE does not say that it is one, and QEMU ends with it.
        await ended(it.qemu)


async def ended(qemu: Qemu) -> int:
    """Have the guest go on, which ends it; return the exit status."""
    with contextlib.suppress(QMPError, EOFError):  # it may end before it answers
        await qemu.execute("cont")
    return await qemu.within_deadline(qemu.process.wait(), "it has ended")
