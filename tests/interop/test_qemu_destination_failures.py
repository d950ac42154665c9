"""What goes wrong between two QEMUs: who goes on then, and what the operator is told."""

from __future__ import annotations

import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.daemon_process import RunningDaemon
from tests.interop.lost_writes import again_after_a_lost_write
from tests.interop.moving import VERSIONS, check_moved, linux, move, receiving, userfaultfds
from tests.interop.qemu import Qemu, running_qemu, waiting_qemu
from tests.interop.qemu_machine import Backend, Machine
from tests.interop.qemu_versions import QemuVersion
from tests.interop.receiving import Command, postcopyctl
from tests.interop.recording_relay import RecordingRelay
from tests.support import wait_until

NAME = "moving"
DEVICE = ("-device", "virtio-rng-pci")


async def refused(command: Command, text: str) -> None:
    """The command ends with this reason, and says that the guest goes on at its source."""
    status, report = await command.ended()
    assert status == 1
    assert report is not None
    assert report["state"] == "failed"
    assert not report["guest_lost"]
    assert text in report["failure"]
    *_, error, advice = command.lines
    assert text in error
    assert "goes on at its source" in advice


async def still_at_the_source(source: Qemu) -> None:
    assert await source.migration_status("completed", "failed") == "failed"
    await source.guest_goes_on()
    source.heartbeat.assert_no_bad_page()


async def retry(daemon: RunningDaemon, source: Qemu, destination: Qemu) -> dict[str, Any]:
    """Have another QEMU take the guest; return the report."""
    async with postcopyctl(
        daemon.control, "retry", NAME, "--qmp", str(destination.qmp_path)
    ) as command:
        report = await command.report()
        assert await source.migration_status("completed", "failed") == "completed"
        return report


@pytest.mark.parametrize("version", VERSIONS)
@again_after_a_lost_write
async def test_a_destination_killed_before_the_package_leaves_the_guest_to_the_source(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion
) -> None:
    machine = linux(version)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
        receiving(daemon, destination) as command,
    ):
        await source.migrate(await command.address())
        await source.precopy_rounds(2)
        await destination.kill()
        await refused(command, "the VMM has gone")
        await still_at_the_source(source)


@pytest.mark.parametrize("backend", ["memfd", "anonymous"])
@pytest.mark.parametrize("version", VERSIONS)
@again_after_a_lost_write
async def test_a_destination_killed_while_it_loads_is_replaced_by_another(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion, backend: Backend
) -> None:
    machine = linux(version, backend)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
        receiving(daemon, destination, NAME) as command,
    ):
        await source.migrate(await command.address())
        await source.precopy_rounds(2)
        destination.process.send_signal(signal.SIGSTOP)  # so that it does not load
        await source.start_postcopy()
        wait_until(lambda: daemon.client.show(NAME)["state"] == "listening")
        await destination.kill()
        await command.line_with(f"postcopyctl retry {NAME} --qmp OTHER")

        async with waiting_qemu(tmp_path, machine, name="other") as other:
            report = await retry(daemon, source, other)
            await check_moved(source, other)
        assert report["package_length"] > 0
        assert (await command.report())["state"] == "end"


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_destination_killed_after_it_runs_is_reported_and_the_daemon_stays_clean(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion
) -> None:
    machine = linux(version)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
    ):
        before = daemon.descriptors()
        async with receiving(daemon, destination, NAME) as command:
            await source.migrate(await command.address(), postcopy_bandwidth=8 << 20)
            await source.start_postcopy()
            wait_until(lambda: daemon.client.show(NAME)["state"] == "running")
            await destination.kill()
            status, report = await command.ended()
        assert status == 1
        assert report is not None
        assert report["guest_lost"]
        assert "the guest is lost" in command.lines[-1]
        daemon.wait_for_descriptors(before)


