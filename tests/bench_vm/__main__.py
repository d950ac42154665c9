"""make bench-vm: a Linux guest migrated by QEMU itself and by postcopyd, in turn, in one run.

Prints a table for each version of QEMU, and with ``--json FILE`` (``-`` for standard output)
everything as JSON. It measures and never judges: its exit status says only whether it could
measure. window.py says what the figures are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from tests.bench.runs import RunFailed
from tests.bench_vm.figures import Figure, figures
from tests.bench_vm.round_trip import measured_round_trip
from tests.bench_vm.run import run
from tests.bench_vm.setups import VERSIONS, Receiver, Setup, machine, setups
from tests.bench_vm.table import show
from tests.bench_vm.window import Window
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.interop.qemu_versions import QemuVersion

_ONLY: Final[dict[str, Receiver]] = {"native": "QEMU", "postcopyd": "postcopyd"}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="make bench-vm", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only show that everything works")
    parser.add_argument("--runs", type=int, help="runs of each setup (default: 5, or 1 if quick)")
    parser.add_argument("--version", choices=VERSIONS, help="only this QEMU (default: all)")
    parser.add_argument("--only", choices=list(_ONLY), help="only this receiver (default: both)")
    parser.add_argument("--json", default="", metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    runs = arguments.runs if arguments.runs is not None else 1 if arguments.quick else 5
    if runs < 1:
        parser.error("--runs must be 1 or more")
    versions = (arguments.version,) if arguments.version else VERSIONS
    receivers = {_ONLY[arguments.only]} if arguments.only else set(_ONLY.values())
    notes = Console(stderr=True)
    try:
        result = measure(versions, receivers, runs, arguments.quick, notes)
    except RunFailed as error:
        notes.print(f"the bench cannot measure: {error}", style="red", markup=False)
        return 1
    if arguments.json != "-":
        show(result, Console(width=160))
    if arguments.json:
        text = json.dumps(result)
        if arguments.json == "-":
            print(text)
        else:
            Path(arguments.json).write_text(text + "\n")
    return 0


def measure(
    versions: Sequence[QemuVersion],
    receivers: set[Receiver],
    runs: int,
    quick: bool,
    notes: Console,
) -> dict[str, Any]:
    """Run every setup `runs` times, all setups of a version in turn.

    :raise RunFailed: if a run does not end well.
    """
    load = os.getloadavg()[0]
    trip = measured_round_trip(quick)
    found: list[Figure] = []
    windows: dict[str, dict[str, list[dict[str, float]]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="postcopyd-bench-vm-") as name,
        running_daemon(Path(name)) as daemon,
    ):
        for version in versions:
            chosen = [setup for setup in setups(version) if setup.receiver in receivers]
            told = asyncio.run(take_turns(chosen, daemon, runs, quick, notes))
            found += figures(told, trip["placed"])
            windows[version] = {
                setup.name: [asdict(window) for window in told[setup]] for setup in chosen
            }
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}",
        "load": load,
        "quick": quick,
        "runs": runs,
        "versions": list(versions),
        "round_trip": trip,
        "figures": [figure.as_json() for figure in found],
        "windows": windows,
    }


async def take_turns(
    chosen: list[Setup], daemon: RunningDaemon, runs: int, quick: bool, notes: Console
) -> dict[Setup, list[Window]]:
    """Run each setup of a version `runs` times.

    Who comes later finds another machine than who comes first, so every second turn goes backwards.

    :raise RunFailed: if a run does not end well.
    """
    told: dict[Setup, list[Window]] = {setup: [] for setup in chosen}
    for number in range(runs):
        for setup in chosen[:: -1 if number % 2 else 1]:
            window = await run(setup, machine(setup.version, quick), daemon)
            told[setup].append(window)
            notes.print(
                f"QEMU {setup.version}, run {number + 1} of {runs}, {setup.name}: "
                f"window {window.window:.0f} ms, {window.waits} waits of {window.mean_wait:.1f} ms",
                highlight=False,
            )
    return told


if __name__ == "__main__":
    sys.exit(main())
