"""When it is tried again."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from postcopyd.outgoing.backoff import (
    EAGER_LIMIT,
    EAGER_SECONDS,
    FIRST_LIMIT,
    LIMIT,
    Backoff,
)


class Longest(random.Random):
    """Chance that is always against us."""

    def uniform(self, a: float, b: float) -> float:
        return b


def waits(backoff: Backoff, count: int, now: float = 0.0) -> list[float]:
    backoff.broke(now)
    return [backoff.wait(now) for _ in range(count)]


def test_the_first_try_comes_at_once_and_the_longest_waits_double_up_to_a_second() -> None:
    assert waits(Backoff(Longest()), 8) == [0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_after_a_minute_it_is_tried_every_five_seconds_at_least() -> None:
    backoff = Backoff(Longest())
    waits(backoff, 20)
    assert backoff.wait(EAGER_SECONDS - 0.1) == EAGER_LIMIT
    assert backoff.wait(EAGER_SECONDS) == LIMIT


def test_when_an_outage_is_over_the_next_one_begins_anew() -> None:
    backoff = Backoff(Longest())
    waits(backoff, 5)
    backoff.broke(7.0)
    assert backoff.lasts(7.0) == 7.0, "it is the same outage"
    backoff.over()
    assert backoff.lasts(8.0) == 0.0
    assert waits(backoff, 2, 9.0) == [0.0, FIRST_LIMIT]
    assert backoff.lasts(10.0) == 1.0


@given(st.integers(), st.integers(1, 5000), st.floats(0, 1e6))
def test_no_wait_is_longer_than_the_limit_however_long_it_takes(
    seed: int, tries: int, now: float
) -> None:
    backoff = Backoff(random.Random(seed))
    backoff.broke(0.0)
    limit = EAGER_LIMIT if now < EAGER_SECONDS else LIMIT
    assert all(0.0 <= backoff.wait(now) <= limit for _ in range(tries))


def test_the_same_seed_waits_the_same_and_another_one_does_not() -> None:
    one, same, other = (waits(Backoff(random.Random(seed)), 10) for seed in (1, 1, 2))
    assert one == same != other
