"""A whole migration during which processes of the daemon are killed, and what must come of it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from postcopyd.cli.control_client import ControlError
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.whole_migration import (
    DEVICE_STATE,
    PAGE,
    Guest,
    Image,
    assert_sent,
    running_guest,
)
from tests.support import LIMIT, wait_readable, wait_until
from tests.torture.checker_vmm import STAMP, stamp
from tests.torture.kills import Victim

Kind = Literal["memory-file", "anonymous"]
KINDS: tuple[Kind, ...] = ("memory-file", "anonymous")

_BANDWIDTH = "16M"
_SETTINGS = "[timeouts]\nclose = 1\n"
"""A source that has gone without a word may come back for so long; most of these have gone."""
_OWN = {"/control", "/handoff"}
"""What the service manager keeps when there is no migration."""
_LAST_LINES = 30


class Restarter:
    """Starts the daemon again whenever it has died, as ``Restart=on-failure`` does.

    And as systemd does it, not before all of its processes have gone.
    """

    def __init__(self, daemon: RunningDaemon) -> None:
        self._daemon = daemon
        self._over = threading.Event()
        self._launching = threading.Lock()
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        daemon = self._daemon
        while True:
            status = daemon.process.wait()
            if self._over.is_set():
                return
            if status >= 0:
                self.failure = f"the daemon has ended by itself, with status {status}"
                return
            try:
                wait_until(lambda: not processes_of(daemon))
                daemon.manager.catch_up()
            except AssertionError as error:
                self.failure = f"a process of the daemon has outlived it: {error}"
                return
            with self._launching:
                if not self._over.is_set():
                    daemon.launch()

    def stop(self) -> None:
        """Do that no more."""
        with self._launching:
            self._over.set()


def processes_of(daemon: RunningDaemon) -> list[int]:
    """All processes of the daemon, also those whose parent has died."""
    mark = _mark(daemon.directory)
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return sorted(found)


def _mark(directory: Path) -> bytes:
    return f"POSTCOPYD_TEST={directory}".encode()


def kill(daemon: RunningDaemon, victim: Victim) -> None:
    """Kill from outside, what there is of it at this instant."""
    supervisor = daemon.process.pid
    workers = [process for process in processes_of(daemon) if process != supervisor]
    workers = sorted(workers, key=lambda process: not _has_the_migration(process))[:1]
    victims = {"worker": workers, "supervisor": [supervisor], "both": [supervisor, *workers]}
    for process in victims[victim]:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@contextmanager
def restarted_daemon(directory: Path, environment: Mapping[str, str]) -> Iterator[RunningDaemon]:
    """Run a daemon that is started again when it is killed, and see that it leaves nothing.

    :param environment: in which its kills may be.
    """
    name, _, value = _mark(directory).decode().partition("=")
    marked = {name: value, **environment}
    with running_daemon(directory, _SETTINGS, environment=marked) as daemon:
        # As it is in all of a daemon's life but its first second.
        wait_until(lambda: any(map(_is_spare, daemon.workers())))
        restarter = Restarter(daemon)
        try:
            yield daemon
            wait_until(lambda: set(daemon.manager.stored) == _OWN)
            wait_until(lambda: _answers(daemon))
        except (AssertionError, ValueError, subprocess.TimeoutExpired) as error:
            raise AssertionError(
                f"{error or 'wrong'}; {restarter.failure}; kept: {sorted(daemon.manager.stored)}\n"
                f"{_last_lines(daemon)}"
            ) from error
        finally:
            restarter.stop()
        daemon.terminate()
        assert daemon.ended() == 0, _last_lines(daemon)
        wait_until(lambda: not processes_of(daemon))
        daemon.manager.catch_up()
        assert not daemon.manager.stored
        assert not daemon.control.exists() and not daemon.handoff.exists()
        assert "Traceback" not in daemon.log, daemon.log


def migrate(
    directory: Path,
    kind: Kind,
    environment: Mapping[str, str],
    during: Callable[[RunningDaemon], None] = lambda _: None,
) -> float:
    """Move a guest through a daemon whose processes are killed; see that all is well at the end.

    :param environment: of the daemon, in which its kills may be.
    :param during: kills, where nobody else does; called in a thread when the guest was started.
    :return: seconds that the guest's longest access to its memory took.
    """
    image = Image(directory / "image", seed=8)
    with (
        restarted_daemon(directory, environment) as daemon,
        running_guest(daemon, "vm0", kind, "tests.torture.checker_vmm") as guest,
    ):
        killing = threading.Thread(target=during, args=(daemon,))
        killing.start()
        try:
            longest = _send(image, guest)
        finally:
            killing.join(LIMIT)
        _check(image, guest)
        return longest


def _send(image: Image, guest: Guest) -> float:
    """Send the image to the guest, which must have it unchanged; return its longest access."""
    (listen,) = _says(guest)["listen"]
    source = image.start_sending(listen, "--max-bandwidth", _BANDWIDTH)
    try:
        assert_sent(source)
    finally:
        source.kill()
    end = _says(guest)
    longest: float = end.pop("longest", 0.0)
    assert end == {"complete": True, "changed": 0}, end
    return longest


def _says(guest: Guest) -> dict[str, Any]:
    assert guest.process.stdout is not None
    wait_readable(guest.process.stdout.fileno())
    return guest.says()


def _check(image: Image, guest: Guest) -> None:
    """Compare the guest's memory with what was sent, and with what it has written itself."""
    assert guest.process.wait(LIMIT) == 0
    assert guest.device_state() == DEVICE_STATE
    memory = guest.memory()
    number = 0
    for name, content in image.memory.items():
        for offset in range(0, len(content), PAGE):
            wanted = stamp(number) + content[offset + STAMP : offset + PAGE]
            assert memory[name][offset : offset + PAGE] == wanted, f"{name} at {offset:#x} is wrong"
            number += 1


def _has_the_migration(process: int) -> bool:
    """Tell whether it is the worker that has the only migration: the first one."""
    try:
        return Path(f"/proc/{process}/comm").read_text() == "postcopyd-0\n"
    except OSError:
        return False


def _is_spare(process: int) -> bool:
    """Tell whether a worker is ready to take over: it waits in poll(2), where others have epoll."""
    try:
        return Path(f"/proc/{process}/wchan").read_text().startswith("poll_schedule_timeout")
    except OSError:
        return False


def _answers(daemon: RunningDaemon) -> bool:
    try:
        return daemon.client.list() is not None
    except ControlError:
        return False


def _last_lines(daemon: RunningDaemon) -> str:
    return "\n".join(daemon.log.splitlines()[-_LAST_LINES:])
