"""A real QEMU as the source of a migration: started, told what to do over QMP, and ended.

Every wait has a deadline, and fails with what QEMU has printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import socket
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast

from qemu.qmp import EventListener, QMPClient

from tests.interop import guest_program

Accelerator = Literal["kvm", "tcg"]
T = TypeVar("T")

DEADLINE: Final = 20.0
"""Seconds for any one thing that QEMU is waited for."""

PRECOPY_BANDWIDTH: Final = 128 << 20
"""Bytes a second; more than 20 MiB go in the first round."""
POSTCOPY_BANDWIDTH: Final = 64 << 20
"""Bytes a second; more than 20 MiB are missing at the switchover."""

_KVM_CREATE_VM: Final = 0xAE01  # linux/kvm.h


class QemuFailure(AssertionError):
    """QEMU did not do in time what was waited for."""


def accelerators() -> list[Accelerator]:
    """The accelerators that work on this machine: always TCG, and KVM where it makes a VM."""
    try:
        with open("/dev/kvm", "rb+", buffering=0) as kvm:
            os.close(fcntl.ioctl(kvm, _KVM_CREATE_VM, 0))
    except OSError:
        return ["tcg"]
    return ["kvm", "tcg"]


@dataclass
class Qemu:
    """One running QEMU with the guest of guest_program.py."""

    process: asyncio.subprocess.Process
    directory: Path
    qmp: QMPClient
    events: EventListener
    statuses: list[str] = field(default_factory=list)
    """The states that the migration has had, oldest first."""
    _passes: int = 0

    async def execute(self, command: str, **arguments: object) -> Any:
        """Run a QMP command; its name and its arguments are written with dashes on the wire."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self.within_deadline(
            self.qmp.execute(command, named or None), f"{command} answered"
        )

    async def within_deadline(self, awaitable: Awaitable[T], what: str) -> T:
        """Await, or fail with what QEMU has printed."""
        try:
            return await asyncio.wait_for(awaitable, DEADLINE)
        except TimeoutError:
            raise QemuFailure(
                f"not within {DEADLINE:.0f} s: {what}; migration states {self.statuses},"
                f" pass {self._passes}; QEMU printed: {self.stderr() or 'nothing'}"
            ) from None

    def stderr(self) -> str:
        """What QEMU has printed so far."""
        return (self.directory / "qemu.stderr").read_text()

    async def ram_blocks(self) -> dict[str, int]:
        """The used length in bytes of every RAM block, by name, in QEMU's order."""
        answer = await self.execute("human-monitor-command", command_line="info ramblock")
        rows = re.findall(r"^ *(\S+) +\d+ KiB +0x\w+ +0x(\w+)", answer, re.MULTILINE)
        return {name: int(used, 16) for name, used in rows}

    async def read_memory(self, address: int, length: int) -> bytes:
        """Read guest-physical memory."""
        copy = self.directory / "pmemsave"
        await self.execute("pmemsave", val=address, size=length, filename=str(copy))
        return copy.read_bytes()

    async def read_blocks(self) -> dict[str, bytes]:
        """The contents of every RAM block of the stopped machine, by name.

        pc.ram, and pc.bios at the top of 4 GiB, are read where they are mapped. pc.rom cannot
        change and is read from the copy that the guest has made; the blocks /rom@NAME are what
        the guest has read as fw_cfg file NAME, with zeros after it.
        """
        lengths = await self.ram_blocks()
        ram = await self.read_memory(0, guest_program.MEMORY)
        rom_end = guest_program.ROM_COPY + guest_program.ROM_LENGTH
        contents = {
            "pc.ram": ram,
            "pc.bios": await self.read_memory(
                guest_program.FIRMWARE_ADDRESS, guest_program.FIRMWARE_LENGTH
            ),
            "pc.rom": ram[guest_program.ROM_COPY : rom_end],
        }
        files = guest_program.fw_cfg_files(ram)
        for name in lengths.keys() - contents.keys():
            contents[name] = files[name.removeprefix("/rom@")].ljust(lengths[name], b"\0")
        assert {name: len(data) for name, data in contents.items()} == lengths
        return contents

    async def passes(self) -> int:
        """How often the guest has gone over its memory."""
        return int.from_bytes(await self.read_memory(guest_program.PASSES, 4), "little")

    async def guest_goes_on(self) -> None:
        """Return when the guest has gone over its memory twice from now on."""
        start = await self.passes()

        async def two_more() -> None:
            while await self.passes() < start + 2:
                pass

        await self.within_deadline(two_more(), "the guest changes its memory")

    async def migrate(self, uri: str) -> None:
        """Begin a migration that can become a post-copy one."""
        # A millisecond of downtime is never enough: the guest keeps more dirty, so that the
        # migration stays in pre-copy until it is told to switch over. The bandwidth keeps the first
        # round above 100 ms: a QEMU 7.2 that has sent all before it has measured the bandwidth
        # looks for no dirty pages and completes. In post-copy it keeps memory missing long enough
        # to be waited for, also where the destination is slow to begin.
        await self.execute(
            "migrate-set-parameters",
            downtime_limit=1,
            max_bandwidth=PRECOPY_BANDWIDTH,
            max_postcopy_bandwidth=POSTCOPY_BANDWIDTH,
        )
        await self.execute("migrate", uri=uri)

    async def start_postcopy(self) -> None:
        """Have the source switch over as soon as it can."""
        await self.execute("migrate-start-postcopy")

    async def precopy_rounds(self, count: int) -> None:
        """Return when the dirty bitmap has been synchronised `count` times."""
        while self._passes < count:
            await self._next_event(f"pre-copy round {count}")

    async def migration_status(self, *wanted: str) -> str:
        """Return when the migration is in one of these states, or was since it began."""
        while not (reached := [status for status in self.statuses if status in wanted]):
            await self._next_event(f"migration status {' or '.join(wanted)}")
        return reached[0]

    async def _next_event(self, what: str) -> None:
        event = await self.within_deadline(self.events.get(), what)
        data = cast(dict[str, Any], event["data"])
        if event["event"] == "MIGRATION":
            self.statuses.append(data["status"])
        else:
            self._passes = data["pass"]


@contextlib.asynccontextmanager
async def running_qemu(
    directory: Path, firmware: Path, accelerator: Accelerator
) -> AsyncIterator[Qemu]:
    """Start QEMU, let its guest go over its memory, and end it at the end."""
    ours, qemus = socket.socketpair()
    command = ["qemu-system-x86_64", "-no-user-config", "-nodefaults", "-display", "none"]
    command += ["-machine", f"q35,accel={accelerator}", "-m", str(guest_program.MEMORY >> 20)]
    command += ["-bios", str(firmware)]
    command += ["-chardev", f"socket,id=qmp,fd={qemus.fileno()}", "-mon", "qmp,mode=control"]
    with open(directory / "qemu.stderr", "wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            pass_fds=[qemus.fileno()],
        )
    qemus.close()
    qmp = QMPClient()
    events = EventListener(names=("MIGRATION", "MIGRATION_PASS"))
    qmp.register_listener(events)
    qemu = Qemu(process, directory, qmp, events)
    try:
        await qemu.within_deadline(qmp.connect(ours), "QMP is up")
        await qemu.execute(
            "migrate-set-capabilities",
            capabilities=[
                {"capability": name, "state": True} for name in ("postcopy-ram", "events")
            ],
        )
        await qemu.guest_goes_on()
        yield qemu
    finally:
        with contextlib.suppress(EOFError, OSError):  # QEMU may have gone already
            await qmp.disconnect()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
