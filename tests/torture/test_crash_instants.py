"""A migration, and a SIGKILL at any instant of it: what that hits, chance tells."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.daemon.daemon_process import RunningDaemon
from tests.torture.crashing import KINDS, kill, migrate
from tests.torture.kills import VICTIMS, Victim
from tests.torture.sampling import Sampling, Tally

_USUAL, _FULL = 5, 200
_TWICE = 0.3
"""How often a second kill follows."""
_FIRST, _SECOND = 1.2, 0.6
"""Seconds: within which the first one comes after the guest has been started, and the second one
after that."""


def test_a_migration_completes_whenever_its_daemon_is_killed(
    tmp_path: Path, sampling: Sampling, tally: Callable[[str], Tally]
) -> None:
    numbers = sampling.numbers("crash instants")
    failures = []
    for number in range(sampling.count(_USUAL, _FULL)):
        kills = [(numbers.uniform(0, _FIRST), numbers.choice(VICTIMS))]
        if numbers.random() < _TWICE:
            kills.append((numbers.uniform(0, _SECOND), numbers.choice(VICTIMS)))
        kind = numbers.choice(KINDS)
        directory = tmp_path / str(number)
        directory.mkdir()
        victims = kills[0][1] if len(kills) == 1 else "one after the other"
        outcomes = tally(f"crash instants, {victims} killed")
        try:
            outcomes.pauses.append(migrate(directory, kind, {}, partial(_kill, kills)))
            outcomes.outcomes["ok"] += 1
        except AssertionError as error:
            failures.append(f"{number}, {kind}, {kills}: {error}")
            outcomes.outcomes["failed"] += 1
    assert not failures, "\n\n".join(failures)


def _kill(kills: list[tuple[float, Victim]], daemon: RunningDaemon) -> None:
    for seconds, victim in kills:
        time.sleep(seconds)
        kill(daemon, victim)
