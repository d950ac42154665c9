"""A process of its own with memory under a userfaultfd, of which the test takes a copy."""

from __future__ import annotations

import os
import subprocess
import sys
from types import TracebackType
from typing import Self

from postcopyd.kernel.processes import pidfd_getfd, pidfd_open
from postcopyd.kernel.userfaultfd import Feature, Userfaultfd
from tests.kernel.watched import NO_FEATURES
from tests.support import LIMIT, ROOT, wait_readable

_PROGRAM = """
import ctypes, os, sys, threading
from postcopyd.kernel.memory import Mapping
from postcopyd.kernel.userfaultfd import Feature, Operation, RegisterMode, Userfaultfd

libc = ctypes.CDLL(None)
mapping = Mapping.anonymous(int(sys.argv[1]), reserve=False)
userfaultfd = Userfaultfd.open()
userfaultfd.handshake(Feature(int(sys.argv[2])))
userfaultfd.register(mapping.address, mapping.length, RegisterMode.MISSING, Operation.COPY)
print(mapping.address, userfaultfd.fileno(), flush=True)
for line in sys.stdin:
    print(eval(line), flush=True)
"""


class GuestProcess:
    """Its memory is `mapping` there, all registered; `address` is where it lies there."""

    def __init__(self, length: int, features: Feature = NO_FEATURES) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(length), str(int(features))],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.pid = self._process.pid
        address, self.descriptor = (int(word) for word in self.answer().split())
        self.address = address
        self.pidfd = pidfd_open(self.pid)
        self.userfaultfd = Userfaultfd(pidfd_getfd(self.pidfd, self.descriptor))

    def ask(self, expression: str) -> None:
        """Have an expression evaluated there."""
        assert self._process.stdin is not None
        self._process.stdin.write(expression.encode() + b"\n")

    def answer(self) -> str:
        """Wait for the value of the next expression."""
        assert self._process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            wait_readable(self._process.stdout.fileno())
            data = os.read(self._process.stdout.fileno(), 4096)
            assert data, "the guest process has ended"
            line += data
        return line.decode().strip()

    def kill(self) -> None:
        """End the process; its memory is gone when this returns."""
        self._process.kill()
        self._process.wait(LIMIT)

    def close(self) -> None:
        """End the process and let go of everything. Idempotent."""
        self.userfaultfd.close()
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
