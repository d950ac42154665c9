"""From runs to figures, and the goals that they are held against."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from tests.bench.cases import Case
from tests.bench.runs import Run

_GIB = 1 << 30

GOALS: dict[tuple[str, str], tuple[str, float]] = {
    ("fault, idle", "p50"): ("<=", 1.4),
    ("fault, background at full rate", "p99"): ("<=", 2.0),
    ("contiguous 4 KiB", "throughput"): (">=", 0.8),
    ("scattered 4 KiB", "throughput"): (">=", 0.5),
}
"""Of postcopyd as a multiple of the floor in the same run."""


def percentile(ordered: list[int], percent: float) -> float:
    """Return a percentile of a list in order of size, microseconds; 0 if it is empty."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] / 1000


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of one case: medians over the runs, and their extremes."""

    case: str
    figure: str
    unit: str
    floor: float
    postcopyd: float
    floor_range: tuple[float, float]
    postcopyd_range: tuple[float, float]
    ratio: float
    """postcopyd to floor, from the medians."""
    round_trips: tuple[float, float] | None
    """The floor's and postcopyd's as multiples of the bare round trip; None if no latencies."""
    goal: str

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def figures(case: Case, floor: list[Run], postcopyd: list[Run], round_trip: float) -> list[Figure]:
    """Return the figures of a case from its runs; `round_trip` in microseconds."""

    def figure(
        name: str,
        unit: str,
        of_floor: list[float],
        of_ours: list[float],
        *,
        is_latency: bool = False,
    ) -> Figure:
        middle, ours = median(of_floor), median(of_ours)
        goal = GOALS.get((case.name, name))
        return Figure(
            case=case.name,
            figure=name,
            unit=unit,
            floor=middle,
            postcopyd=ours,
            floor_range=(min(of_floor), max(of_floor)),
            postcopyd_range=(min(of_ours), max(of_ours)),
            ratio=ours / middle if middle else 0.0,
            round_trips=(middle / round_trip, ours / round_trip) if is_latency else None,
            goal=f"{goal[0]} {goal[1]:g}" if goal else "",
        )

    latencies = [
        figure(
            f"p{percent:g}",
            "us",
            [percentile(run.latencies, percent) for run in floor],
            [percentile(run.latencies, percent) for run in postcopyd],
            is_latency=True,
        )
        for percent in (50, 99, 99.9)
    ]
    if case.beside is not None:
        rate = figure(
            "the other's throughput",
            "MB/s",
            [run.rate_beside / 1e6 for run in floor],
            [run.rate_beside / 1e6 for run in postcopyd],
        )
        return [*latencies, rate]
    if case.order == "none":
        cpu = figure(
            "CPU a fault",
            "us",
            [run.cpu * 1e6 / case.faults for run in floor],
            [run.cpu * 1e6 / case.faults for run in postcopyd],
        )
        return [*latencies, cpu]
    throughput = figure(
        "throughput",
        "MB/s",
        [case.length / run.seconds / 1e6 for run in floor],
        [case.length / run.seconds / 1e6 for run in postcopyd],
    )
    if case.faults:
        # Who holds the background back serves faults sooner: one figure is nothing without the
        # other.
        count = figure(
            "faults",
            "a run",
            [float(len(run.latencies)) for run in floor],
            [float(len(run.latencies)) for run in postcopyd],
        )
        return [*latencies, throughput, count]
    cpu = figure(
        "CPU",
        "s/GiB",
        [run.cpu * _GIB / case.length for run in floor],
        [run.cpu * _GIB / case.length for run in postcopyd],
    )
    return [throughput, cpu]
