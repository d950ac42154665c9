"""A QEMU that was being fed when postcopyd was killed: is it the guest, or will it never be?"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from postcopyd.incoming.vmm import DeviceLoad, VmmFailure
from postcopyd.kernel.processes import pidfd_open
from postcopyd.vmm.qemu import QemuVmm
from postcopyd.vmm.qemu_feed import FeedFailure
from postcopyd.vmm.qemu_memory import FoundMemory
from tests.support import LIMIT, ROOT

SOON = 0.2
"""Seconds for an answer that does not come."""
COMMAND = 4096
"""Bytes; a command is shorter, and comes in one piece."""
RESUME = {"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 0}}
GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}


@pytest.fixture
def unheard() -> list[str | None]:
    """What was told of a monitor that does not answer."""
    return []


@pytest.fixture
async def load(unheard: list[str | None]) -> DeviceLoad:
    return DeviceLoad(b"", b"", (), asyncio.Event(), unheard.append, print)


@pytest.fixture
async def vmm(tmp_path: Path) -> AsyncIterator[QemuVmm]:
    """What a successor has of a QEMU; its process is this one."""
    pidfd = pidfd_open(os.getpid())
    process: Any = SimpleNamespace(
        pid=os.getpid(), pidfd=pidfd, userfaultfd=None, close=lambda: os.close(pidfd)
    )
    vmm = QemuVmm(
        cast(Any, None), str(tmp_path / "qmp"), SOON, process, FoundMemory((), ()), ExitStack()
    )
    yield vmm
    vmm.close()


@contextlib.asynccontextmanager
async def monitor(
    path: Path, silent: int, answers: list[tuple[str, object]], *, resumed: bool = False
) -> AsyncIterator[Callable[[], None]]:
    """A monitor that first says nothing to so many clients, and then how it stands.

    What it yields breaks off all sessions.

    :param answers: the status of the migration and of the machine; the last one for ever. With
        none, what is asked is never answered.
    :param resumed: whether it says in each session that its guest runs.
    """
    left = silent
    sessions: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        sessions.append(writer)
        migration: str
        machine: object
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            if left:
                left -= 1
                await reader.read()
                return
            writer.write(json.dumps(GREETING).encode() + b"\n")
            while command := await reader.read(COMMAND):
                request = json.loads(command)
                told: dict[str, object] = {}
                if request["execute"] == "qmp_capabilities":
                    migration, machine = "", ""
                elif not answers:
                    continue
                else:
                    migration, machine = answers[0]
                if request["execute"] == "query-migrate":
                    told = {"status": migration} if migration else {}
                elif request["execute"] == "query-status":
                    told = {"status": machine}
                    del answers[: len(answers) > 1]
                answer = {"return": told} | {key: request[key] for key in request if key == "id"}
                writer.write(json.dumps(answer).encode() + b"\n")
                if request["execute"] == "qmp_capabilities" and resumed:
                    writer.write(json.dumps(RESUME).encode() + b"\n")

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
    answers: list[tuple[str, object]]
    answers = [("setup", "inmigrate"), ("active", "inmigrate"), ("active", machine)]
    async with monitor(tmp_path / "qmp", 0, answers):
        await asyncio.wait_for(vmm.run(load), LIMIT)
        await vmm._close_monitor()
    assert answers == [("active", machine)]


@pytest.mark.parametrize("migration", ["failed", ""])
async def test_a_qemu_that_loads_no_more_is_of_no_use(
    vmm: QemuVmm, load: DeviceLoad, tmp_path: Path, migration: str
) -> None:
    answers: list[tuple[str, object]] = [("active", "inmigrate"), (migration, "inmigrate")]
    async with monitor(tmp_path / "qmp", 0, answers):
        with pytest.raises(VmmFailure, match="was killed while it fed QEMU") as failure:
            await asyncio.wait_for(vmm.run(load), LIMIT)
        assert not failure.value.may_have_run
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


async def test_an_answer_that_qemu_never_gives_tells_nothing(
    vmm: QemuVmm, load: DeviceLoad, tmp_path: Path, unheard: list[str | None]
) -> None:
    answers: list[tuple[str, object]] = [("completed", 7)]
    async with asyncio.timeout(LIMIT), monitor(tmp_path / "qmp", 0, answers):
        running = asyncio.create_task(vmm.run(load))
        while not unheard:
            await asyncio.sleep(0.01)
        assert "answers what it never does" in (unheard[0] or "")
        answers[:] = [("completed", "running")]
        await running
        await vmm._close_monitor()


ANOTHER = """
import asyncio, pathlib, sys
from tests.vmm.test_qemu_fed import monitor

