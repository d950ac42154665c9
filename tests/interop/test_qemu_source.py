"""A real QEMU 7.2 migrates its guest by post-copy into the memory of another process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.guest_program import firmware_machine, read_blocks
from tests.interop.processes import MemoryKind, running_daemon, running_vmm
from tests.interop.qemu import running_qemu
from tests.interop.qemu_machine import Accelerator, accelerators
from tests.interop.recording_relay import RecordingRelay, device_state_of

pytestmark = pytest.mark.parametrize("accelerator", accelerators())

FULL_SECTION = 0x04


@pytest.mark.parametrize("memory", ["anonymous", "memory-file"])
@pytest.mark.parametrize("rounds", [0, 3], ids=["at once", "after 3 pre-copy rounds"])
async def test_every_block_equals_the_stopped_source(
    tmp_path: Path, firmware: Path, accelerator: Accelerator, memory: MemoryKind, rounds: int
) -> None:
    async with (
        running_daemon(tmp_path) as daemon,
        running_qemu(tmp_path, firmware_machine(firmware, accelerator)) as qemu,
        running_vmm(tmp_path, daemon, "guest", memory, await qemu.ram_blocks()) as vmm,
    ):
        await qemu.migrate(f"tcp:127.0.0.1:{vmm.port}")
        await qemu.precopy_rounds(rounds)
        await qemu.start_postcopy()

        assert await qemu.migration_status("completed", "failed") == "completed"
        assert await vmm.next_word() == {"complete": True, "changed": 0}
        assert vmm.blocks() == await read_blocks(qemu)
        report = await daemon.ended("guest")
        assert report["state"] == "end"
        assert report["counters"]["pages_by_fault"] > 0
        assert report["counters"]["pages_precopy"] >= rounds


async def test_the_package_reaches_the_vmm_whole(
    tmp_path: Path, firmware: Path, accelerator: Accelerator
) -> None:
    async with (
        running_daemon(tmp_path) as daemon,
        running_qemu(tmp_path, firmware_machine(firmware, accelerator)) as qemu,
        running_vmm(tmp_path, daemon, "guest", "anonymous", await qemu.ram_blocks()) as vmm,
        RecordingRelay(vmm.port).listening() as relay,
    ):
        await qemu.migrate(f"tcp:127.0.0.1:{relay.port}")
        await qemu.start_postcopy()

        assert await qemu.migration_status("completed", "failed") == "completed"
        assert await vmm.next_word() == {"complete": True, "changed": 0}
        package = relay.package()
        assert vmm.device_state() == device_state_of(package)
        assert vmm.device_state()[0] == FULL_SECTION
        assert (await daemon.ended("guest"))["package_length"] == len(package)


async def test_a_source_that_cancels_goes_on_and_the_migration_fails(
    tmp_path: Path, firmware: Path, accelerator: Accelerator
) -> None:
    async with (
        running_daemon(tmp_path) as daemon,
        running_qemu(tmp_path, firmware_machine(firmware, accelerator)) as qemu,
        running_vmm(tmp_path, daemon, "guest", "anonymous", await qemu.ram_blocks()) as vmm,
    ):
        await qemu.migrate(f"tcp:127.0.0.1:{vmm.port}")
        await qemu.precopy_rounds(2)
        await qemu.execute("migrate_cancel")

        # Which one is a race inside QEMU 7.2: it shuts the return path before it notes that it is
        # cancelling, and its migration thread may find the broken connection first.
        await qemu.migration_status("cancelled", "failed")
        await qemu.guest_goes_on()
        report = await daemon.ended("guest")
        assert report["state"] == "failed"
        assert "stops in the middle" in report["failure"]
        assert await vmm.next_word() == {"failed": report["failure"]}


async def test_a_vmm_that_dies_before_the_package_leaves_the_guest_to_the_source(
    tmp_path: Path, firmware: Path, accelerator: Accelerator
) -> None:
    async with (
        running_daemon(tmp_path) as daemon,
        running_qemu(tmp_path, firmware_machine(firmware, accelerator)) as qemu,
        running_vmm(tmp_path, daemon, "guest", "anonymous", await qemu.ram_blocks()) as vmm,
    ):
        await qemu.migrate(f"tcp:127.0.0.1:{vmm.port}")
        await qemu.precopy_rounds(2)
        vmm.process.kill()

        assert await qemu.migration_status("completed", "failed") == "failed"
        await qemu.guest_goes_on()
        report = await daemon.ended("guest")
        assert report["state"] == "failed"
        assert "VMM has gone" in report["failure"]
