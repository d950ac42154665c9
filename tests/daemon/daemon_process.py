"""A real `postcopyd serve` in a process of its own, and a service manager that it reports to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from postcopyd.cli.control_client import ControlClient
from tests.support import LIMIT, ROOT, wait_until


class RunningDaemon:
    """The daemon with its sockets in `directory`."""

    def __init__(
        self, directory: Path, process: subprocess.Popen[bytes], notified: socket.socket
    ) -> None:
        self.directory = directory
        self.process = process
        self.control = directory / "control.sock"
        self.handoff = directory / "handoff.sock"
        self.client = ControlClient(str(self.control))
        self._notified = notified

    @property
    def log(self) -> str:
        """All that it has logged."""
        return (self.directory / "log").read_text()

    def notification(self) -> dict[str, str]:
        """The next datagram that it sent to its service manager."""
        try:
            datagram = self._notified.recv(4096).decode()
        except TimeoutError:
            raise AssertionError(f"no notification came: {self.log}") from None
        return dict(line.split("=", 1) for line in datagram.splitlines())

    def wait_for_status(self, wanted: Callable[[str], bool]) -> str:
        """Return the first status, of those to come, that is `wanted`."""
        while True:
            status = self.notification().get("STATUS", "")
            if wanted(status):
                return status

    def descriptors(self) -> list[str]:
        """What it has open."""
        links = []
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                links.append(os.readlink(entry))
        return sorted(links)

    def wait_for_descriptors(self, expected: list[str]) -> None:
        """Return when it has these open and no others: our own connection may still be closing."""
        try:
            wait_until(lambda: self.descriptors() == expected)
        except AssertionError:
            assert self.descriptors() == expected  # tells the difference
            raise

    def memory(self, line: str) -> int:
        """Bytes that a line of its /proc/PID/status tells, such as VmRSS."""
        for entry in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            name, _, value = entry.partition(":")
            if name == line:
                return int(value.split()[0]) << 10
        raise AssertionError(f"there is no {line}")

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
        f'control = "{directory}/control.sock"\nhandoff = "{directory}/handoff.sock"\n{more}'
    )
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
    path = configuration(directory, more)
    command = [sys.executable, "-m", "postcopyd.cli.postcopyd", "serve", "--config", str(path)]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
        (directory / "log").open("wb") as log,
    ):
        notified.bind(str(directory / "notify.sock"))
        notified.settimeout(LIMIT)
        process = subprocess.Popen(
            [*wrapper, *command],
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": f"{directory}/notify.sock", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            close_fds=not wrapper,
        )
        daemon = RunningDaemon(directory, process, notified)
        try:
            assert daemon.notification()["READY"] == "1", daemon.log
            daemon.client.list()  # what the event loop opens with its first connection stays open
            yield daemon
        finally:
            process.kill()
            process.wait(LIMIT)