@pytest.mark.parametrize("version", VERSIONS)
@again_after_a_lost_write
async def test_a_package_cut_short_loses_the_guest_and_says_so(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion
) -> None:
    machine = linux(version)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine) as destination,
        receiving(daemon, destination, NAME) as command,
    ):
        port = int((await command.address()).rsplit(":", 1)[1])
        async with RecordingRelay(port, cut_package_after=1000).listening() as relay:
            await source.migrate(f"tcp:127.0.0.1:{relay.port}")
            await source.precopy_rounds(1)
            await source.start_postcopy()
            status, report = await command.ended()
            assert status == 1
            assert report is not None
            assert report["state"] == "failed"
            assert report["guest_lost"]
            assert "in the middle of the device package of" in report["failure"]
            assert "the guest is lost" in command.lines[-1]
            # Neither has a guest that runs; both answer, and may be asked or ended.
            assert await source.migration_status("postcopy-paused", "completed", "failed")
        assert await destination.status() == "inmigrate"
        assert not list(userfaultfds(destination.pid))


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_wrong_machine_type_is_told_before_anything_is_lost(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion
) -> None:
    machine = linux(version)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, replace(machine, type="pc-q35-6.2")) as wrong,
    ):
        async with receiving(daemon, wrong) as command:
            await source.migrate(await command.address())
            await refused(command, f"start it with -machine pc-q35-{version}")
            await still_at_the_source(source)
        assert await wrong.status() == "inmigrate"
        assert not list(userfaultfds(wrong.pid))


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (
            {"memory": 128 << 20},
            "RAM block 'pc.ram' has 0x10000000 bytes at the source and 0x8000000",
        ),
        ({"extra": ("-device", "VGA")}, "the VMM has a RAM block"),
    ],
    ids=["another size", "one block more"],
)
async def test_other_blocks_are_told_before_anything_is_lost_and_the_right_one_is_filled_then(
    daemon: RunningDaemon, tmp_path: Path, other: dict[str, Any], text: str
) -> None:
    machine = linux("7.2")
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, replace(machine, **other), name="wrong") as wrong,
        waiting_qemu(tmp_path, machine) as destination,
    ):
        async with receiving(daemon, wrong) as command:
            await source.migrate(await command.address())
            await refused(command, text)
            await still_at_the_source(source)
        source.forget_events()
        await move(daemon, source, destination)
        await check_moved(source, destination)


async def test_pages_of_another_size_are_told_before_anything_is_lost(
    daemon: RunningDaemon, tmp_path: Path, huge_pages: Any
) -> None:
    machine = linux("7.2")
    huge_pages(machine.memory >> 21)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, machine.on("7.2", "hugetlb")) as wrong,
        receiving(daemon, wrong) as command,
    ):
        await source.migrate(await command.address())
        await refused(command, "back the memory with pages of the same size on both sides")
        await still_at_the_source(source)


@pytest.mark.parametrize("backend", ["memfd", "anonymous"])
@pytest.mark.parametrize("version", VERSIONS)
@again_after_a_lost_write
async def test_a_missing_device_is_rejected_and_a_destination_that_has_it_takes_the_guest(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion, backend: Backend
) -> None:
    machine = linux(version, backend, extra=DEVICE)
    async with (
        running_qemu(tmp_path, machine) as source,
        waiting_qemu(tmp_path, replace(machine, extra=()), name="without") as without,
        receiving(daemon, without, NAME) as command,
    ):
        await source.migrate(await command.address())
        await source.precopy_rounds(2)
        await source.start_postcopy()
        await command.line_with(f"postcopyctl retry {NAME} --qmp OTHER")
        failure = daemon.client.show(NAME)["failure"]
        assert "the end of its standard error" in failure
        assert "virtio-rng" in without.stderr()

        async with waiting_qemu(tmp_path, machine) as destination:
            await retry(daemon, source, destination)
            await check_moved(source, destination)


@again_after_a_lost_write
async def test_a_second_stream_for_the_same_vm_is_refused_and_the_first_goes_on(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    machine = linux("7.2")
    second = tmp_path / "second"
    second.mkdir()
    async with (
        running_qemu(tmp_path, machine) as source,
        running_qemu(second, machine) as intruder,
        waiting_qemu(tmp_path, machine) as destination,
        receiving(daemon, destination) as command,
    ):
        address = await command.address()
        await source.migrate(address)
        await source.precopy_rounds(1)
        await intruder.migrate(address)
        await still_at_the_source(intruder)
        await source.start_postcopy()
        await command.report()
        await check_moved(source, destination)
    assert "already has a source" in daemon.log


async def test_a_preempt_channel_without_a_main_one_is_told_and_the_source_is_waited_for(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    async with (
        waiting_qemu(tmp_path, linux("7.2")) as destination,
        receiving(daemon, destination, "channel") as command,
    ):
        host, port = (await command.address()).removeprefix("tcp:").rsplit(":", 1)
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(bytes(7) + b"\x02")
            refused = await command.line_with("the main connection has to come first")
        assert refused.startswith("refused: ")
        assert daemon.client.show("channel")["state"] == "none"
        assert await destination.status() == "inmigrate"
        daemon.client.cancel("channel")
        status, _ = await command.ended()
        assert status == 1


async def test_a_destination_that_runs_is_refused(daemon: RunningDaemon, tmp_path: Path) -> None:
    machine: Machine = linux("7.2")
    async with (
        running_qemu(tmp_path, machine) as qemu,
        receiving(daemon, qemu) as command,
    ):
        status, _ = await command.ended()
        assert status == 3
        assert "start it with -incoming defer" in " ".join(command.lines)
        await qemu.guest_goes_on()


async def test_private_file_memory_is_refused_with_the_option_to_change(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    async with (
        waiting_qemu(tmp_path, linux("7.2", "private-file")) as qemu,
        receiving(daemon, qemu) as command,
    ):
        status, _ = await command.ended()
        assert status == 3
        assert "use memory-backend-memfd,share=on" in " ".join(command.lines)
        assert not list(userfaultfds(qemu.pid))
