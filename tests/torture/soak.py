"""make soak: many migrations at a time for a long time, with faults of all kinds, and a flat end.

A daemon as a service manager runs it, real guests in processes of their own, real `postcopyctl
send` through a relay. While migrations come and go, connections are cut at random bytes, the worker
or all of the daemon is killed, sources are killed for good and their migrations abandoned, and some
are cancelled before they begin. Every guest must end as it must: complete and verified byte for
byte, or with a memory error where its source was taken away. In the end there must be no process,
descriptor or memory file more than at the begin.

Exit status 0 if all of that holds, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from postcopyd.cli.control_client import ControlError
from tests.cutting_relay import Cut, CuttingRelay
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.whole_migration import LENGTHS, Guest, Image, assert_sent, running_guest
from tests.support import wait_until

_PATIENCE: Final = 120.0
"""Seconds that one migration may take, with everything that happens to it."""
_OWN: Final = {"/control", "/handoff"}
"""What the service manager keeps when there is no migration."""
_BEHIND_THE_PACKAGE: Final = 64 << 10
"""Bytes of a stream: a break before the package ends the migration, by design."""
_NEVER: Final = 1e9  # seconds
_MEMORY_NOISE: Final = 8 << 10  # KiB
_SUPERVISOR_MEMORY: Final = "memory of the supervisor, KiB"
_WORKER_MEMORY: Final = "memory of the worker, KiB"
_LOG: Final = Path(tempfile.gettempdir()) / "postcopyd-soak.log"
"""Where the daemon's log is left when something was wrong."""
_FATES: Final = {"moved": 12, "abandoned": 2, "cancelled": 1}
"""What is to become of migrations, and how often."""


@dataclass
class Result:
    """What came of it."""

    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    """What was done to them."""
    wrong: list[str] = field(default_factory=list)
    begin: dict[str, int] = field(default_factory=dict)
    end: dict[str, int] = field(default_factory=dict)
    """What the daemon takes."""

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {
            "seed": self.seed,
            "outcomes": dict(self.outcomes),
            "faults": dict(self.faults),
            "wrong": self.wrong,
            "begin": self.begin,
            "end": self.end,
        }


