"""What no receiver can do better: the round trip that `make bench` compares with."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from tests.bench.cases import cases
from tests.bench.figures import percentile
from tests.bench.programs import compiled
from tests.bench.runs import round_trips, run_floor


def measured_round_trip(quick: bool) -> dict[str, float]:
    """Return the medians in milliseconds.

    `bare` is a request one way over loopback and a page record the other. `placed` is how long a
    guest waits for a missing page when nothing else is sent and a program in C asks for it and
    places it: the same round trip with the fault, the placing and the waking.

    :raise tests.bench.runs.RunFailed: if a run does not end well.
    """
    programs = compiled()
    (idle,) = (case for case in cases(quick) if case.name == "fault, idle")
    with tempfile.TemporaryDirectory(prefix="postcopyd-bench-vm-") as directory:
        placed = run_floor(programs, Path(directory), idle).latencies
    return {
        "bare": percentile(round_trips(programs, 500 if quick else 20000), 50) / 1e3,
        "placed": median(placed) / 1e6,
    }
