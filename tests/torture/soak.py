"""make soak: many migrations at a time for a long time, with faults of all kinds, and a flat end.

A daemon as a service manager runs it, real guests in processes of their own, real `postcopyctl
send` through a relay, a part of them over TLS with certificates on both sides. Meanwhile
connections break, stand still and come twice (`soak_network.py`), strangers come, processes of the
daemon are killed, stopped and restarted (`soak_daemon.py`), VMMs are killed, sources are killed for
good and their migrations abandoned, and some are cancelled before they begin
(`soak_migrations.py`). Every guest must end as it must: complete and verified byte for byte, or
with a memory error where its source was taken away, and all that has come kept. In the end there
must be no process, descriptor or memory file more than at the begin.

Exit status 0 if all of that holds, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tests.certificates import SERVER, Authority, tls_settings
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.whole_migration import Image
from tests.torture.soak_daemon import growth, left_over, taken, trouble
from tests.torture.soak_migrations import Migrations
from tests.torture.soak_network import BREAK_AFTER
from tests.torture.soak_result import Result

_NEVER: Final = 1e9  # seconds
_LOG: Final = Path(tempfile.gettempdir()) / "postcopyd-soak.log"
"""Where the daemon's log is left when something was wrong."""
_LINE_EVERY: Final = 60.0
"""Seconds, where nobody sees a bar."""
_CONFIGURATION: Final = (
    f"[limits]\nended = 0\n[timeouts]\nbreak_after = {BREAK_AFTER}\nhandshake = 5\n"
)


class Soak:
    """One run."""

    def __init__(
        self,
        daemon: RunningDaemon,
        image: Image,
        authority: Authority,
        seed: int,
        at_a_time: int,
        prefix: str,
    ) -> None:
        self._daemon = daemon
        self._numbers = random.Random(seed)
        self._at_a_time = at_a_time
        self._prefix = prefix
        self._begun = 0
        self.result = Result(seed)
        self._migrations = Migrations(daemon, image, authority, self._numbers, self.result)

    async def run(self, seconds: float, mean_between_kills: float, progress: Progress) -> None:
        """Keep so many migrations under way for that time, then let them end."""
        bar = progress.add_task("", total=seconds)
        begin = said = time.monotonic()
        deadline = begin + seconds
        over = asyncio.Event()
        troubling = asyncio.create_task(
            trouble(self._daemon, self._numbers, mean_between_kills, self.result.faults, over)
        )
        lanes = [asyncio.create_task(self._lane(deadline)) for _ in range(self._at_a_time)]
        while not all(lane.done() for lane in lanes):
            now = time.monotonic()
            progress.update(bar, completed=now - begin, description=self.result.line())
            if now - said >= _LINE_EVERY and not progress.console.is_terminal:
                said = now
                line = f"{(now - begin) / 60:.0f} min: {self.result.line()}"
                print(line, file=sys.stderr, flush=True)
            await asyncio.wait(lanes, timeout=1.0)
        over.set()
        try:
            await troubling
        except Exception as error:
            self.result.wrong.append(f"the daemon: {type(error).__name__}: {error}")
        for lane in lanes:
            lane.result()
        progress.update(bar, completed=seconds, description=self.result.line())

    async def _lane(self, deadline: float) -> None:
        """One migration after the other, one at least."""
        while True:
            self._begun += 1
            await self._migrations.one(f"{self._prefix}{self._begun}")
            if time.monotonic() >= deadline:
                return


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
    authority = Authority(directory / "authority")
    settings = _CONFIGURATION + tls_settings(authority, authority.issue("server", dns=[SERVER]))
    # Each migration has threads that wait for a guest, a source or an answer of the daemon.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4 * at_a_time + 4))
    with running_daemon(directory, settings) as daemon:
        warming_up = Soak(daemon, image, authority, seed, at_a_time, "warm")
        await warming_up.run(0.1, _NEVER, progress)
        begin = await asyncio.to_thread(taken, daemon)
        run = Soak(daemon, image, authority, seed, at_a_time, "vm")
        await run.run(seconds, mean_between_kills, progress)
        # Once more without kills, so that it is not the last kill that has made everything new.
        cooling_down = Soak(daemon, image, authority, seed + 1, at_a_time, "cool")
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
            kept = (directory / "records").iterdir()
            result.wrong += [f"{path.name} is left in the directory of lists" for path in kept]
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
        result.show()
        if result.wrong:
            print(f"the daemon's log is {_LOG}")
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
