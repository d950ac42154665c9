"""What a receiver costs: processor time of processes, and of the threads of a QEMU that receive."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from tests.interop.qemu import Qemu


class ProcessorTime:
    """Processor time since it was made: of the destination QEMU, and of a daemon if there is one.

    A QEMU's processors are left out: their threads run the guest, which under TCG takes all that it
    can get. What is left are the threads that receive; some have ended by the time one asks, so
    they are what the whole process has taken less what the processors have.
    """

    def __init__(self, qemu: Qemu, processors: list[int], daemon: int | None) -> None:
        self._qemu = qemu.pid
        self._processors = processors
        self._daemon = daemon
        self._before = self._now()

    @classmethod
    async def of(cls, qemu: Qemu, daemon: int | None) -> ProcessorTime:
        """Begin to count."""
        processors = [entry["thread-id"] for entry in await qemu.execute("query-cpus-fast")]
        return cls(qemu, processors, daemon)

    def seconds(self) -> float:
        """What has been taken so far."""
        return self._now() - self._before

    def _now(self) -> float:
        receivers = _process_seconds(self._qemu) - sum(
            _thread_seconds(self._qemu, thread) for thread in self._processors
        )
        return receivers + (_process_seconds(self._daemon) if self._daemon else 0.0)


def _process_seconds(process: int) -> float:
    """By the process's own clock: /proc counts in ticks of 10 ms."""
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(process, ctypes.byref(clock))
    if error:
        raise OSError(error, os.strerror(error))
    return time.clock_gettime(clock.value)


def _thread_seconds(process: int, thread: int) -> float:
    """Another process's thread has a clock for nobody else; schedstat counts nanoseconds too."""
    return int(Path(f"/proc/{process}/task/{thread}/schedstat").read_text().split()[0]) / 1e9
