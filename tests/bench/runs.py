"""One run of one case, into the floor or into postcopyd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.cases import BLOCK, Case, write_preamble
from tests.daemon.daemon_process import RunningDaemon

_LIMIT = 300.0


@dataclass(frozen=True, slots=True)
class Run:
    """What one run showed."""

    seconds: float
    """From the package to the last page."""
    cpu: float
    """Seconds of processor time of the receiver."""
    latencies: list[int]
    """How long the guest waited for each missing page, nanoseconds, in order of size."""


class WrongMemory(Exception):
    """The memory was not what the source had sent: the figures mean nothing."""


def round_trips(programs: Path, count: int) -> list[int]:
    """Return the bare round trips in order of size, nanoseconds."""
    done = subprocess.run(
        [str(programs / "round_trip"), str(count)],
        check=True,
        stdout=subprocess.PIPE,
        timeout=_LIMIT,
    )
    return sorted(json.loads(done.stdout))


def run_floor(programs: Path, directory: Path, case: Case) -> Run:
    """Run `case` into the destination in C."""
    preamble = directory / "preamble"
    skip = write_preamble(preamble, case)
    words = [str(skip), BLOCK, str(case.pages), str(case.page_size), str(case.faults)]
    words += [str(int(case.order == "zero")), str(int(case.order != "none"))]
    with _process([str(programs / "floor"), *words]) as floor:
        port = _line(floor)
        _send(programs, preamble, case, port)
        told = json.loads(_line(floor))
    _check(told, case)
    return Run(told["seconds"], told["cpu"], told["latencies"])


def run_postcopyd(programs: Path, directory: Path, case: Case, daemon: RunningDaemon) -> Run:
    """Run `case` into a daemon and a VMM in a process of its own."""
    preamble = directory / "preamble"
    write_preamble(preamble, case)
    words = [str(programs / "guest.so"), str(daemon.handoff), str(case.pages)]
    words += [str(case.page_size), str(case.faults)]
    words += [str(int(case.order == "zero")), str(int(case.order != "none"))]
    with _process([sys.executable, "-m", "tests.bench.vmm", *words]) as vmm:
        port = _line(vmm)
        before = _cpu_seconds(daemon.process.pid)
        _send(programs, preamble, case, port)
        report = daemon.client.wait("bench")
        cpu = _cpu_seconds(daemon.process.pid) - before
        told = json.loads(_line(vmm))
    daemon.client.cancel("bench")  # it has ended: this forgets it
    _check(told, case)
    return Run(report["seconds_resident"], cpu, told["latencies"])


def _check(told: dict[str, object], case: Case) -> None:
    if told["wrong"]:
        raise WrongMemory(f"{case.name}: {told['wrong']} pages were wrong")


def _send(programs: Path, preamble: Path, case: Case, port: str) -> None:
    words = [port, str(preamble), BLOCK, str(case.pages), str(case.page_size)]
    words += [case.order, str(case.faults if case.order == "none" else 0)]
    subprocess.run([str(programs / "source"), *words], check=True, timeout=_LIMIT)


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise WrongMemory(f"{process.args!r} ended with status {process.wait()}")
    return line.strip()
