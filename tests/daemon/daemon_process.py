"""A real `postcopyd serve` in a process of its own, and a service manager that it reports to."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self

from postcopyd.cli.control_client import ControlClient
from postcopyd.daemon.config import load
from postcopyd.kernel.open_files import is_same
from postcopyd.kernel.processes import pidfd_open
from tests.support import LIMIT, ROOT, wait_readable, wait_until

_LAST_LINES = 30


class FakeManager:
    """A service manager: hears what it is told, and keeps the descriptors that it is given."""

    def __init__(self, path: Path) -> None:
        self._told: queue.Queue[dict[str, str]] = queue.Queue()
        self.stored: dict[str, int] = {}
        """By name."""
        self._by_file: dict[tuple[int, int], set[str]] = {}
        self._caught_up = threading.Semaphore(0)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def notification(self) -> dict[str, str]:
        """The next one; raises `queue.Empty` if none comes."""
        return self._told.get(timeout=LIMIT)

    def catch_up(self) -> None:
        """Return when everything has been heard that was said before."""
        self._say(b"CAUGHT UP")
        assert self._caught_up.acquire(timeout=LIMIT)

    def _say(self, word: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(word, self._socket.getsockname())

    def _listen(self) -> None:
        while True:
            datagram, ancillary, _, _ = self._socket.recvmsg(
                4096, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
            )
            descriptors = [int.from_bytes(data, sys.byteorder) for _, _, data in ancillary]
            if datagram == b"END":
                return
            if datagram == b"CAUGHT UP":
                self._caught_up.release()
                continue
            told = dict(line.split("=", 1) for line in datagram.decode().splitlines())
            if "FDSTORE" in told:
                assert told["FDPOLL"] == "0" and "/" in told["FDNAME"]
                status = os.fstat(descriptors[0])
                of_file = self._by_file.setdefault((status.st_dev, status.st_ino), set())
                if any(
                    is_same(descriptors[0], self.stored[name])
                    for name in of_file
                    if name in self.stored
                ):
                    os.close(descriptors[0])  # systemd ignores what it has by another name
                else:
                    self.stored[told["FDNAME"]] = descriptors[0]
                    of_file.add(told["FDNAME"])
            elif "FDSTOREREMOVE" in told:
                os.close(self.stored.pop(told["FDNAME"]))
            else:
                self._told.put(told)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._say(b"END")
        self._thread.join(LIMIT)
        self._socket.close()
        for descriptor in self.stored.values():
            os.close(descriptor)


_LAUNCHER = """
import fcntl, os, sys
names, words = sys.argv[1], sys.argv[2:]
command = words[words.index("--") + 1 :]
handed = [int(word) for word in words[: words.index("--")]]
stored = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 500) for descriptor in handed]
for descriptor in handed:
    os.close(descriptor)
for number, descriptor in enumerate(stored, 3):
    os.dup2(descriptor, number)
if stored:
    os.closerange(3 + len(stored), 1000)
    os.environ |= {
        "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(stored)), "LISTEN_FDNAMES": names
    }
