"""A guest at work moves between two unmodified QEMUs, and postcopyd owns its memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from tests.daemon.daemon_process import RunningDaemon
from tests.interop.guest_program import firmware_machine
from tests.interop.linux_guest import LinuxGuest
from tests.interop.lost_writes import again_after_a_lost_write
from tests.interop.moving import MEMORY, VERSIONS, check_moved, linux, move, receiving
from tests.interop.qemu import running_qemu, waiting_qemu
from tests.interop.qemu_machine import Accelerator, Backend, Machine, accelerators
from tests.interop.qemu_versions import COMMON_MACHINE, QemuVersion

WITHOUT_LIMIT: Final = 0


@pytest.mark.parametrize("rounds", [0, 3], ids=["at once", "after 3 rounds"])
@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
@pytest.mark.parametrize("version", VERSIONS)
@again_after_a_lost_write
async def test_a_guest_moves_and_no_page_is_bad(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion, preempt: bool, rounds: int
) -> None:
    machine = linux(version)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
    ):
        if preempt:
            await source.set_capabilities("postcopy-preempt")
        report = await move(daemon, source, destination, rounds=rounds)
        await check_moved(source, destination)
    assert report["counters"]["pages_by_fault"] > 0
    assert (report["preempt"] is not None) == preempt
    assert report["threads"][0]["name"] == "vcpu0"
    assert report["threads"][0]["faults"] > 0
    assert 0 < report["downtime_seconds"] < report["window_seconds"]


@pytest.mark.parametrize("version", VERSIONS)
async def test_four_processors_are_told_apart(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion
) -> None:
    machine = linux(version, processors=4)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
    ):
        report = await move(daemon, source, destination)
        await check_moved(source, destination)
    names = [thread["name"] for thread in report["threads"]]
    assert names[:4] == [f"vcpu{number}" for number in range(4)]


@again_after_a_lost_write
async def test_a_guest_moves_to_a_newer_qemu(daemon: RunningDaemon, tmp_path: Path) -> None:
    machine = linux("7.2", type=COMMON_MACHINE)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine.on("10.0", "memfd")) as destination,
    ):
        await source.set_capabilities("postcopy-preempt")
        await move(daemon, source, destination, rounds=2)
        await check_moved(source, destination)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("backend", ["anonymous", "hugetlb"])
@again_after_a_lost_write
async def test_any_kind_of_memory_is_filled(
    daemon: RunningDaemon,
    tmp_path: Path,
    version: QemuVersion,
    backend: Backend,
    huge_pages: Callable[[int], None],
) -> None:
    if backend == "hugetlb":
        huge_pages(2 * MEMORY >> 21)
    machine = linux(version, backend)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
    ):
        await move(daemon, source, destination, rounds=2)
        await check_moved(source, destination)


@pytest.mark.parametrize("version", VERSIONS)
@again_after_a_lost_write
async def test_video_memory_comes_with_the_devices(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion
) -> None:
    machine = linux(version, extra=("-device", "VGA"))
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
    ):
        report = await move(daemon, source, destination, rounds=2)
        await check_moved(source, destination)
    watched = {block["name"]: block["watched"] for block in report["blocks"]}
    assert [name for name in watched if watched[name]] == ["pc.ram"]
    assert any("vga.vram" in name for name in watched)


async def test_a_guest_with_free_memory_costs_little(daemon: RunningDaemon, tmp_path: Path) -> None:
    guest = LinuxGuest(checked_mib=16, zero_mib=64)
    machine = replace(linux("7.2"), guest=guest, memory=512 << 20)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
    ):
        report = await move(daemon, source, destination)
        await check_moved(source, destination)
    assert report["bytes_received"] < machine.memory // 2


@pytest.mark.parametrize("version", VERSIONS)
@again_after_a_lost_write
async def test_a_guest_moves_twice_in_a_row(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion
) -> None:
    machine = linux(version)
    async with (
        running_qemu(tmp_path, machine) as first,
        waiting_qemu(tmp_path, machine, name="second") as second,
        waiting_qemu(tmp_path, machine, name="third") as third,
    ):
        await move(daemon, first, second, rounds=1)
        await second.set_capabilities("postcopy-ram")
        await move(daemon, second, third, rounds=1)
        await check_moved(second, third)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_paused_guest_stays_paused(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion
) -> None:
    machine = linux(version)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
    ):
        await source.execute("stop")
        await move(daemon, source, destination)
        assert await destination.status() == "paused"
        await destination.execute("cont")
        await check_moved(source, destination)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_pre_copy_that_converges_completes(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion
) -> None:
    machine = linux(version)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
        receiving(daemon, destination) as command,
    ):
        await source.migrate(await command.address(), bandwidth=WITHOUT_LIMIT)
        await source.execute("migrate-set-parameters", downtime_limit=10_000)
        await command.report()
        assert await source.migration_status("completed", "failed") == "completed"
        await check_moved(source, destination)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("accelerator", accelerators())
@again_after_a_lost_write
async def test_a_boot_sector_guest_moves(
    daemon: RunningDaemon,
    tmp_path: Path,
    firmware: Path,
    version: QemuVersion,
    accelerator: Accelerator,
) -> None:
    machine = replace(firmware_machine(firmware, accelerator), version=version, backend="memfd")
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
    ):
        complaints = destination.stderr()  # about the processor, before anything comes
        await move(daemon, source, destination, rounds=2)
        await destination.guest_goes_on()
        assert destination.stderr() == complaints


async def test_eight_guests_arrive_at_once(daemon: RunningDaemon, tmp_path: Path) -> None:
    guest = LinuxGuest(checked_mib=16)
    machine = Machine(guest, version="7.2", memory=96 << 20, backend="memfd")
    async with AsyncExitStack() as stack:
        pairs = []
        for number in range(8):
            directory = tmp_path / str(number)
            directory.mkdir()
            source = await stack.enter_async_context(running_qemu(directory, machine))
            await source.execute("stop")  # only two of them could boot at a time beside the others
            destination = await stack.enter_async_context(waiting_qemu(directory, machine))
            pairs.append((source, destination))
        for source, _ in pairs:
            await source.execute("cont")
        async with asyncio.TaskGroup() as moving:
            for source, destination in pairs:
                moving.create_task(move(daemon, source, destination))
        for source, destination in pairs:
            await check_moved(source, destination)
