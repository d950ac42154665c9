"""A QEMU's monitor: a real one, and everything else that may listen at a path."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from postcopyd.vmm.qemu_monitor import MonitorFailure, QemuMonitor
from tests.support import LIMIT

SOON = 0.2
"""Seconds for an answer that does not come."""
_COMMAND = 4096
"""Bytes; one command is shorter, and comes in one piece."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


@contextlib.asynccontextmanager
async def qemu(path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A QEMU without a machine, whose monitor is at `path`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        process = await asyncio.create_subprocess_exec(
            *("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"),
            *("-chardev", f"socket,id=m,fd={listener.fileno()},server=on,wait=off"),
            *("-mon", "m,mode=control"),
            pass_fds=[listener.fileno()],
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def session(path: Path) -> AsyncIterator[QemuMonitor]:
    monitor = await QemuMonitor.connect(str(path), LIMIT)
    try:
        yield monitor
    finally:
        await monitor.close()


@contextlib.contextmanager
def server(path: Path, *answers: bytes, hang_up: bool = False) -> Iterator[None]:
    """A peer that sends one thing, then another for each command, then nothing."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(LIMIT)
            for answer in answers:
                connection.sendall(answer)
                connection.recv(_COMMAND)
            while not hang_up and connection.recv(_COMMAND):
                pass

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(LIMIT)
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


GREETING = b'{"QMP": {"version": {"qemu": {"major": 7}, "package": ""}, "capabilities": []}}\n'
OK = b'{"return": {}}\n'


async def test_a_command_is_answered_and_a_wrong_one_is_refused_by_name(path: Path) -> None:
    async with qemu(path), session(path) as monitor:
        assert (await monitor.execute("query-version", within=LIMIT))["qemu"]["major"] == 7
        assert "7.2" in await monitor.human("info version", within=LIMIT)
        with pytest.raises(MonitorFailure, match=r"QEMU refuses nonsense: .* not been found"):
            await monitor.execute("nonsense", within=LIMIT)


async def test_the_process_that_made_the_socket_is_known(path: Path) -> None:
    async with qemu(path), session(path) as monitor:
        assert monitor.peer_process == os.getpid()


async def test_qemu_gets_a_descriptor_by_name(path: Path) -> None:
    async with qemu(path), session(path) as monitor:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                await monitor.give(theirs.fileno(), "one end", within=LIMIT)
            ours.setblocking(False)
            with pytest.raises(BlockingIOError):
                ours.recv(1)  # QEMU has the other end
            await monitor.execute("closefd", {"fdname": "one end"}, within=LIMIT)
            assert ours.recv(1) == b""


async def test_a_qemu_that_exits_is_told_of(path: Path) -> None:
    async with qemu(path) as process, session(path) as monitor:
        process.kill()
        await process.wait()
        with pytest.raises(MonitorFailure, match="broke off at query-status"):
            await monitor.execute("query-status", within=LIMIT)
        with pytest.raises(MonitorFailure):
            await monitor.give(0, "standard input", within=LIMIT)


async def test_a_monitor_that_another_client_holds_is_told_of(path: Path) -> None:
    async with qemu(path), session(path):
        with pytest.raises(MonitorFailure, match=r"Another client may hold this monitor: .*-qmp"):
            await QemuMonitor.connect(str(path), SOON)


@pytest.mark.usefixtures("assert_nothing_left")
async def test_so_is_one_for_which_others_wait_already(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
        listener.bind(str(path))
        listener.listen(0)
        while True:
            other = waiting.enter_context(socket.socket(socket.AF_UNIX))
            other.setblocking(False)
            if other.connect_ex(str(path)) == errno.EAGAIN:
                break
        with pytest.raises(MonitorFailure, match=r"Another client may hold this monitor: .*-qmp"):
            await QemuMonitor.connect(str(path), SOON)


@pytest.mark.usefixtures("assert_nothing_left")
@pytest.mark.parametrize(
    ("greeting", "complaint"),
    [
        (b"220 mail\r\n", "does not speak QMP: Did not understand Greeting"),
        (b'{"hello": 1}\n', "does not speak QMP: Did not understand Greeting"),
        (b"[]\n", "does not speak QMP: Did not understand Greeting"),
        (GREETING + b'{"error": {"class": "GenericError", "desc": "no"}}\n', "does not speak QMP"),
        (b"", "no greeting within"),
    ],
    ids=["text", "other JSON", "a list", "no negotiation", "silence"],
)
async def test_what_does_not_speak_qmp_is_refused(
    path: Path, greeting: bytes, complaint: str
) -> None:
    with server(path, greeting), pytest.raises(MonitorFailure, match=complaint) as refusal:
        await QemuMonitor.connect(str(path), SOON)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


async def test_a_peer_that_hangs_up_is_told_of(path: Path) -> None:
    with server(path, hang_up=True), pytest.raises(MonitorFailure, match="it has hung up"):
        await QemuMonitor.connect(str(path), LIMIT)


async def test_a_qemu_that_goes_silent_is_told_of(path: Path) -> None:
    with server(path, GREETING, OK, b""):
        async with session(path) as monitor:
            with pytest.raises(MonitorFailure, match="has not answered query-status within"):
                await monitor.execute("query-status", within=SOON)


@pytest.mark.parametrize("kind", ["nothing", "file", "directory", "a path that is too long"])
async def test_what_is_no_socket_is_refused(tmp_path: Path, kind: str) -> None:
    place = tmp_path / (kind if kind != "a path that is too long" else "x" * 200)
    if kind == "file":
        place.write_bytes(b"")
    elif kind == "directory":
        place.mkdir()
    with pytest.raises(MonitorFailure, match=str(place)):
        await QemuMonitor.connect(str(place), LIMIT)


async def test_it_is_closed_twice_without_harm(path: Path) -> None:
    async with qemu(path):
        monitor = await QemuMonitor.connect(str(path), LIMIT)
        await monitor.close()
        await monitor.close()
        with pytest.raises(MonitorFailure):
            await monitor.execute("query-status", within=LIMIT)
