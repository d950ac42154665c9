"""System calls run in another process: what they do, and that nothing else happens there."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from postcopyd.kernel import injection
from postcopyd.kernel.injection import Injector, NotInjectable, inject
from tests.kernel.target import (
    ALL,
    LASTS,
    OUTCOMES,
    DoomedTracers,
    Target,
    status,
)
from tests.kernel.test_processes import NO_SUCH_PROCESS
from tests.support import LIMIT, wait_until

FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
STEPS = (
    "seized",
    "stopped",
    "saved",
    "frame written",
    "registers set",
    "entered",
    "left",
    "registers put back",
    "stack put back",
    "detached",
)
BEFORE_FRAME = ("stopped", "saved", "frame written")
# From here to there a tracer that dies leaves it to the frame to put things back.
BY_FRAME = ("registers set", "entered", "left")


def open_userfaultfd(injector: Injector) -> int:
    return injector.call("userfaultfd", FLAGS)


@pytest.mark.parametrize("what", ALL)
def test_a_process_does_not_notice(what: str) -> None:
    with Target(what) as target:
        fields, descriptors = target.fields(), target.descriptors()
        number = inject(target.pid, open_userfaultfd)
        target.wait_for_fields(fields)
        assert number == len(descriptors)
        assert target.descriptors() == [*descriptors, "anon_inode:[userfaultfd]"]
        assert re.fullmatch(OUTCOMES[what], target.end())


@pytest.mark.parametrize("what", ALL)
def test_a_process_does_not_notice_that_the_tracer_dies(what: str) -> None:
    with DoomedTracers() as tracers, ExitStack() as stack:
        last: list[tuple[Target, str]] = []
        for step in STEPS:
            target = stack.enter_context(Target(what))
            fields = target.fields()
            tracers.trace(target.pid, step)
            if what in LASTS:
                # How long to sleep still is forgotten when the frame is used.
                lost = what != "ppoll timed" and step in BY_FRAME
                last.append((target, OUTCOMES[what] + (r"|-1 EINTR \S+" if lost else "")))
            elif what == "epoll_wait" and step in BEFORE_FRAME:
                # The kernel ends it whoever stops it, and nobody is left to begin it anew.
                assert re.fullmatch(r"-1 EINTR \S+", target.end())
            else:
                target.wait_for_fields(fields)
                assert re.fullmatch(OUTCOMES[what], target.end())
        for target, outcome in last:
            assert re.fullmatch(outcome, target.end())


def test_a_critical_section_that_was_interrupted_is_begun_anew() -> None:
    with Target("critical section") as target:
        inject(target.pid, open_userfaultfd)
        assert target.end() == "guarded"


# -- results and arguments -----------------------------------------------------------------------


def test_several_calls_are_made_in_one_stop() -> None:
    def work(injector: Injector) -> list[int]:
        first, second = open_userfaultfd(injector), open_userfaultfd(injector)
        return [second - first, injector.call("close", first), injector.call("close", second)]

    with Target("read") as target:
        before = target.descriptors()
        assert inject(target.pid, work) == [1, 0, 0]
        assert target.descriptors() == before


def test_an_error_is_a_negative_errno() -> None:
    with Target("read") as target:
        assert inject(target.pid, lambda injector: injector.call("close", 999)) == -errno.EBADF


def test_bytes_are_an_address_there(tmp_path: Path) -> None:
    file = tmp_path / "opened"
    file.touch()

    def work(injector: Injector) -> int:
        return injector.call("openat", 0, bytes(file) + b"\0", os.O_RDONLY, 0)

    with Target("read") as target:
        before = target.descriptors()
        assert inject(target.pid, work) == len(before)
        assert target.descriptors() == [*before, str(file)]
        assert target.end().startswith("0 -")


@pytest.mark.parametrize("what", ["registers", "read"])
def test_the_stack_is_as_it_was(what: str) -> None:
    def work(injector: Injector) -> int:
        return injector.call("openat", 0, b"/".ljust(200, b"/") + b"\0", os.O_RDONLY, 0)

    with Target(what) as target:
        before = target.stack()
        assert inject(target.pid, work) > 0
        assert target.stack() == before
        assert re.fullmatch(OUTCOMES[what], target.end())


def test_the_red_zone_is_not_written_to() -> None:
    with Target("registers") as target:
        seen = []

        def work(injector: Injector) -> None:
            before = target.stack()
            injector.call("openat", 0, b"/".ljust(200, b"/") + b"\0", os.O_RDONLY, 0)
            # 0x5a5a01 is the uppermost word of its red zone, 0x5a5a10 the lowest.
            zone = b"".join((0x5A5A00 + n).to_bytes(8, "little") for n in range(16, 0, -1))
            seen.extend([zone in before, zone in target.stack()])

        inject(target.pid, work)
        assert seen == [True, True]


def test_what_the_work_raises_is_raised_here() -> None:
    def work(injector: Injector) -> None:
        open_userfaultfd(injector)
        raise ZeroDivisionError

    with Target("read") as target:
        fields = target.fields()
        with pytest.raises(ZeroDivisionError):
            inject(target.pid, work)
        target.wait_for_fields(fields)
        assert target.end().startswith("0 -")


# -- signals that come in the middle -------------------------------------------------------------


# Signals are sent with os.kill: Popen.send_signal waits for the process, and takes a stop that is
# meant for the tracer for an exit.


def at_first(step: str, action: Callable[[], object]) -> Callable[[str], None]:
    """Return a hook that acts when a step is done for the first time."""
    todo = [action]

    def at_step(done: str) -> None:
        if done == step and todo:
            todo.pop()()

    return at_step


@pytest.mark.parametrize("step", STEPS[:-1])
@pytest.mark.parametrize("what", ["pause", "sigsuspend"])
def test_a_signal_in_the_middle_is_delivered_once(
    monkeypatch: pytest.MonkeyPatch, what: str, step: str
) -> None:
    with Target(what) as target:
        signalled = at_first(step, lambda: os.kill(target.pid, signal.SIGUSR1))
        monkeypatch.setattr(injection, "at_step", signalled)
        assert inject(target.pid, open_userfaultfd) > 0
        assert re.fullmatch(OUTCOMES[what], target.end())


@pytest.mark.parametrize("step", STEPS[:-1])
def test_a_process_that_is_stopped_in_the_middle_is_stopped_afterwards(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with Target("read") as target:
        stopped = at_first(step, lambda: os.kill(target.pid, signal.SIGSTOP))
        monkeypatch.setattr(injection, "at_step", stopped)
        assert inject(target.pid, open_userfaultfd) > 0
        wait_until(lambda: status(target.pid)["State"].startswith("T"))
        target.process.send_signal(signal.SIGCONT)
        assert target.end().startswith("0 -")


@pytest.mark.parametrize("step", STEPS[:-1])
def test_a_process_that_is_continued_in_the_middle_goes_on(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with Target("stopped") as target:
        continued = at_first(step, lambda: os.kill(target.pid, signal.SIGCONT))
        monkeypatch.setattr(injection, "at_step", continued)
        assert inject(target.pid, open_userfaultfd) > 0
        wait_until(lambda: status(target.pid)["State"].startswith("S"))
        assert target.end() == "continued"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("step", STEPS[:-3])
def test_a_process_that_is_ended_in_the_middle_is_told_of(
    monkeypatch: pytest.MonkeyPatch, step: str, number: signal.Signals
) -> None:
    with Target("read") as target:
        ended = at_first(step, lambda: os.kill(target.pid, number))
        monkeypatch.setattr(injection, "at_step", ended)

        def work(injector: Injector) -> None:
            injector.call("close", open_userfaultfd(injector))

        with pytest.raises(ProcessLookupError):
            inject(target.pid, work)
        assert target.process.wait(LIMIT) == -number


# -- what cannot be done -------------------------------------------------------------------------


def test_a_process_that_is_not_there_is_named() -> None:
    with pytest.raises(ProcessLookupError, match=f"process {NO_SUCH_PROCESS}: "):
        inject(NO_SUCH_PROCESS, open_userfaultfd)


def test_a_process_that_does_not_stop_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injection, "STOP_LIMIT", 0.1)
    with Target("vfork") as target:
        with pytest.raises(TimeoutError, match=r"has not stopped in 0\.1 s"):
            inject(target.pid, open_userfaultfd)
        wait_until(lambda: status(target.pid)["TracerPid"] == "0")
        assert target.end() == "back"


def test_no_room_on_the_stack_is_refused() -> None:
    with Target("cornered") as target:
        fields = target.fields()
        with pytest.raises(NotInjectable, match="bytes of room on its stack"):
            inject(target.pid, open_userfaultfd)
        target.wait_for_fields(fields)
        assert target.end() == "back"


# A process that has nothing but a wait for ever.
NOTHING_BUT_CODE = """
.globl _start
_start: mov ${number}, %eax
        {instruction}
        jmp _start
