"""The protocol of sd_notify, against a datagram socket that takes systemd's place."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from postcopyd.daemon.notify import ServiceManager
from tests.support import LIMIT, belongings


def a_path(directory: Path) -> str:
    return str(directory / "notify")


def an_abstract_name(directory: Path) -> str:
    return f"\0postcopyd-test-{os.getpid()}"


@pytest.fixture(params=[a_path, an_abstract_name])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    address: Callable[[Path], str] = request.param
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address(tmp_path))
        listener.settimeout(10)
        yield listener


def environment_of(systemd: socket.socket) -> dict[str, str]:
    name = systemd.getsockname()
    return {"NOTIFY_SOCKET": "@" + name[1:].decode() if isinstance(name, bytes) else name}


async def test_what_is_told_arrives(systemd: socket.socket) -> None:
    before = belongings()
    manager = ServiceManager(environment_of(systemd))
    manager.ready("up")
    manager.status("one migration")
    manager.stopping("going down")
    manager.close()
    assert systemd.recv(4096) == b"READY=1\nSTATUS=up"
    assert systemd.recv(4096) == b"STATUS=one migration"
    assert systemd.recv(4096) == b"STOPPING=1\nSTATUS=going down"
    assert belongings() == before


async def test_reading_anew_is_told_with_its_time(systemd: socket.socket) -> None:
    manager = ServiceManager(environment_of(systemd))
    manager.ready("up")
    before = time.monotonic_ns() // 1000
    manager.reloading()
    manager.reloaded()
    manager.close()
    assert systemd.recv(4096) == b"READY=1\nSTATUS=up"
    first, second = systemd.recv(4096).decode().splitlines()
    assert first == "RELOADING=1"
    name, _, microseconds = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(microseconds) <= time.monotonic_ns() // 1000
    assert systemd.recv(4096) == b"READY=1\nSTATUS=up"


async def test_the_same_status_is_told_once(systemd: socket.socket) -> None:
    manager = ServiceManager(environment_of(systemd))
    manager.status("a")
    manager.status("a")
    manager.status("b")
    manager.close()
    assert [systemd.recv(4096) for _ in range(2)] == [b"STATUS=a", b"STATUS=b"]


async def test_the_watchdog_is_fed_twice_as_often_as_asked(systemd: socket.socket) -> None:
    environment = environment_of(systemd) | {
        "WATCHDOG_USEC": "200000",
        "WATCHDOG_PID": str(os.getpid()),
    }
    manager = ServiceManager(environment)
    systemd.setblocking(False)
    loop = asyncio.get_running_loop()
    manager.ready("up")
    assert await loop.sock_recv(systemd, 4096) == b"READY=1\nSTATUS=up"
    times = []
    for _ in range(4):
        assert await asyncio.wait_for(loop.sock_recv(systemd, 4096), 10) == b"WATCHDOG=1"
        times.append(loop.time())
    manager.close()
    assert all(later - earlier > 0.05 for earlier, later in pairwise(times))
    assert times[-1] - times[0] >= 0.29


@pytest.mark.parametrize(
    "watchdog",
    [{"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}, {}],
    ids=["off", "of another process", "none"],
)
async def test_a_watchdog_that_is_not_ours_is_left_alone(
    systemd: socket.socket, watchdog: dict[str, str]
) -> None:
    manager = ServiceManager(environment_of(systemd) | watchdog)
    manager.ready("up")
    manager.stopping("down")
    manager.close()
    assert systemd.recv(4096).startswith(b"READY=1")
    assert systemd.recv(4096).startswith(b"STOPPING=1")


async def test_no_child_process_can_speak_in_our_name(systemd: socket.socket) -> None:
    environment = environment_of(systemd) | {
        "WATCHDOG_USEC": "1",
        "WATCHDOG_PID": "1",
        "PATH": "/bin",
    }
    ServiceManager(environment).close()
    assert environment == {"PATH": "/bin"}


@pytest.mark.parametrize("name", ["", "relative", "/no/such/socket"])
async def test_a_manager_that_is_not_there_is_no_matter(name: str) -> None:
    before = belongings()
    manager = ServiceManager({"NOTIFY_SOCKET": name})
    manager.ready("up")
    manager.stopping("down")
    manager.close()
    manager.close()
    assert belongings() == before


async def test_what_is_to_be_kept_waits_for_a_manager_that_has_much_to_read(
    systemd: socket.socket,
) -> None:
    manager = ServiceManager(environment_of(systemd))
    count = 500  # more than a datagram socket takes
    reading, writing = os.pipe()
    for number in range(count):
        manager.store(f"vm0/{number}", os.dup(reading))
    manager.unstore("vm0/0")
    manager.ready("up")
    os.close(reading)
    os.close(writing)

    def hear() -> list[bytes]:
        heard: list[bytes] = []
        while not heard or not heard[-1].startswith(b"READY=1"):
            datagram, ancillary, _, _ = systemd.recvmsg(4096, socket.CMSG_SPACE(4))
            heard.append(datagram)
            for _, _, descriptor in ancillary:
                os.close(int.from_bytes(descriptor, sys.byteorder))
        return heard

    heard = await asyncio.to_thread(hear)
    assert heard == [
        *(f"FDSTORE=1\nFDNAME=vm0/{number}\nFDPOLL=0".encode() for number in range(count)),
        b"FDSTOREREMOVE=1\nFDNAME=vm0/0",
        b"READY=1\nSTATUS=up",
    ]
    manager.close()


async def test_what_is_to_be_kept_waits_while_too_many_descriptors_are_on_their_way(
    systemd: socket.socket,
) -> None:
    """Those that nobody has received yet count as open files of the user who has sent them."""
    manager = ServiceManager(environment_of(systemd))
    reading, writing = os.pipe()
    copies = [os.dup(reading) for _ in range(10)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    user = os.geteuid()
    resource.setrlimit(resource.RLIMIT_NOFILE, (5, hard))
    os.seteuid(65534)
    try:
        for number, copy in enumerate(copies):
            manager.store(f"vm0/{number}", copy)
        over = asyncio.Event()
        manager.when_told(over.set)
        assert not over.is_set()
    finally:
        os.seteuid(user)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    async with asyncio.timeout(LIMIT):
        await over.wait()
    for number in range(len(copies)):
        datagram, ancillary, _, _ = systemd.recvmsg(4096, socket.CMSG_SPACE(4))
        assert datagram == f"FDSTORE=1\nFDNAME=vm0/{number}\nFDPOLL=0".encode()
        os.close(int.from_bytes(ancillary[0][2], sys.byteorder))
    os.close(reading)
    os.close(writing)
    manager.close()


async def test_who_asks_hears_when_everything_before_has_been_told(systemd: socket.socket) -> None:
    manager = ServiceManager(environment_of(systemd))
    told: list[str] = []
    manager.when_told(lambda: told.append("nothing was to be told"))
    assert told == ["nothing was to be told"]
    for number in range(2000):
        manager.unstore(f"vm0/{number}")
    manager.when_told(lambda: told.append("all"))
    manager.unstore("vm0/last")
    assert len(told) == 1, "systemd has not read anything yet"

    def read() -> None:
        while systemd.recv(4096) != b"FDSTOREREMOVE=1\nFDNAME=vm0/last":
            pass

    await asyncio.to_thread(read)
    assert told[1:] == ["all"]
    manager.close()


async def test_the_last_status_is_told_however_much_there_was_to_read(
    systemd: socket.socket,
) -> None:
    manager = ServiceManager(environment_of(systemd))
    for number in range(2000):
        manager.unstore(f"vm0/{number}")
        manager.status(f"{number} have gone")

    def read() -> list[bytes]:
        heard = [systemd.recv(4096)]
        while heard[-1] != b"STATUS=1999 have gone":
            heard.append(systemd.recv(4096))
        return heard

    heard = await asyncio.to_thread(read)
    assert [said for said in heard if said.startswith(b"FDSTOREREMOVE")] == [
        f"FDSTOREREMOVE=1\nFDNAME=vm0/{number}".encode() for number in range(2000)
    ]
    await manager.told()
    manager.close()
