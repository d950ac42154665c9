"""make bench: postcopyd against a destination written in C, in turn, in one run.

Prints a table, and with ``--json FILE`` (``-`` for standard output) everything as JSON. It measures
and never judges: its exit status says only whether it could measure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.bench.beside import run_beside
from tests.bench.cases import HUGE, Case, cases
from tests.bench.figures import Figure, figures, percentile
from tests.bench.huge_pages import huge_pages
from tests.bench.programs import compiled
from tests.bench.residence import resident_memory
from tests.bench.runs import Run, RunFailed, round_trips, run_floor, run_postcopyd
from tests.bench.table import show
from tests.daemon.daemon_process import RunningDaemon, running_daemon


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only show that everything works")
    parser.add_argument("--runs", type=int, default=5, help="runs of each case (default: 5)")
    parser.add_argument("--only", default="", help="only the cases whose names hold this")
    parser.add_argument("--json", default="", metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    chosen = [case for case in cases(arguments.quick) if arguments.only in case.name]
    if not chosen:
        names = ", ".join(repr(case.name) for case in cases(arguments.quick))
        parser.error(f"no case is called {arguments.only!r}; there are {names}")
    if arguments.runs < 1:
        parser.error("--runs must be 1 or more")
    notes = Console(stderr=True)
    try:
        result = measure(chosen, arguments.runs, arguments.quick, notes)
    except RunFailed as error:
        notes.print(f"the bench cannot measure: {error}", style="red", markup=False)
        return 1
    if arguments.json != "-":
        show(result, Console(width=120))
    if arguments.json:
        text = json.dumps(result)
        if arguments.json == "-":
            print(text)
        else:
            Path(arguments.json).write_text(text + "\n")
    return 0


def measure(chosen: list[Case], runs: int, quick: bool, notes: Console) -> dict[str, Any]:
    """Run every case `runs` times, floor and postcopyd in turn.

    :raise RunFailed: if a run does not end well.
    """
    load = os.getloadavg()[0]
    programs = compiled()
    trips = round_trips(programs, 500 if quick else 20000)
    trip = percentile(trips, 50)
    found: list[Figure] = []
    verified: dict[str, int] = {}
    without_huge_pages: list[str] = []
    with tempfile.TemporaryDirectory(prefix="postcopyd-bench-") as name:
        directory = Path(name)
        with running_daemon(directory, "workers = 1\n") as daemon:
            resident = resident_memory(daemon)
            for case in chosen:
                with huge_pages(case.length // HUGE if case.page_size == HUGE else 0) as there:
                    if not there:
                        without_huge_pages.append(case.name)
                        continue
                    floor, ours = take_turns(programs, directory, case, daemon, runs, notes)
                    found += figures(case, floor, ours, trip)
                    verified[case.name] = min(run.verified for run in floor + ours)
            resident["most"] = daemon.memory("VmHWM") / 2**20
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}",
        "load": load,
        "runs": runs,
        "round_trip": {
            "p50": trip,
            "p99": percentile(trips, 99),
            "p99.9": percentile(trips, 99.9),
        },
        "figures": [figure.as_json() for figure in found],
        "verified_pages": verified,
        "resident_mib": resident,
        "no_huge_pages_for": without_huge_pages,
    }


def take_turns(
    programs: Path,
    directory: Path,
    case: Case,
    daemon: RunningDaemon,
    runs: int,
    notes: Console,
) -> tuple[list[Run], list[Run]]:
    """Run the floor and postcopyd `runs` times each.

    Who comes second finds another machine than who comes first, so they take turns at that too.

    :raise RunFailed: if a run does not end well.
    """
    floor: list[Run] = []
    ours: list[Run] = []

    def into_floor(case: Case, name: str) -> Run:
        return run_floor(programs, directory, case, name)

    def into_daemon(case: Case, name: str) -> Run:
        return run_postcopyd(programs, directory, case, daemon, name)

    def measured(run: Callable[[Case, str], Run]) -> Run:
        return run_beside(run, case, case.beside) if case.beside else run(case, "bench")

    into_floor(case, "bench")  # the kernel finds memory for the case; not counted
    for number in range(runs):
        notes.print(f"{case.name}: run {number + 1} of {runs}")
        if number % 2:
            ours.append(measured(into_daemon))
        floor.append(measured(into_floor))
        if not number % 2:
            ours.append(measured(into_daemon))
    return floor, ours


if __name__ == "__main__":
    sys.exit(main())
