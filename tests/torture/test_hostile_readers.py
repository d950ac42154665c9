"""Every reader of something from outside, given what is right but for a few things.

A million inputs in a full run: what comes of them is what each reader documents, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.fuzz.targets import TARGETS, check
from tests.torture.sampling import Sampling, Tally

FULL = {
    "stream": 120_000,
    "resumed": 80_000,
    "preempt": 100_000,
    "return-path": 200_000,
    "handoff": 150_000,
    "firecracker": 60_000,
    "answers": 100_000,
    "journal": 60_000,
    "channel": 120_000,
    "texts": 60_000,
}
"""Inputs of a full run: more than a million together."""
USUAL = 80
"""Of so many inputs of a full run the usual one takes one."""


def test_a_full_run_is_more_than_a_million() -> None:
    assert sum(FULL.values()) > 1_000_000
    assert set(FULL) == set(TARGETS)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_nearly_right_is_accepted_or_refused_in_the_one_documented_way(
    target: str, sampling: Sampling, tally: Callable[[str], Tally]
) -> None:
    numbers = sampling.numbers(f"hostile {target}")
    outcomes = tally(f"hostile {target}").outcomes
    began = time.monotonic()
    for _ in range(sampling.count(FULL[target] // USUAL, FULL[target])):
        outcomes[check(target, TARGETS[target].hostile(numbers))] += 1
    outcomes["seconds"] += round(time.monotonic() - began)
    # Else it is too wrong to come far, or too right to be hostile.
    taken = outcomes["accepted"] + outcomes["refused"]
    assert 0.04 * taken < outcomes["accepted"] < 0.95 * taken
