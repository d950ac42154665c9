"""A QEMU that was being fed when postcopyd was killed: is it the guest, or will it never be?"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from postcopyd.incoming.vmm import DeviceLoad, VmmFailure
from postcopyd.kernel.processes import pidfd_open
from postcopyd.vmm.qemu import QemuVmm
from postcopyd.vmm.qemu_memory import FoundMemory
from tests.support import LIMIT

SOON = 0.2
"""Seconds for an answer that does not come."""
COMMAND = 4096
"""Bytes; a command is shorter, and comes in one piece."""
GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}


@pytest.fixture
def unheard() -> list[str | None]:
    """What was told of a monitor that does not answer."""
    return []


@pytest.fixture
async def load(unheard: list[str | None]) -> DeviceLoad:
    return DeviceLoad(b"", b"", (), asyncio.Event(), unheard.append)


@pytest.fixture
async def vmm(tmp_path: Path) -> AsyncIterator[QemuVmm]:
    """What a successor has of a QEMU; its process is this one."""
    pidfd = pidfd_open(os.getpid())
    process: Any = SimpleNamespace(pidfd=pidfd, userfaultfd=None, close=lambda: os.close(pidfd))
    vmm = QemuVmm(
        cast(Any, None), str(tmp_path / "qmp"), SOON, process, FoundMemory((), ()), ExitStack()
    )
    yield vmm
    vmm.close()


@contextlib.asynccontextmanager
async def monitor(
    path: Path, silent: int, answers: list[tuple[str, str]]
) -> AsyncIterator[Callable[[], None]]:
    """A monitor that first says nothing to so many clients, and then how it stands.

    What it yields breaks off all sessions.

    :param answers: the status of the migration and of the machine; the last one for ever.
    """
    left = silent
    sessions: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        sessions.append(writer)
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            if left:
                left -= 1
                await reader.read()
                return
            writer.write(json.dumps(GREETING).encode() + b"\n")
            while command := await reader.read(COMMAND):
                request = json.loads(command)
                migration, machine = answers[0]
                told: dict[str, object] = {}
                if request["execute"] == "query-migrate":
                    told = {"status": migration} if migration else {}
                elif request["execute"] == "query-status":
                    told = {"status": machine}
                    del answers[: len(answers) > 1]
                answer = {"return": told} | {key: request[key] for key in request if key == "id"}
                writer.write(json.dumps(answer).encode() + b"\n")

    server = await asyncio.start_unix_server(serve, path)

    def break_off() -> None:
        for writer in sessions:
            writer.close()

    try:
        yield break_off
    finally:
        server.close()


async def test_a_qemu_that_does_not_answer_for_a_while_is_the_guest_when_it_runs(
    vmm: QemuVmm, load: DeviceLoad, tmp_path: Path
) -> None:
    async with monitor(tmp_path / "qmp", 2, [("completed", "running")]):
        await asyncio.wait_for(vmm.run(load), LIMIT)
        await vmm._close_monitor()


@pytest.mark.parametrize("machine", ["running", "paused"])
async def test_a_qemu_that_still_loads_is_waited_for(
    vmm: QemuVmm, load: DeviceLoad, tmp_path: Path, machine: str
) -> None:
    answers = [("setup", "inmigrate"), ("active", "inmigrate"), ("active", machine)]
    async with monitor(tmp_path / "qmp", 0, answers):
        await asyncio.wait_for(vmm.run(load), LIMIT)
        await vmm._close_monitor()
    assert answers == [("active", machine)]


@pytest.mark.parametrize("migration", ["failed", ""])
async def test_a_qemu_that_loads_no_more_is_of_no_use(
    vmm: QemuVmm, load: DeviceLoad, tmp_path: Path, migration: str
) -> None:
    answers = [("active", "inmigrate"), (migration, "inmigrate")]
    async with monitor(tmp_path / "qmp", 0, answers):
        with pytest.raises(VmmFailure, match="was killed while it fed QEMU"):
            await asyncio.wait_for(vmm.run(load), LIMIT)
        await vmm._close_monitor()


async def test_a_qemu_whose_monitor_has_gone_is_waited_for_as_long_as_it_lives(
    vmm: QemuVmm, load: DeviceLoad, tmp_path: Path, unheard: list[str | None]
) -> None:
    """It may be the guest, and nobody else must be given that. Why that is not known is told."""
    running = asyncio.create_task(vmm.run(load))
    async with asyncio.timeout(LIMIT):
        while not unheard:
            await asyncio.sleep(0.01)
    assert unheard == [f"{tmp_path / 'qmp'}: No such file or directory"]
    async with monitor(tmp_path / "qmp", 0, [("completed", "running")]):
        await asyncio.wait_for(running, LIMIT)
        await vmm._close_monitor()
    assert unheard[1:] == [None]


class Fed:
    """A feed that QEMU has taken whole."""

    async def load(self, *_: object, keep_process: bool) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("by", ["a predecessor", "this process"])
async def test_a_qemu_whose_session_breaks_is_asked_in_another_one(
    vmm: QemuVmm, load: DeviceLoad, tmp_path: Path, unheard: list[str | None], by: str
) -> None:
    if by == "this process":
        vmm._feed, vmm._facts = cast(Any, Fed()), cast(Any, SimpleNamespace(version=(10, 0, 0)))
    answers = [("setup", "inmigrate"), ("active", "inmigrate")]
    async with asyncio.timeout(LIMIT):
        async with monitor(tmp_path / "qmp", 0, answers) as break_off:
            running = asyncio.create_task(vmm.run(load))
            while len(answers) > 1:
                await asyncio.sleep(0.01)
            break_off()
        (tmp_path / "qmp").unlink()
        async with monitor(tmp_path / "qmp", 0, [("completed", "paused")]):
            await running
            await vmm._close_monitor()
    assert not unheard or unheard[-1] is None


async def test_a_qemu_that_was_fed_and_has_exited_since_is_of_no_use(
    vmm: QemuVmm, load: DeviceLoad
) -> None:
    vmm._feed, vmm._facts = cast(Any, Fed()), cast(Any, SimpleNamespace(version=(10, 0, 0)))
    vmm._exited()
    with pytest.raises(VmmFailure, match="it does not run; it has exited"):
        await asyncio.wait_for(vmm.run(load), LIMIT)


async def test_a_qemu_that_has_exited_is_of_no_use(vmm: QemuVmm, load: DeviceLoad) -> None:
    vmm._exited()
    with pytest.raises(VmmFailure, match="was killed while it fed QEMU"):
        await asyncio.wait_for(vmm.run(load), LIMIT)
