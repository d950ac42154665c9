"""What a soak does to the daemon's processes, and what it takes when it does nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Final

from postcopyd.cli.postcopyd import TO_BE_STARTED_AGAIN
from tests.daemon.daemon_process import RunningDaemon
from tests.support import wait_until

_OWN: Final = {"/control", "/handoff"}
"""What the service manager keeps when there is no migration."""
_SUPERVISOR_MEMORY: Final = "memory of the supervisor, KiB"
_WORKER_MEMORY: Final = "memory of the worker, KiB"
_MEMORY_NOISE: Final = {_SUPERVISOR_MEMORY: 8 << 10, _WORKER_MEMORY: 24 << 10}
"""KiB. While migrations come and go a worker takes 5 to 17 MiB more, from the second minute on:
what is in cycles stays until Python looks for them among all objects, which it does after many."""
_PATIENCE: Final = 120.0
"""Seconds."""
_STANDSTILL: Final = (0.1, 3.0)
"""Seconds for which a worker is stopped: more than makes a break, less than makes it replaced, or
has a source of which it has not heard yet give up."""
_DEEDS: Final = {"worker killed": 10, "all killed": 4, "restarted": 3, "worker stopped": 3}
"""How often each."""


async def trouble(
    daemon: RunningDaemon,
    numbers: random.Random,
    mean: float,
    done: Counter[str],
    over: asyncio.Event,
) -> None:
    """Kill, stop and restart until it is over, after so many seconds each time, in the mean.

    :param done: counts what has happened.
    """
    while not over.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(numbers.expovariate(1 / mean)):
                await over.wait()
                return
        deed = numbers.choices(list(_DEEDS), list(_DEEDS.values()))[0]
        number = numbers.randrange(daemon.number)
        seconds = numbers.uniform(*_STANDSTILL)
        await _do(daemon, deed, number, seconds)
        done[f"daemon: {deed}"] += 1


async def _do(daemon: RunningDaemon, deed: str, number: int, seconds: float) -> None:
    match deed:
        case "worker killed":
            await asyncio.to_thread(daemon.kill_worker, number)
        case "worker stopped":
            worker = await asyncio.to_thread(daemon.nth_worker, number)
            os.kill(worker, signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                os.kill(worker, signal.SIGCONT)
        case "restarted":
            await asyncio.to_thread(_restart, daemon)
        case _:
            await asyncio.to_thread(_kill_all, daemon)


def _kill_all(daemon: RunningDaemon) -> None:
    daemon.kill()
    daemon.start()


def _restart(daemon: RunningDaemon) -> None:
    daemon.leave()
    status = daemon.process.wait(_PATIENCE)
    assert status == TO_BE_STARTED_AGAIN, f"told to leave it ended with {status}"
    daemon.manager.catch_up()
    daemon.start()


def taken(daemon: RunningDaemon, processes: int | None = None) -> dict[str, int]:
    """Return what a daemon takes that does nothing.

    :param processes: wait until there are so many; None for a daemon that has just begun.
    """
    if processes is None:
        wait_until(lambda: len(daemon.workers()) > daemon.number, _PATIENCE)
    else:
        wait_until(lambda: 1 + len(daemon.workers()) == processes, _PATIENCE)
    wait_until(lambda: set(daemon.manager.stored) == _OWN, _PATIENCE)
    return {
        "processes": 1 + len(daemon.workers()),
        "descriptors of the workers": len(daemon.descriptors_at_rest()),
        "descriptors of the supervisor": len(
            list(Path(f"/proc/{daemon.process.pid}/fd").iterdir())
        ),
        "kept by the service manager": len(daemon.manager.stored),
        "files of records": len(list((daemon.directory / "records").iterdir())),
        _SUPERVISOR_MEMORY: _resident(daemon.process.pid),
        _WORKER_MEMORY: max(map(_resident, map(daemon.nth_worker, range(daemon.number)))),
    }


def left_over(daemon: RunningDaemon) -> list[str]:
    """Return what a daemon still holds that should have nothing to do."""
    migrations = [
        f"{migration['name']} is still {migration['state']}: {migration['failure']}"
        for migration in daemon.client.list()
    ]
    kept = sorted(set(daemon.manager.stored) - _OWN)
    return [*migrations, f"the service manager still keeps {kept}"]


def _resident(process: int) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError(f"process {process} has no VmRSS")


def growth(begin: dict[str, int], end: dict[str, int]) -> list[str]:
    """Return what a daemon takes more in the end than it may."""
    grown = []
    for name, before in begin.items():
        if end[name] > before + _MEMORY_NOISE.get(name, 0):
            grown.append(f"{name}: {before} at the begin, {end[name]} in the end")
    return grown