class Soak:
    """One run."""

    def __init__(
        self, daemon: RunningDaemon, image: Image, seed: int, at_a_time: int, prefix: str
    ) -> None:
        self._daemon = daemon
        self._image = image
        self._numbers = random.Random(seed)
        self._at_a_time = at_a_time
        self._prefix = prefix
        self._begun = 0
        self.result = Result(seed)

    async def run(self, seconds: float, mean_between_kills: float, progress: Progress) -> None:
        """Keep so many migrations under way for that time, then let them end."""
        bar = progress.add_task("", total=seconds)
        begin = time.monotonic()
        deadline = begin + seconds
        killing = asyncio.create_task(self._kill_now_and_then(mean_between_kills))
        lanes = [asyncio.create_task(self._lane(deadline)) for _ in range(self._at_a_time)]
        while not all(lane.done() for lane in lanes):
            progress.update(bar, completed=time.monotonic() - begin, description=self._line())
            await asyncio.wait(lanes, timeout=1.0)
        killing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await killing
        for lane in lanes:
            lane.result()
        progress.update(bar, completed=seconds, description=self._line())

    def _line(self) -> str:
        outcomes, faults = self.result.outcomes, self.result.faults
        kills = faults["worker killed"] + faults["all killed"]
        return (
            f"{sum(outcomes.values())} migrations, {faults['cut']} cuts, {kills} kills, "
            f"{len(self.result.wrong)} wrong"
        )

    async def _lane(self, deadline: float) -> None:
        """One migration after the other."""
        while time.monotonic() < deadline:
            self._begun += 1
            name = f"{self._prefix}{self._begun}"
            fate = self._numbers.choices(list(_FATES), list(_FATES.values()))[0]
            try:
                async with asyncio.timeout(_PATIENCE):
                    await self._migrate(name, fate)
            except Exception as error:
                self.result.wrong.append(f"{name}, to be {fate}: {type(error).__name__}: {error}")
            else:
                self.result.outcomes[fate] += 1

    async def _migrate(self, name: str, fate: str) -> None:
        kind = self._numbers.choice(["memory-file", "anonymous"])
        with running_guest(self._daemon, name, kind) as guest:
            listen = (await asyncio.to_thread(guest.says))["listen"][0]
            port = int(listen.rpartition(":")[2])
            if fate == "cancelled":
                await self._cancel(name)
                assert "failed" in (said := await asyncio.to_thread(guest.says)), said
            elif fate == "abandoned":
                await self._abandon(name, guest, port)
            else:
                await self._move(guest, port)
        await asyncio.to_thread(shutil.rmtree, guest.directory)

    async def _move(self, guest: Guest, port: int) -> None:
        """Have a guest arrive, with breaks on the way."""
        cuts = [self._cut() for _ in range(self._numbers.choice([0, 0, 1, 1, 2, 4]))]
        async with CuttingRelay(port, cuts).listening() as relay:
            with self._sending(relay) as source:
                await asyncio.to_thread(assert_sent, source, _PATIENCE)
            assert await asyncio.to_thread(guest.says) == {"complete": True, "changed": 0}
            assert await asyncio.to_thread(guest.process.wait, _PATIENCE) == 0
            assert guest.memory() == self._image.memory, "its memory is wrong"

    async def _cancel(self, name: str) -> None:
        try:
            await self._ask("cancel", name)
        except ControlError as error:
            # Who was killed before it could answer may have done it: the guest knows.
            if error.code != "no-such-migration":
                raise

    async def _abandon(self, name: str, guest: Guest, port: int) -> None:
        """Take a guest's source away in the middle, and give up what has not come."""
        async with CuttingRelay(port).listening() as relay:
            with self._sending(relay):
                while (state := await self._state(name)) not in ("running", "paused", "gone"):
                    await asyncio.sleep(0.01)
        while state not in ("paused", "gone"):
            await asyncio.sleep(0.05)
            state = await self._state(name)
        if state != "gone":  # it was faster
            self.result.faults["source killed"] += 1
            with contextlib.suppress(ControlError):  # its guest dies of it, maybe sooner
                await self._ask("abandon", name)
            status = await asyncio.to_thread(guest.process.wait, _PATIENCE)
            if status:
                assert status == -signal.SIGBUS, f"the guest has ended with {status}"
                return
        # Nothing was missing.
        said = await asyncio.to_thread(guest.says)
        assert said == {"complete": True, "changed": 0}, said
        assert guest.memory() == self._image.memory, "its memory is wrong"

    async def _state(self, name: str) -> str:
        try:
            return str((await self._ask("show", name))["state"])
        except ControlError as error:
            if error.code != "no-such-migration":
                raise
            return "gone"

    def _cut(self) -> Cut:
        self.result.faults["cut"] += 1
        at = self._numbers.randrange(_BEHIND_THE_PACKAGE, sum(LENGTHS.values()) // 2)
        return Cut(forward=at, how="reset" if at % 2 else "close")

    @contextlib.contextmanager
    def _sending(self, relay: CuttingRelay) -> Iterator[subprocess.Popen[str]]:
        source = self._image.start_sending(f"tcp:127.0.0.1:{relay.port}", "--max-bandwidth", "8M")
        with source:
            try:
                yield source
            finally:
                source.kill()

    async def _ask(self, what: str, *words: Any) -> Any:
        """Ask the daemon, again as long as it, or the worker that is meant, is being killed."""
        while True:
            try:
                return await asyncio.to_thread(getattr(self._daemon.client, what), *words)
            except ControlError as error:
                if error.code not in ("unreachable", "unavailable"):
                    raise
                await asyncio.sleep(0.1)

    async def _kill_now_and_then(self, mean: float) -> None:
        while True:
            await asyncio.sleep(self._numbers.expovariate(1 / mean))
            # Not to be cancelled half way: the daemon is to be there in the end.
            if self._numbers.random() < 0.7:
                number = self._numbers.randrange(self._daemon.number)
                await asyncio.shield(asyncio.to_thread(self._daemon.kill_worker, number))
                self.result.faults["worker killed"] += 1
            else:
                await asyncio.shield(asyncio.to_thread(self._kill_all))
                self.result.faults["all killed"] += 1

    def _kill_all(self) -> None:
        self._daemon.kill()
        self._daemon.start()


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
        may_grow = _MEMORY_NOISE if name in (_SUPERVISOR_MEMORY, _WORKER_MEMORY) else 0
        if end[name] > before + may_grow:
            grown.append(f"{name}: {before} at the begin, {end[name]} in the end")
    return grown


async def soak(
    directory: Path,
    *,
    seconds: float,
    seed: int,
    at_a_time: int,
    mean_between_kills: float,
    progress: Progress,
) -> Result:
    """Run it below `directory`; return what came of it."""
    image = Image(directory / "image", seed)
    with running_daemon(directory, "[limits]\nended = 0\n") as daemon:
        warming_up = Soak(daemon, image, seed, at_a_time, "warm")
        await warming_up.run(0.1, _NEVER, progress)
        begin = await asyncio.to_thread(taken, daemon)
        run = Soak(daemon, image, seed, at_a_time, "vm")
        await run.run(seconds, mean_between_kills, progress)
        # Once more without kills, so that it is not the last kill that has made everything new.
        cooling_down = Soak(daemon, image, seed + 1, at_a_time, "cool")
        await cooling_down.run(0.1, _NEVER, progress)
        result = run.result
        result.wrong += warming_up.result.wrong + cooling_down.result.wrong
        result.begin = begin
        try:
            result.end = await asyncio.to_thread(taken, daemon, begin["processes"])
        except AssertionError:
            result.wrong += left_over(daemon)
        else:
            result.wrong += growth(result.begin, result.end)
        if "Traceback" in daemon.log:
            result.wrong.append("there is a traceback in the daemon's log")
        if result.wrong:
            (directory / "log").rename(_LOG)
    return result


def main() -> int:
    """Run it as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--at-a-time", type=int, default=16, help="migrations (default: 16)")
    parser.add_argument("--kill-every", type=float, default=5.0, help="mean seconds (default: 5)")
    parser.add_argument("--seed", type=int, help="of an earlier run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with tempfile.TemporaryDirectory(prefix="postcopyd-soak-") as directory, progress:
        result = asyncio.run(
            soak(
                Path(directory),
                seconds=arguments.minutes * 60,
                seed=seed,
                at_a_time=arguments.at_a_time,
                mean_between_kills=arguments.kill_every,
                progress=progress,
            )
        )
    if arguments.json:
        print(json.dumps(result.as_json()))
    else:
        show(result)
    return 1 if result.wrong else 0


def show(result: Result) -> None:
    """Print it for people."""
    print(f"seed {result.seed}")
    print("migrations:", ", ".join(f"{n} {what}" for what, n in result.outcomes.items()))
    print("faults:", ", ".join(f"{n} times {what}" for what, n in result.faults.items()))
    for name, before in result.begin.items():
        print(f"{name}: {before} at the begin, {result.end.get(name)} in the end")
    for what in result.wrong:
        print(f"wrong: {what}")
    if result.wrong:
        print(f"the daemon's log is {_LOG}")


if __name__ == "__main__":
    sys.exit(main())
