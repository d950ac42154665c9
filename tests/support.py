"""What tests of every room use: bounded waits, guests that fault, counting what is left."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 20.0
"""Seconds after which a wait is a failure."""

# Of proc(5), VmFlags: huge pages, locked, watched for missing, write-protected and minor.
_NOTABLE_FLAGS = frozenset({"ht", "lo", "um", "uw", "ui"})

libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.restype = ctypes.c_void_p
libc.memcpy.restype = libc.memset.restype = ctypes.c_void_p


def wait_until(predicate: Callable[[], object], seconds: float = LIMIT) -> None:
    """Return when `predicate` holds. For what can be asked only: wait for a descriptor instead."""
    deadline = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < deadline, f"has not come true in {seconds} s"
        os.sched_yield()


def wait_readable(descriptor: int, seconds: float = LIMIT) -> None:
    """Return when something can be read from `descriptor`."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(seconds * 1000), f"nothing to read in {seconds} s"


class GuestThread:
    """A call of the C library in a thread of its own, without the interpreter's lock.

    So it may touch memory whose pages the rest of this process has to bring. Its arguments are
    addresses and lengths.
    """

    def __init__(self, function: Callable[..., int], *arguments: int) -> None:
        self._result: int | None = None

        def run() -> None:
            self._result = function(*(ctypes.c_size_t(argument) for argument in arguments))

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def thread_id(self) -> int:
        """What the kernel calls the thread."""
        assert self._thread.native_id is not None
        return self._thread.native_id

    @property
    def waits(self) -> bool:
        """True until the call has returned."""
        return self._thread.is_alive()

    def result(self) -> int:
        """Wait for the call to return; return its result."""
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), "the call has not returned"
        assert self._result is not None, "the call has failed"
        return self._result


class GuestRead(GuestThread):
    """Reads `length` bytes of memory in a thread."""

    def __init__(self, address: int, length: int = 8) -> None:
        self._buffer = ctypes.create_string_buffer(length)
        super().__init__(libc.memcpy, ctypes.addressof(self._buffer), address, length)

    def data(self) -> bytes:
        """Wait for the read to end; return what it has read."""
        self.result()
        return self._buffer.raw


class GuestWrite(GuestThread):
    """Fills `length` bytes of memory with one value in a thread."""

    def __init__(self, address: int, value: int, length: int = 8) -> None:
        super().__init__(libc.memset, address, value, length)


def run_python(code: str, *arguments: str, seconds: float = LIMIT) -> str:
    """Run code in a Python of its own that finds the project; return what it prints.

    It must end by itself, with status 0.
    """
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
    return done.stdout


def belongings() -> Counter[str]:
    """Count what this process holds: descriptors, threads, children, and mapped memory.

    Of memory that of deleted files (memory files are such), and what is huge, locked or watched
    by a userfaultfd: the other comes and goes with the allocator.
    """
    gc.collect()
    held: Counter[str] = Counter()
    for entry in os.listdir("/proc/self/fd"):
        try:
            # Without the number of a socket or pipe: an event loop makes its own ones anew.
            held[re.sub(r":\[\d+\]$", "", os.readlink(f"/proc/self/fd/{entry}"))] += 1
        except FileNotFoundError:  # the one that has listed the directory
            continue
    del held["/dev/null"]  # the event loop keeps one in reserve, from its first socket on
    held["thread"] = threading.active_count()
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        held["child"] = 1
    except ChildProcessError:
        pass
    path = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapped := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)", line):
            path = mapped[1]
        elif line.startswith("VmFlags:"):
            flags = _NOTABLE_FLAGS.intersection(line.split())
            if flags or path.endswith("(deleted)"):
                held[f"mapping {path} {' '.join(sorted(flags))}"] += 1
    return held
