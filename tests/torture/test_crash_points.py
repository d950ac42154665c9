"""Each step of a migration, and a SIGKILL before and after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.torture.course import note, tally_of
from tests.torture.crash_points import cases
from tests.torture.crashing import migrate
from tests.torture.sampling import Sampling, Tally
from tests.torture.victims import VICTIMS, Victim

_USUAL = 3
"""Cases of each victim in a usual run."""


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_migration_completes_whatever_step_its_daemon_is_killed_at(
    tmp_path: Path, victim: Victim, sampling: Sampling, tally: Callable[[str], Tally]
) -> None:
    all_cases = list(cases(victim))
    numbers = sampling.numbers(f"crash points {victim}")
    failures = []
    for number, case in enumerate(
        numbers.sample(all_cases, sampling.count(_USUAL, len(all_cases)))
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        outcomes = tally_of(tally, "crash points", [victim for _, victim in case.kills])
        try:
            note(migrate(directory, case.kind, case.kills), outcomes)
        except AssertionError as error:
            failures.append(f"{case.name}: {error}")
            outcomes.outcomes["failed"] += 1
    assert not failures, "\n\n".join(failures)


def test_every_point_is_there() -> None:
    """A name that does not exist any more is found out at once, not when it is its turn."""
    for victim in VICTIMS:
        for case in cases(victim):
            for point, _ in case.kills:
                point.resolve()
