"""A process that is caught in the middle of something (target.c), and what must become of it."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from postcopyd.kernel.procfs import mappings
from tests.support import LIMIT, ROOT, wait_readable, wait_until

HERE = Path(__file__).parent

# What it is caught in -> the system call in which it waits then.
WAITS = {
    "nanosleep": {"x86_64": 230, "aarch64": 115},  # glibc's is clock_nanosleep
    "ppoll": {"x86_64": 271, "aarch64": 73},
    "ppoll timed": {"x86_64": 271, "aarch64": 73},
    "futex": {"x86_64": 202, "aarch64": 98},
    "futex timed": {"x86_64": 202, "aarch64": 98},
    "read": {"x86_64": 0, "aarch64": 63},
    "epoll_wait": {"x86_64": 232, "aarch64": 22},
    "pause": {"x86_64": 34, "aarch64": 73},
    "sigsuspend": {"x86_64": 130, "aarch64": 133},
    "deep": {"x86_64": 0, "aarch64": 63},
    "cornered": {"x86_64": 0, "aarch64": 63},
    "memory": {"x86_64": 0, "aarch64": 63},
    "filtered, error": {"x86_64": 0, "aarch64": 63},
    "filtered, trap": {"x86_64": 0, "aarch64": 63},
    "filtered, kill": {"x86_64": 0, "aarch64": 63},
    "without rights": {"x86_64": 0, "aarch64": 63},
}
RUNS = ("registers", "critical section", "flooded", "threads")

# What it prints: result, errno, seconds; for the others the line.
OUTCOMES = {
    "registers": r"0",
    "flooded": r"0",
    "threads": r"all go on",
    "nanosleep": r"0 - 0\.[5-9]\d\d",
    "ppoll": r"1 - \S+",
    "ppoll timed": r"0 - 0\.[5-9]\d\d",
    "futex": r"0 - \S+",
    "futex timed": r"-1 ETIMEDOUT 0\.[5-9]\d\d",
    "read": r"0 - \S+",
    "epoll_wait": r"1 - \S+",
    "pause": r"-1 EINTR \S+\n1 1",
    "sigsuspend": r"-1 EINTR \S+\n1 1",
    "deep": r"0 1",
    "stopped": r"continued",
}
ALL = tuple(OUTCOMES)
LASTS = frozenset({"nanosleep", "ppoll timed", "futex timed"})
"""What ends by itself, after half a second."""


@functools.cache
def program() -> Path:
    """Return the compiled program; it is kept from one test run to the next."""
    sources = [HERE / "target.c", HERE / "target.S"]
    # Bound at once: binding later takes more stack than some of it leaves.
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-Wl,-z,now"]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "postcopyd"
    built = cache / f"target-{digest[:16]}"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = cache / f"target-{os.getpid()}"
        subprocess.run(["gcc", *options, "-o", unfinished, *sources], check=True, timeout=LIMIT)
        unfinished.rename(built)
    return built


def status(pid: int) -> dict[str, str]:
    """Return /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return dict(re.findall(r"^(\w+):[ \t]*(.*)$", text, re.MULTILINE))


class Target:
    """The program, in the middle of what it is told to do; ended when the block is left."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.process = subprocess.Popen(
            [program(), what], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None
        wait_readable(self.process.stdout.fileno())
        assert self.process.stdout.read(6) == b"ready\n"
        wait_until(self._caught)

    def _caught(self) -> bool:
        if self.what == "stopped":
            return status(self.pid)["State"].startswith("T")
        if self.what == "vfork":
            return status(self.pid)["State"].startswith("D")
        if self.what in WAITS:
            number = str(WAITS[self.what][platform.machine()])
            return Path(f"/proc/{self.pid}/syscall").read_text().split()[0] == number
        return True

    def fields(self) -> tuple[str, ...]:
        """Return what must not change: its state, who traces it, what it blocks and handles."""
        now = status(self.pid)
        names = ("TracerPid", "SigBlk", "SigIgn", "SigCgt", "Threads")
        # What runs may be waiting for its turn or not.
        state = "running" if self.what in RUNS else now["State"]
        return (state, *(now[name] for name in names))

    def wait_for_fields(self, expected: tuple[str, ...]) -> None:
        """Wait until it is again as it was: it may be on its way back into a system call."""
        wait_until(lambda: self.fields() == expected)

    def end(self) -> str:
        """Have it come to its end; return what it has printed."""
        if self.what == "stopped":
            self.process.send_signal(signal.SIGCONT)
        if self.what in LASTS:  # its input stays, or ppoll would end
            assert self.process.wait(LIMIT) == 0
        output, _ = self.process.communicate(timeout=LIMIT)
        assert self.process.returncode == 0
        return output.decode().strip()

    def line(self) -> str:
        """Return the next line that it prints."""
        assert self.process.stdout is not None
        wait_readable(self.process.stdout.fileno())
        return self.process.stdout.readline().decode().strip()

    def stack(self) -> bytes:
        """Return what is on the stack of its main thread, and below, as far as it has grown."""
        (stack,) = (mapped for mapped in mappings(self.pid) if mapped.path == "[stack]")
        with open(f"/proc/{self.pid}/mem", "rb") as memory:
            memory.seek(stack.start)
            return memory.read(stack.end - stack.start)

    def descriptors(self) -> list[str]:
        """Return what it has open, by number."""
        directory = f"/proc/{self.pid}/fd"
        numbers = sorted(os.listdir(directory), key=int)
        return [os.readlink(f"{directory}/{number}") for number in numbers]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.communicate(timeout=LIMIT)


_TRACER = """
import os, signal, sys
from postcopyd.kernel import injection

def work(injector):
    injector.call("close", injector.call("userfaultfd", os.O_CLOEXEC | os.O_NONBLOCK))

def die_at(fatal_step):
    def at_step(step):
        if step == fatal_step:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
    return at_step

for line in sys.stdin:
    pid, step = line.rstrip().split(" ", 1)
    child = os.fork()
    if child == 0:
        injection.at_step = die_at(step)
        injection.inject(int(pid), work)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class DoomedTracers:
    """Processes that trace, inject system calls, and are killed in the middle of it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TRACER],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def trace(self, pid: int, step: str) -> None:
        """Have one trace a process; return when it has been killed after a step."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{pid} {step}\n".encode())
        wait_readable(self._process.stdout.fileno())
        assert int(self._process.stdout.readline()) == -signal.SIGKILL

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate(timeout=LIMIT)
