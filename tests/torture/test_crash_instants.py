"""A migration, and a SIGKILL at any instant of it: what that hits, chance tells."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from tests.daemon.daemon_process import RunningDaemon
from tests.support import LIMIT
from tests.torture.course import note, tally_of
from tests.torture.crashing import KINDS, SLOW, Moments, migrate
from tests.torture.kills import assert_whom
from tests.torture.sampling import Sampling, Tally
from tests.torture.victims import VICTIMS, Kill, Victim, from_outside

_USUAL, _FULL = 3, 200
_TWICE = 0.3
"""How often a second kill follows."""
_SECOND = 0.6
"""Seconds within which it does."""

Since: TypeAlias = Literal["start", "run", "end"]
_FIRST: dict[Since, tuple[float, float]] = {
    "start": (0.15, 0.5),
    "run": (0.7, 0.9),
    "end": (0.15, 0.05),
}
"""What the first kill follows -> how often, and within how many seconds: all the time that a guest
takes to its switchover, to its end, and to be gone."""


@dataclass(frozen=True)
class _Instant:
    since: Since | None
    """None for the kill before it."""
    seconds: float
    victim: Victim


def test_a_migration_completes_whenever_its_daemon_is_killed(
    tmp_path: Path, sampling: Sampling, tally: Callable[[str], Tally]
) -> None:
    numbers = sampling.numbers("crash instants")
    failures = []
    for number in range(sampling.count(_USUAL, _FULL)):
        instants = _drawn(numbers)
        kind = numbers.choice(KINDS)
        directory = tmp_path / str(number)
        directory.mkdir()
        outcomes = tally_of(tally, "crash instants", [instant.victim for instant in instants])
        try:
            course = migrate(directory, kind, (), partial(_kill, instants), SLOW)
            assert_whom(course.kills[0], instants[0].victim)  # the second may find nobody yet
            note(course, outcomes)
        except AssertionError as error:
            failures.append(f"{number}, {kind}, {instants}: {error}")
            outcomes.outcomes["failed"] += 1
    assert not failures, "\n\n".join(failures)


def _drawn(numbers: random.Random) -> list[_Instant]:
    (since,) = numbers.choices(list(_FIRST), [weight for weight, _ in _FIRST.values()])
    _, within = _FIRST[since]
    instants = [_Instant(since, numbers.uniform(0, within), numbers.choice(VICTIMS))]
    if numbers.random() < _TWICE:
        instants.append(_Instant(None, numbers.uniform(0, _SECOND), numbers.choice(VICTIMS)))
    return instants


def _kill(instants: list[_Instant], daemon: RunningDaemon, moments: Moments) -> list[Kill]:
    kills = []
    for instant in instants:
        if instant.since == "run":
            assert moments.ran.wait(LIMIT)
        elif instant.since == "end":
            assert moments.ended.wait(LIMIT)
        time.sleep(instant.seconds)
        kills.append(from_outside(daemon.process.pid, instant.victim))
    return kills
