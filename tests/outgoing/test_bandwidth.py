"""The limit on bytes per second, with a clock of our own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.outgoing.bandwidth import Bandwidth


def test_without_a_limit_nothing_ever_waits() -> None:
    bandwidth = Bandwidth(None)
    bandwidth.spend(1 << 40)
    assert bandwidth.wait(0.0) == 0.0


def test_what_was_spent_is_waited_for() -> None:
    bandwidth = Bandwidth(1000)
    assert bandwidth.wait(5.0) == 0.0
    bandwidth.spend(500)
    assert bandwidth.wait(5.0) == pytest.approx(0.5)
    assert bandwidth.wait(5.4) == pytest.approx(0.1)
    assert bandwidth.wait(5.6) == 0.0


def test_idle_time_is_not_saved_up() -> None:
    bandwidth = Bandwidth(1000)
    bandwidth.wait(0.0)
    assert bandwidth.wait(3600.0) == 0.0
    bandwidth.spend(1020)
    assert bandwidth.wait(3600.0) == pytest.approx(1.0)


@pytest.mark.parametrize("rate", [0, -1])
def test_a_rate_that_sends_nothing_is_refused(rate: int) -> None:
    with pytest.raises(ValueError, match="sends nothing"):
        Bandwidth(rate)


@given(st.integers(1, 10**10), st.lists(st.integers(0, 1 << 20), min_size=1, max_size=50))
def test_over_time_no_more_is_sent_than_the_rate_and_one_burst(rate: int, sizes: list[int]) -> None:
    bandwidth = Bandwidth(rate)
    now = 0.0
    sent = 0
    for size in sizes:
        now += bandwidth.wait(now)
        bandwidth.wait(now)
        # All that went before this send fits into the time that has passed.
        assert sent <= (now + 0.02) * rate * (1 + 1e-9) + 1
        bandwidth.spend(size)
        sent += size
