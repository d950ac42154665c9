"""What postcopyd's runs are compared with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.bench_vm.figures import MEAN_WAIT, Figure, figures
from tests.bench_vm.setups import Setup, setups
from tests.bench_vm.window import Window

NATIVE, NATIVE_PREEMPT, OURS, OURS_PREEMPT = setups("7.2")
WINDOW = Window(
    downtime=10,
    window=1000,
    waits=100,
    mean_wait=20,
    longest_stall=120,
    blocked=900,
    iterations=400,
    cpu_seconds=1,
)


def by_name(runs: dict[Setup, list[Window]]) -> dict[str, Figure]:
    return {figure.figure: figure for figure in figures(runs, round_trip=0.2)}


def test_a_ratio_is_to_the_better_of_qemus_own_two_whichever_that_is() -> None:
    found = by_name(
        {
            NATIVE: [replace(WINDOW, window=500)],
            NATIVE_PREEMPT: [replace(WINDOW, mean_wait=5, iterations=800)],
            OURS: [replace(WINDOW, mean_wait=2)],
            OURS_PREEMPT: [replace(WINDOW, mean_wait=1, iterations=1600)],
        }
    )
    assert found["window"].ratios == {"postcopyd": 2, "postcopyd, preempt": 2}
    assert found[MEAN_WAIT].ratios == {"postcopyd": 0.4, "postcopyd, preempt": 0.2}
    assert found["iterations"].ratios == {"postcopyd": 0.5, "postcopyd, preempt": 2}
    assert found["waits"].ratios == {}


def test_several_runs_give_their_median_and_their_extremes() -> None:
    runs = [replace(WINDOW, downtime=downtime) for downtime in (30, 10, 11)]
    figure = by_name({NATIVE: runs})["downtime"]
    assert figure.medians == {"QEMU": 11}
    assert figure.ranges == {"QEMU": (10, 30)}


def test_the_mean_wait_is_given_in_round_trips() -> None:
    found = by_name({NATIVE: [WINDOW]})
    assert found[MEAN_WAIT].round_trips == {"QEMU": pytest.approx(100)}
    assert not found["window"].round_trips


@pytest.mark.parametrize("alone", [NATIVE, OURS])
def test_one_receiver_alone_has_no_ratios(alone: Setup) -> None:
    assert all(figure.ratios == {} for figure in by_name({alone: [WINDOW]}).values())