async def main():
    async with monitor(pathlib.Path(sys.argv[1]), 0, [("failed", "inmigrate")]):
        print("it answers", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


async def test_what_another_process_says_at_its_monitors_path_tells_nothing(
    vmm: QemuVmm, load: DeviceLoad, tmp_path: Path, unheard: list[str | None]
) -> None:
    """Such as that of a QEMU that somebody has started with the same options meanwhile."""
    path = tmp_path / "qmp"
    with subprocess.Popen(
        [sys.executable, "-c", ANOTHER, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as another:
        assert another.stdin is not None and another.stdout is not None
        await asyncio.to_thread(another.stdout.readline)
        running = asyncio.create_task(vmm.run(load))
        async with asyncio.timeout(LIMIT):
            while not unheard:
                await asyncio.sleep(0.01)
        assert unheard == [f"{path} is the monitor of another process now"]
        another.stdin.close()
    path.unlink()
    async with monitor(path, 0, [("completed", "running")]):
        await asyncio.wait_for(running, LIMIT)
        await vmm._close_monitor()


class Fed:
    """A feed that QEMU has taken whole."""

    def __init__(self, failure: str = "") -> None:
        self._failure = failure

    async def load(self, *_: object, keep_process: bool) -> None:
        if self._failure:
            raise FeedFailure(self._failure)

    def close(self) -> None:
        pass


def feed(vmm: QemuVmm, failure: str = "") -> None:
    """Have this process have fed it."""
    vmm._feed = cast(Any, Fed(failure))
    vmm._facts = cast(Any, SimpleNamespace(version=(10, 0, 0)))


@pytest.mark.parametrize("by", ["a predecessor", "this process"])
async def test_a_qemu_whose_session_breaks_is_asked_in_another_one(
    vmm: QemuVmm, load: DeviceLoad, tmp_path: Path, unheard: list[str | None], by: str
) -> None:
    if by == "this process":
        feed(vmm)
    answers: list[tuple[str, object]] = [("setup", "inmigrate"), ("active", "inmigrate")]
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


@pytest.mark.parametrize("by", ["a predecessor", "this process"])
async def test_a_qemu_that_exits_before_it_has_answered_may_have_run(
    vmm: QemuVmm, load: DeviceLoad, tmp_path: Path, by: str
) -> None:
    if by == "this process":
        feed(vmm)
    async with monitor(tmp_path / "qmp", 0, []):
        running = asyncio.create_task(vmm.run(load))
        async with asyncio.timeout(LIMIT):
            while vmm._session is None:
                await asyncio.sleep(0.01)
        gone = asyncio.create_task(vmm.gone())
        vmm._exited()
        with pytest.raises(VmmFailure, match="not said that it runs; it has exited") as failure:
            await asyncio.wait_for(running, LIMIT)
        assert failure.value.may_have_run
        await asyncio.wait_for(gone, LIMIT)
        await vmm._close_monitor()


@pytest.mark.parametrize("resumed", [False, True], ids=["it has not said so", "it has said so"])
async def test_a_qemu_that_breaks_off_its_feed_may_have_run_only_if_it_has_said_so(
    vmm: QemuVmm, load: DeviceLoad, tmp_path: Path, resumed: bool
) -> None:
    """It says so before its processors run, and in the session in which it was fed."""
    feed(vmm, "it has closed its incoming channel")
    async with monitor(tmp_path / "qmp", 0, [("failed", "inmigrate")], resumed=resumed):
        await vmm._monitor()
        vmm._loop.call_later(SOON, vmm._exited)
        with pytest.raises(VmmFailure, match="its incoming channel; it has exited") as failure:
            await asyncio.wait_for(vmm.run(load), LIMIT)
        assert failure.value.may_have_run == resumed
        await vmm._close_monitor()
