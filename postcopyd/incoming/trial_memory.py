"""Memory of this process under a userfaultfd, to try out what the kernel does with it.

The rule of this file: watched memory is touched only from threads inside a call of the C library,
which has no interpreter lock, and every wait ends after `LIMIT`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from postcopyd.kernel import memory, memory_file, memory_lock
from postcopyd.kernel.memory import HOST_PAGE_SIZE, Mapping
from postcopyd.kernel.system_calls import failure, libc
from postcopyd.kernel.userfaultfd import (
    EVENT_PAGEFAULT,
    Feature,
    Operation,
    RegisterMode,
    Userfaultfd,
    UserfaultfdUnavailable,
)

LIMIT: Final = 2.0
"""Seconds after which something that should happen at once has not happened."""

CONTENT: Final = b"postcopy"
"""What the pages begin with that are placed."""

_NO_FEATURES = Feature(0)
_PLACE = Operation.COPY | Operation.WAKE


class Missing(Exception):
    """Something is not to be had on this host: what was seen, and what to do about it."""

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.remedy = remedy


def unexpected(detail: str) -> Missing:
    """Return what to raise when the kernel does something else than it promises."""
    return Missing(detail, "This kernel does not do what it promises: use another version")


class Call:
    """A call of the C library in a thread of its own, which may wait for a page."""

    def __init__(self, function: Callable[..., object], *arguments: int) -> None:
        self._thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._thread.start()

    @property
    def thread_id(self) -> int | None:
        """What the kernel calls the thread."""
        return self._thread.native_id

    @property
    def waits(self) -> bool:
        """True until the call has returned."""
        return self._thread.is_alive()

    def returned(self) -> bool:
        """Wait until the call has returned; False if it does not."""
        self._thread.join(LIMIT)
        return not self._thread.is_alive()


class Read(Call):
    """Reads the first bytes of a page."""

    def __init__(self, address: int) -> None:
        self._buffer = ctypes.create_string_buffer(len(CONTENT))
        super().__init__(libc.memcpy, ctypes.addressof(self._buffer), address, len(CONTENT))

    def expect(self, content: bytes) -> None:
        """Wait until the read has ended, with `content`.

        :raise Missing: if it does not end, or with something else.
        """
        if not self.returned():
            raise unexpected("the page was placed, but the thread that waits for it still waits")
        if self._buffer.raw != content:
            raise unexpected(f"{content!r} was placed, but the thread read {self._buffer.raw!r}")


class TrialMemory:
    """Mappings, a userfaultfd that may watch them, and threads that touch them.

    Every method raises `Missing` when the kernel does not do what it promises, and OSError when
    it refuses.
    """

    def __init__(self, userfaultfd: Userfaultfd, stack: ExitStack) -> None:
        """Use `trial_memory` instead."""
        self.userfaultfd = userfaultfd
        self._stack = stack
        self._calls: list[Call] = []

    def private(self, length: int = HOST_PAGE_SIZE) -> Mapping:
        """Map private memory of ordinary pages, all of them missing."""
        mapping = self._keep(Mapping.anonymous(length))
        # Where all of this process is locked, new memory comes with its pages.
        memory_lock.unlock(mapping.address, mapping.length)
        memory.advise(mapping.address, mapping.length, mmap.MADV_DONTNEED)
        return mapping

    def shared(self, page_size: int = HOST_PAGE_SIZE) -> tuple[Mapping, Mapping]:
        """Map one page of a new memory file twice; it is missing in the file as well."""
        huge_page_size = page_size if page_size > HOST_PAGE_SIZE else None
        descriptor = memory_file.create("postcopyd-check", page_size, huge_page_size)
        try:
            pair = tuple(self._keep(Mapping.of_file(descriptor, page_size)) for _ in range(2))
            for mapping in pair:
                memory_lock.unlock(mapping.address, mapping.length)
            memory_file.punch_hole(descriptor, 0, page_size)
        finally:
            os.close(descriptor)
        return pair[0], pair[1]

    def _keep(self, mapping: Mapping) -> Mapping:
        def close() -> None:
            # Memory that a thread still touches must stay.
            if all(call.returned() for call in self._calls):
                mapping.close()

        self._stack.callback(close)
        return mapping

    def register(
        self,
        mapping: Mapping,
        mode: RegisterMode = RegisterMode.MISSING,
        needed: Operation = _PLACE,
    ) -> Operation:
        """Watch all of a mapping; return the operations that it allows."""
        return self.userfaultfd.register(mapping.address, mapping.length, mode, needed)

    def call(self, function: Callable[..., object], *arguments: int) -> Call:
        """Start a call of the C library that may touch the memory."""
        self._calls.append(Call(function, *arguments))
        return self._calls[-1]

    def read(self, address: int) -> Read:
        """Start a read of the memory."""
        read = Read(address)
        self._calls.append(read)
        return read

    def event(self, expected: int = EVENT_PAGEFAULT) -> tuple[int, int, int]:
        """Wait for an event, which must be of the kind `expected`; return its other fields."""
        poll = select.poll()
        poll.register(self.userfaultfd.fileno(), select.POLLIN)
        if not poll.poll(LIMIT * 1000):
            raise unexpected(f"event {expected:#x} did not come within {LIMIT:g} s")
        for event, *fields in self.userfaultfd.read_events():
            if event != expected:
                raise unexpected(f"event {event:#x} came instead of {expected:#x}")
            return fields[0], fields[1], fields[2]
        raise unexpected("the userfaultfd polls readable, but there is no event")

    def faulting_read(self, address: int) -> tuple[Read, tuple[int, int, int]]:
        """Start a read and wait until its fault has come; return the fault's fields as well."""
        read = self.read(address)
        return read, self.event()

    def copy(self, destination: Mapping, mode: int = 0) -> None:
        """Place one page that begins with `CONTENT`, as large as the mapping."""
        length = destination.length
        source = self._keep(Mapping.anonymous(length))
        source.view[: len(CONTENT)] = CONTENT
        result = self.userfaultfd.copy(destination.address, source.address, length, mode)
        expect_placed("UFFDIO_COPY", result, length)


def expect_placed(operation: str, result: int, length: int) -> None:
    """Check what a placing that must succeed has returned.

    :raise OSError: if the kernel has refused.
    :raise Missing: if it has placed only a part.
    """
    if result < 0:
        raise failure(operation, -result)
    if result != length:
        raise unexpected(f"{operation} placed {result} bytes of {length}")


@contextmanager
def trial_memory(features: Feature = _NO_FEATURES) -> Iterator[TrialMemory]:
    """Give trial memory, with the handshake done; at the end nothing is left of it.

    :raise OSError: if no userfaultfd is to be had, or it has not these features.
    """
    with ExitStack() as stack:
        userfaultfd = open_any()
        try:
            userfaultfd.handshake(features)
            yield TrialMemory(userfaultfd, stack)
        finally:
            # Before the memory goes: now everybody who still waits goes on.
            userfaultfd.close()


def open_any() -> Userfaultfd:
    """Open a userfaultfd: for the kernel's accesses too, else for those in user mode only.

    :raise UserfaultfdUnavailable: if neither is allowed.
    """
    try:
        return Userfaultfd.open()
    except UserfaultfdUnavailable:
        return Userfaultfd.open(user_mode_only=True)
