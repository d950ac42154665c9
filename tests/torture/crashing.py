"""A whole migration during which processes of the daemon are killed, and what must come of it."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
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
from tests.torture.course import Course
from tests.torture.kills import Point, arm, assert_killed, happened, package_came
from tests.torture.victims import Kill, Victim

Kind = Literal["memory-file", "anonymous"]
KINDS: tuple[Kind, ...] = ("memory-file", "anonymous")

_SETTINGS = "workers = 2\n[timeouts]\nclose = 1\n"
"""One worker has nothing to do with what happens. A source that has gone without a word may come
back for so long; most of these have gone."""
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


@dataclass(frozen=True)
class Pace:
    """How long a guest takes to live through its migration: about as long as its source does."""

    bandwidth: str
    work: float
    """Seconds from one access of a guest's thread to the next."""


USUAL = Pace("16M", 0.0005)
SLOW = Pace("3M", 0.003)


@dataclass
class Moments:
    """What whoever kills from outside may wait for. Set when it has come, or never will."""

    ran: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)


def migrate(
    directory: Path,
    kind: Kind,
    kills: Sequence[tuple[Point, Victim | None]] = (),
    during: Callable[[RunningDaemon, Moments], list[Kill]] = lambda *_: [],
    pace: Pace = USUAL,
) -> Course:
    """Move a guest through a daemon whose processes are killed; see that all is well at the end.

    :param kills: which the daemon carries out by itself.
    :param during: more kills; called in a thread when the guest was started, returns what it did.
    """
    image = Image(directory / "image", seed=8)
    moments = Moments()
    with (
        restarted_daemon(directory, arm(directory, kills)) as daemon,
        running_guest(daemon, "vm0", kind, "tests.torture.checker_vmm", str(pace.work)) as guest,
        ThreadPoolExecutor(1) as killer,
    ):
        killing = killer.submit(during, daemon, moments)
        try:
            times = _send(image, guest, moments, pace)
        finally:
            moments.ran.set()
            moments.ended.set()
            killed = killing.result(LIMIT)
        check_memory(image, guest)
        by_itself = happened(directory)
        assert_killed(kills, by_itself)
        for kill in (*by_itself, *killed):
            for victim in kill.victims:
                wait_until(lambda victim=victim: not victim.lives())  # type: ignore[misc]
        return Course(package_came(directory), *times, (*by_itself, *killed))


def _send(image: Image, guest: Guest, moments: Moments, pace: Pace) -> tuple[float, float, float]:
    """Send the image to the guest, which must have it unchanged.

    :return: when it began and ended, and how long its longest access took.
    """
    (listen,) = says(guest)["listen"]
    source = image.start_sending(listen, "--max-bandwidth", pace.bandwidth)
    try:
        times = []
        for moment, what in ((moments.ran, "began"), (moments.ended, "ended")):
            word = says(guest)
            assert what in word, word
            times.append(word[what])
            moment.set()
        assert_sent(source)
    except AssertionError as error:
        source.kill()
        _, errors = source.communicate(timeout=LIMIT)
        raise AssertionError(f"{error}; the source: {errors}") from error
    finally:
        source.kill()
    end = says(guest)
    longest: float = end.pop("longest")
    assert end == {"complete": True, "changed": 0}, end
    began, ended = times
    return began, ended, longest


def says(guest: Guest) -> dict[str, Any]:
    """The next thing that it tells, within the time that a test may wait."""
    assert guest.process.stdout is not None
    wait_readable(guest.process.stdout.fileno())
    return guest.says()


def check_memory(image: Image, guest: Guest) -> None:
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
