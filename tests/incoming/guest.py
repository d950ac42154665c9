"""A guest in this very process: memory under a userfaultfd, and threads that touch it.

The memory is only ever touched through ctypes calls, which release the interpreter lock: a fault
under the lock would stop the thread that has to answer it.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from postcopyd.incoming.vmm import GuestMemory, HandedBlock
from postcopyd.kernel import memory_file
from postcopyd.kernel.userfaultfd import (
    Feature,
    Operation,
    RegisterMode,
    Userfaultfd,
)

PAGE = mmap.PAGESIZE
HUGE = 2 << 20
LIMIT = 20.0
"""Seconds after which a wait is a failure."""

_libc = ctypes.CDLL(None, use_errno=True)
_memcpy = _libc.memcpy
_memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

DONTNEED = 4


_MAP_FIXED = 0x10


def _fenced_place(length: int) -> int:
    """Return where `length` bytes may be mapped, in front of a page of an ordinary file."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    place: int = _mmap(None, length + PAGE, mmap.PROT_READ, flags, -1, 0)
    with open(__file__, "rb") as file:
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        fence = _mmap(place + length, PAGE, mmap.PROT_READ, flags, file.fileno(), 0)
    assert fence == place + length
    return place


class Touch:
    """One access of a thread of its own; its result is there when the page is."""

    def __init__(self, address: int, length: int) -> None:
        self._result = ctypes.create_string_buffer(length)
        # Has a method as its target, so that the buffer lives as long as the thread.
        self.thread = threading.Thread(target=self._copy, args=(address, length), daemon=True)
        self.thread.start()

    def _copy(self, address: int, length: int) -> None:
        _memcpy(ctypes.addressof(self._result), address, length)

    @property
    def waits(self) -> bool:
        return self.thread.is_alive()

    def result(self) -> bytes:
        self.thread.join(LIMIT)
        assert not self.thread.is_alive(), "the access still waits"
        return self._result.raw


@dataclass
class Guest:
    """Memory of `pages` host pages, registered for missing pages unless told otherwise."""

    pages: int = 64
    page_size: int = PAGE
    shared: bool = False
    register: bool = True
    predecessor: Guest | None = None
    """Whose memory file it has, if it is shared memory and not a file of its own."""
    reserve: bool = True
    """Whether huge pages are promised to the mapping; else placing may find the pool empty."""
    fenced: bool = False
    """Whether memory lies behind it that no userfaultfd can watch: else one that is told a wrong
    length may watch whatever this process has there."""
    features: Feature = Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.THREAD_ID
    name: str = "pc.ram"
    address: int = field(init=False)
    userfaultfd: Userfaultfd = field(init=False)
    memory_file: int | None = field(init=False, default=None)
    _threads: list[threading.Thread] = field(init=False, default_factory=list)
    """That use the memory, or have done so."""

    def __post_init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        descriptor = -1
        features = self.features
        huge = self.page_size if self.page_size != PAGE else None
        if self.shared:
            if self.predecessor is None:
                descriptor = memory_file.create("guest", self.length, huge)
            else:
                assert self.predecessor.memory_file is not None
                descriptor = os.dup(self.predecessor.memory_file)
            self.memory_file = descriptor
            flags = mmap.MAP_SHARED
            features |= Feature.MISSING_HUGETLBFS if huge else Feature.MISSING_SHMEM
        elif huge:
            flags |= 0x40000 | 21 << 26  # MAP_HUGETLB of 2 MiB
            features |= Feature.MISSING_HUGETLBFS
        if not self.reserve:
            flags |= 0x4000  # MAP_NORESERVE
        place = None
        if self.fenced:
            place = _fenced_place(self.length)
            flags |= _MAP_FIXED
        address = _mmap(place, self.length, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0)
        assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
        self.address = address
        self.userfaultfd = Userfaultfd.open()
        self.userfaultfd.handshake(features)
        if self.register:
            self.userfaultfd.register(
                self.address, self.length, RegisterMode.MISSING, Operation.COPY
            )

    @property
    def length(self) -> int:
        return self.pages * self.page_size

    @property
    def memory(self) -> GuestMemory:
        block = HandedBlock(
            self.name, self.address, self.length, self.page_size, self.memory_file, 0
        )
        return GuestMemory((block,), self.userfaultfd, registered=self.register)

    def touch(self, page: int, length: int = PAGE) -> Touch:
        """Read the head of a page in a thread of its own."""
        touch = Touch(self.address + page * self.page_size, length)
        self._threads.append(touch.thread)
        return touch

    def read(self, page: int) -> bytes:
        """Read the head of a page in the calling thread, which must not be the event loop's."""
        buffer = ctypes.create_string_buffer(PAGE)
        _memcpy(ctypes.addressof(buffer), self.address + page * self.page_size, PAGE)
        return buffer.raw

    async def content(self) -> bytes:
        """Read all memory, off the event loop: it may fault."""
        return await asyncio.to_thread(
            lambda: b"".join(
                self.touch(page, self.page_size).result() for page in range(self.pages)
            )
        )

    def wait_for_event(self) -> None:
        """Return when an event can be read."""
        poll = select.poll()
        poll.register(self.userfaultfd.fileno(), select.POLLIN)
        assert poll.poll(LIMIT * 1000), "no fault came"

    def remove(self, first: int, count: int = 1) -> threading.Thread:
        """Give pages back, in a thread: it waits until the event is read."""
        return self._start(
            _madvise, self.address + first * self.page_size, count * self.page_size, DONTNEED
        )

    def lose_memory(self) -> None:
        """Have an ordinary file in the place of the memory, which no userfaultfd can watch."""
        with open(__file__, "rb") as file:
            flags = mmap.MAP_PRIVATE | _MAP_FIXED
            place = _mmap(self.address, self.length, mmap.PROT_READ, flags, file.fileno(), 0)
        assert place == self.address

    def unmap(self, first: int, count: int) -> threading.Thread:
        """Unmap pages, in a thread: it waits until the event is read."""
        return self._start(_munmap, self.address + first * self.page_size, count * self.page_size)

    def _start(self, function: Callable[..., object], *arguments: int) -> threading.Thread:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)
        return thread

    def close(self) -> None:
        """Let go of the memory, when no thread is in it any more."""
        self.userfaultfd.close()
        for thread in self._threads:
            thread.join(LIMIT)
            assert not thread.is_alive(), "a thread still waits for memory that is to be unmapped"
        _munmap(self.address, self.length + (PAGE if self.fenced else 0))
        if self.memory_file is not None:
            os.close(self.memory_file)

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
