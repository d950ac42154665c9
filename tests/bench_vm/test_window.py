"""What the bench makes of the moments and heartbeats of a migration."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.bench_vm.window import Moments, heartbeats_cover, measured
from tests.interop.heartbeat import Heartbeat

MOMENTS = Moments(stopped=10.010, resumed=10.020, completed=10.070)


def beat(count: int, received: float, **others: int) -> Heartbeat:
    figures = {"iterations": 0, "bad": 0, "waits": 0, "wait_us": 0, "max_wait_us": 0, "late_us": 0}
    return Heartbeat(count, received=received, **(figures | others))


AT_SOURCE = [
    beat(1, 9.980, iterations=800, waits=1, wait_us=300, max_wait_us=300),
    beat(2, 10.000, iterations=1000, waits=2, wait_us=700, max_wait_us=400),
]
AT_DESTINATION = [
    beat(3, 10.040, iterations=1110, waits=4, wait_us=10_700, max_wait_us=8000, late_us=9000),
    beat(4, 10.060, iterations=1120, waits=5, wait_us=12_700, max_wait_us=2000),
    beat(5, 10.080, iterations=1220, waits=7, wait_us=18_700, max_wait_us=5000),
    beat(6, 10.100, iterations=2000, waits=8, wait_us=68_700, max_wait_us=50_000),
]


def test_downtime_and_window_meet_at_the_resume() -> None:
    window = measured(MOMENTS, AT_SOURCE, AT_DESTINATION, blocked=0.04, cpu=0.5)
    assert window.downtime == pytest.approx(10)
    assert window.window == pytest.approx(50)
    assert window.blocked == pytest.approx(40)
    assert window.cpu_seconds == 0.5


def test_waits_are_those_between_the_last_heartbeat_there_and_the_first_after_the_window() -> None:
    window = measured(MOMENTS, AT_SOURCE, AT_DESTINATION, blocked=0, cpu=0)
    assert window.waits == 5
    assert window.mean_wait == pytest.approx(18 / 5)


def test_a_heartbeat_that_comes_late_is_a_stall_as_a_wait_is() -> None:
    window = measured(MOMENTS, AT_SOURCE, AT_DESTINATION, blocked=0, cpu=0)
    assert window.longest_stall == pytest.approx(9)
    waiting = [replace(AT_DESTINATION[0], max_wait_us=9500), *AT_DESTINATION[1:]]
    window = measured(MOMENTS, AT_SOURCE, waiting, blocked=0, cpu=0)
    assert window.longest_stall == pytest.approx(9.5)


def test_iterations_are_counted_from_the_stop_to_the_very_end_of_the_window() -> None:
    window = measured(MOMENTS, AT_SOURCE, AT_DESTINATION, blocked=0, cpu=0)
    assert window.iterations == (1120 + 50) - (1000 + 100)


def test_a_source_that_slows_down_after_its_last_heartbeat_makes_no_iterations_negative() -> None:
    arrived = [replace(AT_DESTINATION[0], iterations=1030), beat(4, 10.080, iterations=1030)]
    window = measured(MOMENTS, AT_SOURCE, arrived, blocked=0, cpu=0)
    assert window.iterations == 0


def test_a_window_without_a_heartbeat_in_it_is_measured_too() -> None:
    window = measured(MOMENTS, AT_SOURCE, AT_DESTINATION[2:], blocked=0, cpu=0)
    assert window.iterations == round((1220 - 1100) * 50 / 60)


def test_a_guest_that_never_waited_has_a_mean_wait_of_nothing() -> None:
    quiet = [replace(found, waits=2, wait_us=700) for found in AT_DESTINATION]
    assert measured(MOMENTS, AT_SOURCE, quiet, blocked=0, cpu=0).mean_wait == 0


def test_the_window_is_told_of_when_a_heartbeat_has_come_after_it() -> None:
    assert not heartbeats_cover(MOMENTS, [])
    assert not heartbeats_cover(MOMENTS, AT_DESTINATION[:2])
    assert heartbeats_cover(MOMENTS, AT_DESTINATION[:3])
