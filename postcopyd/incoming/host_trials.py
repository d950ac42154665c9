"""What post-copy does to memory, done once each on real memory of this process.

A trial returns what was seen, or raises: `Missing` when this host does not have what it takes,
OSError when the kernel refuses. The rule of this file: watched memory is touched only from threads
inside a call of the C library, which has no interpreter lock, and every wait ends after `LIMIT`.
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
from postcopyd.kernel.huge_pages import free_huge_pages, huge_page_sizes
from postcopyd.kernel.memory import HOST_PAGE_SIZE, Mapping
from postcopyd.kernel.system_calls import failure, libc
from postcopyd.kernel.userfaultfd import (
    EVENT_PAGEFAULT,
    EVENT_REMOVE,
    EVENT_UNMAP,
    MODE_DONT_WAKE,
    PAGEFAULT_MINOR,
    PAGEFAULT_WRITE_PROTECT,
    Feature,
    Operation,
    RegisterMode,
    Userfaultfd,
    UserfaultfdUnavailable,
)

LIMIT: Final = 2.0
"""Seconds after which something that should happen at once has not happened."""

_NO_FEATURES = Feature(0)
_PLACE = Operation.COPY | Operation.WAKE
_CONTENT = b"postcopy"


class Missing(Exception):
    """This host lacks something: what was seen, and what to do about it."""

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.remedy = remedy


def _unexpected(detail: str) -> Missing:
    return Missing(detail, "This kernel does not do what it promises: use another one")


class _Thread:
    """A call of the C library in a thread, which may wait for a page."""

    def __init__(self, call: Callable[..., object], *arguments: int) -> None:
        self._thread = threading.Thread(
            target=call, args=[ctypes.c_size_t(argument) for argument in arguments], daemon=True
        )
        self._thread.start()

    @property
    def thread_id(self) -> int | None:
        return self._thread.native_id

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def ended(self) -> bool:
        """Wait until the call has returned; False if it does not."""
        self._thread.join(LIMIT)
        return not self._thread.is_alive()


class _Read(_Thread):
    """Reads 8 bytes."""

    def __init__(self, address: int) -> None:
        self._buffer = ctypes.create_string_buffer(len(_CONTENT))
        super().__init__(libc.memcpy, ctypes.addressof(self._buffer), address, len(_CONTENT))

    def expect(self, content: bytes) -> None:
        """Wait until the read has ended, with `content`."""
        if not self.ended():
            raise _unexpected("the page was placed, but the thread that waits for it still waits")
        if self._buffer.raw != content:
            raise _unexpected(f"{content!r} was placed, but the thread read {self._buffer.raw!r}")


class Trial:
    """A userfaultfd, memory that it watches, and the threads that touch that."""

    def __init__(self, userfaultfd: Userfaultfd, stack: ExitStack) -> None:
        self.userfaultfd = userfaultfd
        self._stack = stack
        self._threads: list[_Thread] = []
        self._source = self.private(1)
        self._source.view[: len(_CONTENT)] = _CONTENT

    @property
    def stuck(self) -> bool:
        """True while a thread touches the memory: it must not be unmapped."""
        return not all([thread.ended() for thread in self._threads])

    # -- memory ------------------------------------------------------------------------------

    def private(self, pages: int) -> Mapping:
        """Map private memory of ordinary pages, all missing."""
        mapping = self._keep(Mapping.anonymous(pages * HOST_PAGE_SIZE))
        # Where all of this process is locked, new memory comes with its pages.
        memory_lock.unlock(mapping.address, mapping.length)
        memory.advise(mapping.address, mapping.length, mmap.MADV_DONTNEED)
        return mapping

    def shared(self, huge_page_size: int | None = None) -> tuple[Mapping, Mapping]:
        """Map one page of a new memory file twice, missing in the file."""
        length = huge_page_size or HOST_PAGE_SIZE
        descriptor = memory_file.create("postcopyd-check", length, huge_page_size)
        try:
            first = self._keep(Mapping.of_file(descriptor, length))
            second = self._keep(Mapping.of_file(descriptor, length))
            for mapping in (first, second):
                memory_lock.unlock(mapping.address, mapping.length)
            memory_file.punch_hole(descriptor, 0, length)
        finally:
            os.close(descriptor)
        return first, second

    def _keep(self, mapping: Mapping) -> Mapping:
        self._stack.callback(lambda: None if self.stuck else mapping.close())
        return mapping

    def register(
        self,
        mapping: Mapping,
        mode: RegisterMode = RegisterMode.MISSING,
        needed: Operation = _PLACE,
    ) -> Operation:
        """Watch all of a mapping."""
        return self.userfaultfd.register(mapping.address, mapping.length, mode, needed)

    # -- touching ----------------------------------------------------------------------------

    def start(self, call: Callable[..., object], *arguments: int) -> _Thread:
        """Start a call in a thread that may wait for a page."""
        thread = _Thread(call, *arguments)
        self._threads.append(thread)
        return thread

    def read(self, address: int) -> _Read:
        """Start a read of 8 bytes."""
        thread = _Read(address)
        self._threads.append(thread)
        return thread

    def event(self, expected: int = EVENT_PAGEFAULT) -> tuple[int, int, int]:
        """Wait for an event of the kind `expected`; return its other fields."""
        poll = select.poll()
        poll.register(self.userfaultfd.fileno(), select.POLLIN)
        if not poll.poll(LIMIT * 1000):
            raise _unexpected(f"event {expected:#x} did not come within {LIMIT:g} s")
        for event, *fields in self.userfaultfd.read_events():
            if event != expected:
                raise _unexpected(f"event {event:#x} came instead of {expected:#x}")
            return fields[0], fields[1], fields[2]
        raise _unexpected("the userfaultfd is readable, but there is no event")

    def fault(self, address: int) -> tuple[_Read, tuple[int, int, int]]:
        """Start a read and wait for its fault."""
        thread = self.read(address)
        return thread, self.event()

    # -- placing -----------------------------------------------------------------------------

    def copy(self, address: int, length: int = HOST_PAGE_SIZE, mode: int = 0) -> None:
        """Place one page."""
        source = self._source if length == HOST_PAGE_SIZE else self._large_source(length)
        placed("UFFDIO_COPY", self.userfaultfd.copy(address, source.address, length, mode), length)

    def _large_source(self, length: int) -> Mapping:
        source = self._keep(Mapping.anonymous(length))
        source.view[: len(_CONTENT)] = _CONTENT
        return source


def placed(operation: str, result: int, length: int) -> None:
    """Check the outcome of a placing that must succeed."""
    if result < 0:
        raise failure(operation, -result)
    if result != length:
        raise _unexpected(f"{operation} placed {result} bytes of {length}")


@contextmanager
def trial(features: Feature = _NO_FEATURES) -> Iterator[Trial]:
    """Give a userfaultfd with the handshake done; at the end nothing is left of the trial."""
    with ExitStack() as stack:
        userfaultfd = open_any()
        try:
            userfaultfd.handshake(features)
            with_memory = Trial(userfaultfd, stack)
            # Closing it lets everybody go on who still waits, so it comes before the memory.
            stack.callback(userfaultfd.close)
            yield with_memory
        finally:
            userfaultfd.close()


def open_any() -> Userfaultfd:
    """Open a userfaultfd that also waits for the kernel's accesses, else one that does not."""
    try:
        return Userfaultfd.open()
    except UserfaultfdUnavailable:
        return Userfaultfd.open(user_mode_only=True)


# -- the trials ----------------------------------------------------------------------------------


def opening() -> str:
    """Open a userfaultfd in some way."""
    try:
        Userfaultfd.open().close()
    except UserfaultfdUnavailable:
        Userfaultfd.open(user_mode_only=True).close()
        return "for accesses in user mode only"
    return "for accesses of the kernel as well"
