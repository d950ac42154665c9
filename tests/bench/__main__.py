"""make bench: postcopyd against a destination written in C, in turn, in one run.

Prints a table, and with ``--json FILE`` (``-`` for standard output) everything as JSON. It measures
and never judges: its exit status says only whether it could measure.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.cases import HUGE, Case, cases
from tests.bench.figures import Figure, figures, percentile
from tests.bench.programs import compiled
from tests.bench.residence import resident_memory
from tests.bench.runs import Run, round_trips, run_floor, run_postcopyd
from tests.daemon.daemon_process import running_daemon

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only show that everything works")
    parser.add_argument("--runs", type=int, default=5, help="runs of each case (default: 5)")
    parser.add_argument("--only", default="", help="only the cases whose names hold this")
    parser.add_argument("--json", default="", metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    chosen = [case for case in cases(arguments.quick) if arguments.only in case.name]
    notes = Console(stderr=True)
    result = measure(chosen, arguments.runs, arguments.quick, notes)
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
    """Run every case `runs` times, floor and postcopyd in turn."""
    programs = compiled()
    trips = round_trips(programs, 500 if quick else 20000)
    trip = percentile(trips, 50)
    found: list[Figure] = []
    without_huge_pages: list[str] = []
    with tempfile.TemporaryDirectory(prefix="postcopyd-bench-") as name:
        directory = Path(name)
        with running_daemon(directory) as daemon:
            resident = resident_memory(daemon)
            for case in chosen:
                with _huge_pages(case) as there:
                    if not there:
                        without_huge_pages.append(case.name)
                        continue
                    floor: list[Run] = []
                    ours: list[Run] = []
                    for number in range(runs):
                        notes.print(f"{case.name}: run {number + 1} of {runs}")
                        floor.append(run_floor(programs, directory, case))
                        ours.append(run_postcopyd(programs, directory, case, daemon))
                    found += figures(case, floor, ours, trip)
    return {
        "machine": f"{platform.machine()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}",
        "runs": runs,
        "round_trip": {
            "p50": trip,
            "p99": percentile(trips, 99),
            "p99.9": percentile(trips, 99.9),
        },
        "figures": [figure.as_json() for figure in found],
        "resident_mib": resident,
        "no_huge_pages_for": without_huge_pages,
    }


@contextmanager
def _huge_pages(case: Case) -> Iterator[bool]:
    """Have the huge pages that `case` needs while the block lasts; say whether they are there."""
    if case.page_size != HUGE:
        yield True
        return
    before = _POOL.read_text()
    try:
        _POOL.write_text(str(int(before) + case.length // HUGE))
        yield int(_POOL.read_text()) >= int(before) + case.length // HUGE
    except PermissionError:
        yield False
    finally:
        if _POOL.read_text() != before:
            _POOL.write_text(before)


def show(result: dict[str, Any], console: Console) -> None:
    """Print the figures as a table."""
    trip = result["round_trip"]
    console.print(f"{result['machine']}; medians of {result['runs']} runs (least to most)")
    console.print(
        f"bare round trip: p50 {trip['p50']:.1f} us, p99 {trip['p99']:.1f} us, "
        f"p99.9 {trip['p99.9']:.1f} us"
    )
    table = Table()
    for column in ("case", "figure", "floor in C", "postcopyd", "ratio", "goal", "round trips"):
        table.add_column(column, justify="left" if column in ("case", "figure") else "right")
    for figure in result["figures"]:
        trips = figure["round_trips"]
        table.add_row(
            figure["case"],
            f"{figure['figure']}, {figure['unit']}",
            _with_range(figure["floor"], figure["floor_range"]),
            _with_range(figure["postcopyd"], figure["postcopyd_range"]),
            f"{figure['ratio']:.2f}",
            figure["goal"],
            f"{trips:.1f}" if trips is not None else "",
        )
    console.print(table)
    resident = result["resident_mib"]
    console.print(
        f"the daemon's memory: {resident['idle']:.1f} MiB idle (goal <= 60), "
        f"{resident['per_migration']:.2f} MiB for each migration of 256 MiB"
    )
    for name in result["no_huge_pages_for"]:
        console.print(f"not measured: {name}: no huge pages are to be had (try as root)")


def _with_range(middle: float, extremes: list[float]) -> str:
    digits = 2 if middle < 10 else 0
    return f"{middle:.{digits}f} ({extremes[0]:.{digits}f} to {extremes[1]:.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
