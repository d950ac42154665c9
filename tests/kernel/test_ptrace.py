"""Seizing, stopping and letting go of a thread."""

from __future__ import annotations

import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from postcopyd.kernel import ptrace
from postcopyd.kernel.ptrace import NT_PRSTATUS, Stop
from tests.kernel.target import Target, status
from tests.kernel.test_processes import NO_SUCH_PROCESS
from tests.support import LIMIT, run_python, wait_until


@contextmanager
def seized(what: str) -> Iterator[Target]:
    """A process that this thread traces; it is let go at the end if that has not been done."""
    with Target(what) as target:
        ptrace.seize(target.pid)
        try:
            yield target
        finally:
            with suppress(ProcessLookupError):
                ptrace.interrupt(target.pid)
                ptrace.wait_for_stop(target.pid, LIMIT)
                ptrace.detach(target.pid)


INTERRUPTED = Stop(signal=0, system_call=False)
SYSTEM_CALL = Stop(signal=0, system_call=True)


def test_a_process_that_is_not_there_is_named() -> None:
    with pytest.raises(ProcessLookupError, match=f"tracing process {NO_SUCH_PROCESS}: "):
        ptrace.seize(NO_SUCH_PROCESS)


def test_a_process_has_one_tracer() -> None:
    with seized("read") as target, pytest.raises(PermissionError, match="tracing process "):
        ptrace.seize(target.pid)


def test_an_interrupt_stops_and_a_detach_lets_go() -> None:
    with Target("read") as target:
        before = target.fields()
        ptrace.seize(target.pid)
        assert target.fields()[0] == before[0], "seizing stops nothing"
        ptrace.interrupt(target.pid)
        assert ptrace.wait_for_stop(target.pid, LIMIT) == INTERRUPTED
        assert status(target.pid)["State"] == "t (tracing stop)"
        ptrace.detach(target.pid)
        target.wait_for_fields(before)


def test_system_calls_are_told_from_signals() -> None:
    with seized("read") as target:
        ptrace.interrupt(target.pid)
        assert ptrace.wait_for_stop(target.pid, LIMIT) == INTERRUPTED
        ptrace.resume_to_system_call(target.pid)
        assert ptrace.wait_for_stop(target.pid, LIMIT) == SYSTEM_CALL, "it begins to read anew"
        ptrace.resume(target.pid)
        target.process.send_signal(signal.SIGUSR1)
        stop = ptrace.wait_for_stop(target.pid, LIMIT)
        assert stop == Stop(signal=signal.SIGUSR1, system_call=False)
        ptrace.resume(target.pid)  # without it, though it would have ended the process
        wait_until(lambda: status(target.pid)["State"].startswith("S"))
        ptrace.interrupt(target.pid)
        assert ptrace.wait_for_stop(target.pid, LIMIT) == INTERRUPTED
        ptrace.detach(target.pid)
        assert target.end().startswith("0 -")


def test_registers_can_be_read_and_put_back() -> None:
    with seized("registers") as target:
        ptrace.interrupt(target.pid)
        ptrace.wait_for_stop(target.pid, LIMIT)
        general = ptrace.registers(target.pid, NT_PRSTATUS, 4096)
        if platform.machine() == "x86_64":
            assert general[:8] == b"\xee" * 8, "r15 is the first of struct user_regs_struct"
        changed = bytes(8) + general[8:]
        ptrace.set_registers(target.pid, NT_PRSTATUS, changed)
        assert ptrace.registers(target.pid, NT_PRSTATUS, 4096) == changed
        ptrace.set_registers(target.pid, NT_PRSTATUS, general)
        assert ptrace.registers(target.pid, NT_PRSTATUS, 4096) == general
        ptrace.detach(target.pid)
        assert target.end() == "0"


def test_the_signal_mask_is_the_one_outside_of_the_system_call() -> None:
    with seized("sigsuspend") as target:
        ptrace.interrupt(target.pid)
        ptrace.wait_for_stop(target.pid, LIMIT)
        assert ptrace.signal_mask(target.pid) == 1 << (signal.SIGUSR1 - 1)
        ptrace.detach(target.pid)


def test_what_does_not_stop_is_waited_for_no_longer_than_said() -> None:
    with seized("read") as target, pytest.raises(TimeoutError, match=r"not stopped in 0\.01 s"):
        ptrace.wait_for_stop(target.pid, 0.01)


def test_the_exit_of_what_is_traced_is_left_for_its_parent() -> None:
    with seized("read") as target:
        target.process.send_signal(signal.SIGTERM)
        stop = ptrace.wait_for_stop(target.pid, LIMIT)
        ptrace.resume(target.pid, stop.signal)
        for _ in range(2):
            with pytest.raises(ProcessLookupError, match="was ended by SIGTERM"):
                ptrace.wait_for_stop(target.pid, LIMIT)
        assert target.process.wait(LIMIT) == -signal.SIGTERM


def test_the_end_of_the_tracing_thread_lets_go() -> None:
    with Target("read") as target:
        before = target.fields()
        run_python(
            "import sys; from postcopyd.kernel import ptrace; pid = int(sys.argv[1]); "
            "ptrace.seize(pid); ptrace.interrupt(pid); ptrace.wait_for_stop(pid, 20)",
            str(target.pid),
        )
        target.wait_for_fields(before)
        assert target.end().startswith("0 -")