os.execv(command[0], command)
"""
"""Hands over what is stored, as systemd does it (sd_listen_fds(3))."""


def _is_at_work(process: int, name: str) -> bool:
    """Tell whether a process is the worker of that name, and its event loop runs."""
    if Path(f"/proc/{process}/comm").read_text().strip() != name:
        return False
    links = [os.readlink(entry) for entry in Path(f"/proc/{process}/fd").iterdir()]
    return "anon_inode:[eventpoll]" in links


class RunningDaemon:
    """The daemon with its sockets in `directory`."""

    def __init__(
        self,
        directory: Path,
        manager: FakeManager,
        log: BinaryIO,
        environment: Mapping[str, str],
        wrapper: tuple[str, ...],
    ) -> None:
        self.directory = directory
        self.control = directory / "control.sock"
        self.handoff = directory / "handoff.sock"
        self.client = ControlClient(str(self.control))
        self.manager = manager
        self._output = log
        self.environment = dict(environment)
        self._wrapper = wrapper
        self.process: subprocess.Popen[bytes]
        """The supervisor."""
        self.number = load(directory / "postcopyd.toml").number_of_workers()
        """Of its workers."""

    @property
    def beside(self) -> tuple[str, ...]:
        """VMMs run as everything else here does."""
        return ()

    def start(self) -> None:
        """Start it with what the service manager has stored, and return when it is ready."""
        self.launch()
        while "READY" not in self.notification():
            assert self.process.poll() is None, self.log
        self.client.list()  # what the event loop opens with its first connection stays open

    def launch(self) -> None:
        """Start it with what the service manager has stored."""
        stored = dict(self.manager.stored)
        self.process = subprocess.Popen(
            [
                *self._wrapper,
                *(sys.executable, "-IS", "-c", _LAUNCHER, ":".join(stored)),
                *map(str, stored.values()),
                *("--", sys.executable, "-m", "postcopyd.cli.postcopyd", "serve", "--config"),
                str(self.directory / "postcopyd.toml"),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "NOTIFY_SOCKET": f"{self.directory}/notify.sock",
                **self.environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            close_fds=not self._wrapper,
            pass_fds=tuple(stored.values()),
        )

    def workers(self) -> list[int]:
        """The processes that it has started."""
        supervisor = self.process.pid
        return [
            int(child)
            for child in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        ]

    @property
    def worker(self) -> int:
        """The process that takes connections, and has the migration if there is only one."""
        return self.nth_worker(0)

    def nth_worker(self, number: int) -> int:
        """The process that is the worker of that number."""
        found: list[int] = []

        def look() -> bool:
            with suppress(OSError):
                name = f"postcopyd-{number}"
                found[:] = [worker for worker in self.workers() if _is_at_work(worker, name)]
            return len(found) == 1

        wait_until(look)
        return found[0]

    def worker_of(self, migration: str) -> int:
        """The process that has the migration."""
        return self.nth_worker(self.client.show(migration)["worker"])

    def kill(self) -> None:
        """End supervisor and workers as the kernel would, and wait until they are gone."""
        try:
            workers = [pidfd_open(worker) for worker in self.workers()]
        except OSError:
            workers = []
        self.process.kill()
        self.process.wait(LIMIT)
        for worker in workers:
            with suppress(OSError):
                signal.pidfd_send_signal(worker, signal.SIGKILL)
            wait_readable(worker)
            os.close(worker)

    def kill_worker(self, number: int = 0) -> None:
        """Kill a worker, and return when another process does its work."""
        worker = self.nth_worker(number)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: self.nth_worker(number) != worker)

    @property
    def log(self) -> str:
        """All that it has logged."""
        return (self.directory / "log").read_text()

    def notification(self) -> dict[str, str]:
        """The next thing that it told its service manager, but for what that is to store."""
        try:
            return self.manager.notification()
        except queue.Empty:
            raise AssertionError(f"no notification came: {self.log}") from None

    def wait_for_status(self, wanted: Callable[[str], bool]) -> str:
        """Return the first status, of those to come, that is `wanted`."""
        while True:
            status = self.notification().get("STATUS", "")
            if wanted(status):
                return status

    def descriptors(self) -> list[str]:
        """What its workers have open, but for the netlink socket that each opens with its first
        stream."""
        netlink = {line.split()[-1] for line in self._network_table("netlink")}
        links = []
        for number in range(self.number):
            for entry in Path(f"/proc/{self.nth_worker(number)}/fd").iterdir():
                with suppress(FileNotFoundError):
                    link = os.readlink(entry)
                    if link.removeprefix("socket:[").removesuffix("]") not in netlink:
                        links.append(link)
        return sorted(links)

    def _network_table(self, name: str) -> list[str]:
        """A table of the network that it is in, which may not be ours."""
        return Path(f"/proc/{self.process.pid}/net/{name}").read_text().splitlines()

    def descriptors_at_rest(self) -> list[str]:
        """What it has open while nobody asks it anything: our last connection is closed there."""
        ends = f" {self.control}"

        def nobody_asks() -> bool:
            return (
                sum(line.endswith(ends) for line in self._network_table("unix")) == 1
            )  # it listens

        wait_until(nobody_asks)
        return self.descriptors()

    def wait_for_descriptors(self, expected: list[str]) -> None:
        """Return when it has these open and no others: our own connection may still be closing."""
        try:
            wait_until(lambda: self.descriptors() == expected)
        except AssertionError:
            assert self.descriptors() == expected  # tells the difference
            raise

    def memory(self, line: str, number: int = 0) -> int:
        """Bytes that a line of a worker's /proc/PID/status tells, such as VmRSS."""
        for entry in Path(f"/proc/{self.nth_worker(number)}/status").read_text().splitlines():
            name, _, value = entry.partition(":")
            if name == line:
                return int(value.split()[0]) << 10
        raise AssertionError(f"there is no {line}")

    def leave(self) -> None:
        """Have it leave everything to the next one, as systemd has it for a restart."""
        self.process.send_signal(signal.SIGUSR1)

    def terminate(self) -> None:
        """Ask it to stop."""
        self.process.send_signal(signal.SIGTERM)

    def ended(self) -> int:
        """Its exit status, once it has ended."""
        return self.process.wait(LIMIT)


def configuration(directory: Path, more: str = "") -> Path:
    """Write a configuration with all sockets in `directory`; `more` goes on top of the tables."""
    path = directory / "postcopyd.toml"
    path.write_text(
        f'control = "{directory}/control.sock"\nhandoff = "{directory}/handoff.sock"\n'
        f'records = "{directory}/records"\n{more}'
    )
    (directory / "records").mkdir(exist_ok=True)
    return path


@contextmanager
def running_daemon(
    directory: Path,
    more: str = "",
    *,
    environment: Mapping[str, str] | None = None,
    wrapper: tuple[str, ...] = (),
) -> Iterator[RunningDaemon]:
    """Start a daemon and return when it is ready; kill it at the end if it has not ended.

    :param more: of the configuration.
    :param wrapper: a command that is to start it.
    """
    configuration(directory, more)
    with FakeManager(directory / "notify.sock") as manager, (directory / "log").open("wb") as log:
        daemon = RunningDaemon(directory, manager, log, environment or {}, wrapper)
        try:
            daemon.start()
            yield daemon
        finally:
            daemon.kill()
            if "PYTEST_CURRENT_TEST" in os.environ:  # shown where the test has failed
                print(*daemon.log.splitlines()[-_LAST_LINES:], sep="\n", file=sys.stderr)
