"""The Linux guest and the helpers around QEMU: native post-copy, and that a bad page is noticed."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.interop.linux_guest import LinuxGuest
from tests.interop.lost_writes import again_after_a_lost_write
from tests.interop.qemu import Qemu, running_qemu, waiting_qemu
from tests.interop.qemu_machine import Backend, Machine
from tests.interop.qemu_versions import COMMON_MACHINE, QemuVersion

MEMORY = 256 << 20
CHECKED_MIB = 64
PAGE = 4096
PATTERN_STEP = 0xBF58476D1CE4E5B9
"""By which neighbouring words of a checker's page differ."""

VERSIONS: list[QemuVersion] = ["7.2", "10.0"]


@contextlib.asynccontextmanager
async def source_and_destination(
    directory: Path, machine: Machine, version: QemuVersion, backend: Backend
) -> AsyncIterator[tuple[Qemu, Qemu]]:
    """The machine running, and a destination of this version and backend that waits for it."""
    async with (
        running_qemu(directory, machine) as source,
        waiting_qemu(directory, machine.on(version, backend)) as destination,
    ):
        yield source, destination


@pytest.mark.parametrize("rounds", [0, 3], ids=["at once", "after 3 pre-copy rounds"])
@pytest.mark.parametrize("version", VERSIONS)
@again_after_a_lost_write
async def test_no_page_is_bad_after_native_post_copy(
    tmp_path: Path, version: QemuVersion, rounds: int
) -> None:
    machine = Machine(LinuxGuest(CHECKED_MIB, zero_mib=64), version=version, memory=MEMORY)
    async with source_and_destination(tmp_path, machine, version, "memfd") as (source, destination):
        await destination.set_capabilities("postcopy-ram")
        await source.migrate(await destination.listen())
        await source.precopy_rounds(rounds)
        await source.start_postcopy()

        assert await source.migration_status("completed", "failed") == "completed"
        last = source.heartbeat.beats[-1]
        *_, beat = await destination.heartbeats(5)
        assert beat.count > last.count
        assert beat.iterations > last.iterations
        destination.heartbeat.assert_no_bad_page()
        assert await source.status() == "postmigrate"
        assert await destination.status() == "running"


@pytest.mark.parametrize(("version", "other"), [VERSIONS, VERSIONS[::-1]])
async def test_a_machine_goes_from_one_version_to_the_other_with_preempt(
    tmp_path: Path, version: QemuVersion, other: QemuVersion
) -> None:
    machine = Machine(
        LinuxGuest(CHECKED_MIB),
        version=version,
        memory=MEMORY,
        processors=2,
        type=COMMON_MACHINE,
    )
    async with source_and_destination(tmp_path, machine, other, "memfd") as (source, destination):
        for qemu in (source, destination):
            await qemu.set_capabilities("postcopy-ram", "postcopy-preempt")
        await source.migrate(await destination.listen())
        await source.start_postcopy()

        assert await source.migration_status("completed", "failed") == "completed"
        await destination.guest_goes_on()
        destination.heartbeat.assert_no_bad_page()


async def test_the_checker_notices_bytes_that_change(tmp_path: Path) -> None:
    machine = Machine(LinuxGuest(CHECKED_MIB), backend="memfd", memory=MEMORY)
    async with running_qemu(tmp_path, machine) as qemu:
        await qemu.execute("stop")
        poke_some_pages(qemu.memory_file())
        await qemu.execute("cont")

        line = await qemu.within_deadline(qemu.heartbeat.next_bad_page(), "a bad page is found")
        assert line.startswith("BAD page=")
        *_, beat = await qemu.heartbeats(2)
        assert beat.bad > 0
        with pytest.raises(AssertionError):
            qemu.heartbeat.assert_no_bad_page()


def poke_some_pages(memory_file: Path) -> None:
    """Change one byte of every fiftieth page that holds the checker's pattern."""
    descriptor = os.open(memory_file, os.O_RDWR)
    try:
        length = os.fstat(descriptor).st_size
        offsets = [
            offset
            for offset in range(0, length, PAGE)
            if is_checked_page(os.pread(descriptor, PAGE, offset))
        ]
        assert len(offsets) > ((CHECKED_MIB - 1) << 20) // PAGE
        for offset in offsets[::50]:
            (byte,) = os.pread(descriptor, 1, offset + 1234)
            os.pwrite(descriptor, bytes([byte ^ 1]), offset + 1234)
    finally:
        os.close(descriptor)


def is_checked_page(page: bytes) -> bool:
    """Whether it holds the pattern of guest/checker.c."""
    words = struct.unpack("<512Q", page)
    return all((words[place + 1] - words[place]) % 2**64 == PATTERN_STEP for place in (0, 99, 510))
