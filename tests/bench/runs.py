"""One run of one case, into the floor or into postcopyd."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

from tests.bench.cases import BLOCK, Case, write_preamble
from tests.daemon.daemon_process import RunningDaemon
from tests.support import ROOT

_LIMIT = 300.0
"""Seconds after which a run is given up."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one run showed."""

    seconds: float
    """From the package to the last page."""
    cpu: float
    """Seconds of processor time of the receiver."""
    latencies: list[int]
    """How long the guest waited for each missing page, nanoseconds, in order of size."""
    verified: int
    """Target pages that were compared with what the source had sent, every byte of them."""
    rate_beside: float = 0.0
    """Bytes a second of the migration beside this one; 0 if there was none."""


class RunFailed(Exception):
    """A run did not end as it must, or the memory was wrong: its figures mean nothing."""


def round_trips(programs: Path, count: int) -> list[int]:
    """Return the bare round trips in order of size, nanoseconds."""
    done = subprocess.run(
        [programs / "round_trip", str(count)], check=True, stdout=subprocess.PIPE, timeout=_LIMIT
    )
    return sorted(json.loads(done.stdout))


def run_floor(programs: Path, directory: Path, case: Case, name: str = "bench") -> Run:
    """Run `case` into the destination in C, under a name that no other run has meanwhile.

    :raise RunFailed: if it does not end well.
    """
    preamble = directory / f"preamble-{name}"
    skip = write_preamble(preamble, case)
    with _process([str(programs / "floor"), str(skip), BLOCK, *_guest_words(case)]) as floor:
        _send(programs, preamble, case, _line(floor))
        told = json.loads(_line(floor))
    return _run(case, told, told["seconds"], told["cpu"])


def run_postcopyd(
    programs: Path, directory: Path, case: Case, daemon: RunningDaemon, name: str = "bench"
) -> Run:
    """Run `case` into a daemon, as the migration `name`, and a VMM in a process of its own.

    :raise RunFailed: if it does not end well.
    """
    preamble = directory / f"preamble-{name}"
    write_preamble(preamble, case)
    words = [str(programs / "guest.so"), str(daemon.handoff), name, *_guest_words(case)]
    with _process([sys.executable, "-m", "tests.bench.vmm", *words]) as vmm:
        port = _line(vmm)
        before = _cpu_seconds(daemon.worker)
        _send(programs, preamble, case, port)
        report = daemon.client.wait(name, _LIMIT)
        cpu = _cpu_seconds(daemon.worker) - before
        if report["state"] != "end":
            raise RunFailed(f"{case.name}: the migration is {report['state']}: {report['failure']}")
        told = json.loads(_line(vmm))
    daemon.client.cancel(name)  # it has ended: this forgets it
    return _run(case, told, report["window_seconds"], cpu)


def _guest_words(case: Case) -> list[str]:
    """Return what floor and VMM are told alike: PAGES HOST_PAGE FAULTS EXPECT_ZERO VERIFY."""
    zero, all_sent = case.order == "zero", case.order != "none"
    return [str(int(x)) for x in (case.pages, case.page_size, case.faults, zero, all_sent)]


def _run(case: Case, told: dict[str, int | list[int]], seconds: float, cpu: float) -> Run:
    latencies, wrong, verified = told["latencies"], told["wrong"], told["verified"]
    assert isinstance(latencies, list) and isinstance(verified, int)
    if wrong:
        raise RunFailed(f"{case.name}: {wrong} pages were wrong")
    if case.order == "none" and len(latencies) != case.faults:
        raise RunFailed(f"{case.name}: {len(latencies)} faults, not {case.faults}")
    return Run(seconds, cpu, sorted(latencies), verified)


def _send(programs: Path, preamble: Path, case: Case, port: str) -> None:
    words = [port, str(preamble), BLOCK, str(case.pages), str(case.page_size)]
    words += [case.order, str(case.faults if case.order == "none" else 0)]
    done = subprocess.run([programs / "source", *words], check=False, timeout=_LIMIT)
    if done.returncode:
        raise RunFailed(f"{case.name}: the source ended with status {done.returncode}")


def _cpu_seconds(process: int) -> float:
    """Return the processor time of a process, by its own clock: /proc counts in ticks of 10 ms."""
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(process, ctypes.byref(clock))
    if error:
        raise OSError(error, os.strerror(error))
    return time.clock_gettime(clock.value)


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a program that must end by itself; it is killed when it takes too long."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        watch = Timer(_LIMIT, process.kill)
        watch.start()
        try:
            yield process
            process.wait(_LIMIT)
        finally:
            watch.cancel()
            process.kill()
    if process.returncode:
        raise RunFailed(f"{command[0]} ended with status {process.returncode}")


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RunFailed(f"{process.args!r} ended with status {process.wait(_LIMIT)}")
    return line.strip()
