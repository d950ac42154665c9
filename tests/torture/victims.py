"""Which process of a daemon is which, so that whom a kill names is whom it kills.

The processes of a daemon under test use this as well, before they have imported anything else: it
needs nothing but the standard library.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

Victim: TypeAlias = Literal["worker", "supervisor", "both"]
VICTIMS: tuple[Victim, ...] = ("worker", "supervisor", "both")

Role: TypeAlias = Literal["supervisor", "worker", "successor", "bystander"]
"""A worker is the one that has the migration. A successor is to have it and does not know that yet.
A bystander is a worker that has nothing to do with it."""

_SEAT = "postcopyd-0"
"""What the worker that has the only migration is called: the first one."""
_EXITING = 0x4
"""PF_EXITING of linux/sched.h."""
_KILLED = 1 << (signal.SIGKILL - 1)


@dataclass(frozen=True)
class Process:
    """A process of the daemon that lived when this was made."""

    process: int
    started: int
    """When, in clock ticks: its number may be another's one day."""
    role: Role

    def lives(self) -> bool:
        """Tell whether it has not gone, and is not about to."""
        return _started(self.process) == self.started


@dataclass(frozen=True)
class Kill:
    """One that has happened."""

    at: float
    """Seconds of the monotonic clock."""
    victims: tuple[Process, ...]
    """All that lived of whom it named."""

    @classmethod
    def of_json(cls, members: dict[str, Any]) -> Kill:
        """Read what `dataclasses.asdict` made of one."""
        return cls(members["at"], tuple(Process(**victim) for victim in members["victims"]))


def ourselves() -> Process:
    """This process, which is a worker."""
    own = os.getpid()
    name = _name(own)
    role: Role = "worker" if name == _SEAT else "bystander" if _has_a_seat(name) else "successor"
    return _existing(own, role)[0]


def supervisor(process: int) -> list[Process]:
    """The supervisor, if that process is it and lives."""
    is_one = "postcopyd.cli.postcopyd" in _command(process) and not _name(process).startswith(
        "postcopyd-"
    )
    return _existing(process, "supervisor") if is_one else []


def worker(supervisor: int) -> list[Process]:
    """The worker with the migration, or who is to be that if nobody is, or is alive."""
    children: list[str] = []
    with suppress(OSError):
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    waiting: list[Process] = []
    for child in map(int, children):  # the oldest comes first
        name = _name(child)
        if name == _SEAT:
            if found := _existing(child, "worker"):
                return found
        elif not _has_a_seat(name):
            waiting += _existing(child, "successor")
    return waiting[:1]


def kill(victims: Iterable[Process]) -> None:
    """Send each a SIGKILL, in that order."""
    for victim in victims:
        with suppress(ProcessLookupError):
            os.kill(victim.process, signal.SIGKILL)


def from_outside(supervisor_process: int, victim: Victim) -> Kill:
    """Kill what there is of it at this instant; of a daemon that is dead that is nobody."""
    supervisors = supervisor(supervisor_process)
    workers = worker(supervisor_process) if supervisors else []
    found = {"worker": workers, "supervisor": supervisors, "both": [*supervisors, *workers]}[victim]
    happened = Kill(time.monotonic(), tuple(found))
    kill(found)
    return happened


def _existing(process: int, role: Role) -> list[Process]:
    started = _started(process)
    return [] if started is None else [Process(process, started, role)]


def _started(process: int) -> int | None:
    """When a process was started; None if it has gone, is on its way out, or was killed."""
    try:
        _, _, rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    state, _, _, _, _, _, flags, *more = rest.split()
    pending = re.findall(r"^S(?:ig|hd)Pnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
    was_killed = any(int(signals, 16) & _KILLED for signals in pending)
    if state in "ZX" or int(flags) & _EXITING or was_killed:
        return None
    return int(more[12])


def _name(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def _command(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _has_a_seat(name: str) -> bool:
    return name.removeprefix("postcopyd-").isdecimal()