"""


@pytest.mark.parametrize(
    ("option", "number", "instruction", "reason"),
    [
        ("-m32", 29, "int $0x80", "runs 32-bit code"),
        ("-m64", 34, "syscall", "runs without a C library"),
    ],
)
def test_a_process_that_is_not_fit_is_refused(
    tmp_path: Path, option: str, number: int, instruction: str, reason: str
) -> None:
    source, program = tmp_path / "wait.S", tmp_path / "wait"
    source.write_text(NOTHING_BUT_CODE.format(number=number, instruction=instruction))
    options = [option, "-nostdlib", "-static", "-o", str(program), str(source)]
    subprocess.run(["gcc", *options], check=True, timeout=LIMIT)
    with subprocess.Popen([program]) as process:
        wait_until(lambda: status(process.pid)["State"].startswith("S"))
        with pytest.raises(NotInjectable, match=reason):
            inject(process.pid, open_userfaultfd)
        wait_until(lambda: status(process.pid)["State"].startswith("S"))
        process.kill()


def test_a_filter_that_sends_a_signal_only_refuses() -> None:
    with Target("filtered, trap") as target:
        fields = target.fields()
        assert inject(target.pid, open_userfaultfd) == -errno.ENOSYS
        target.wait_for_fields(fields)
        assert target.end() == "back"
