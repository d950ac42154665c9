"""Memory of a VMM with neighbours: whoever writes one byte beside a block is found out."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator

from postcopyd.incoming.vmm import FedBlock, GuestMemory, HandedBlock
from postcopyd.kernel import memory_file
from postcopyd.kernel.memory import Mapping
from postcopyd.kernel.userfaultfd import Feature, Userfaultfd
from postcopyd.wire.messages import BlockEntry
from tests.incoming.engine import InProcessVmm
from tests.incoming.guest import Guest

PAGE = mmap.PAGESIZE
HUGE = 2 << 20
_NEIGHBOURS = 3
"""Pages in front of a block, and behind it."""


class GuardedBlock:
    """A block in the middle of a mapping whose other pages have a pattern."""

    def __init__(self, name: str, pages: int, page_size: int = PAGE, shared: bool = False) -> None:
        self.name = name
        self.page_size = page_size
        self.length = pages * page_size
        neighbours = 1 if page_size > PAGE else _NEIGHBOURS
        self._beside = neighbours * page_size
        whole = self.length + 2 * self._beside
        huge = page_size if page_size > PAGE else None
        self._file: int | None = None
        if shared:
            self._file = memory_file.create(f"guarded {name}", whole, huge)
            self._mapping = Mapping.of_file(self._file, whole)
        else:
            self._mapping = Mapping.anonymous(whole, huge)
        self.address = self._mapping.address + self._beside
        self._pattern = (b"%-16s" % name.encode()[:16]) * (self._beside // 16)
        for start in (self._mapping.address, self.address + self.length):
            ctypes.memmove(start, self._pattern, self._beside)

    @property
    def handed(self) -> HandedBlock:
        offset = 0 if self._file is None else self._beside
        return HandedBlock(self.name, self.address, self.length, self.page_size, self._file, offset)

    def assert_neighbours_unchanged(self) -> None:
        for start in (self._mapping.address, self.address + self.length):
            assert ctypes.string_at(start, self._beside) == self._pattern, self.name

    def empty(self) -> None:
        """Drop all pages of the block. Nobody watches it."""
        if self._file is None:
            view = self.address - self._mapping.address
            assert _madvise(self._mapping.address + view, self.length, mmap.MADV_DONTNEED) == 0
        else:
            memory_file.punch_hole(self._file, self._beside, self.length)

    def close(self) -> None:
        self._mapping.close()
        if self._file is not None:
            os.close(self._file)


_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class GuardedMemory:
    """Watched blocks with neighbours, and one block that is not watched."""

    def __init__(self, *blocks: GuardedBlock) -> None:
        self.blocks = blocks
        self.fed = FedBlock("rom", 4 * PAGE, 8 * PAGE)
        self._userfaultfd = Userfaultfd.open()
        self._userfaultfd.handshake(
            Feature.EVENT_REMOVE
            | Feature.EVENT_UNMAP
            | Feature.THREAD_ID
            | Feature.MISSING_SHMEM
            | Feature.MISSING_HUGETLBFS
        )
        self.memory = GuestMemory(
            tuple(block.handed for block in blocks), self._userfaultfd, registered=False
        )

    @property
    def entries(self) -> list[BlockEntry]:
        """The blocks as a right source announces them."""
        watched = [BlockEntry(block.name, block.length, block.page_size) for block in self.blocks]
        return [*watched, BlockEntry(self.fed.name, self.fed.length, PAGE)]

    def begin_anew(self) -> None:
        """Let go of every thread that waits, and have nothing in any block."""
        for block in self.blocks:
            with contextlib.suppress(OSError):
                self._userfaultfd.unregister(block.address, block.length)
        while any(True for _ in self._userfaultfd.read_events()):
            pass
        for block in self.blocks:
            block.empty()

    def close(self) -> None:
        self._userfaultfd.close()
        for block in self.blocks:
            block.close()


@contextlib.contextmanager
def guarded_memory(*blocks: GuardedBlock) -> Iterator[GuardedMemory]:
    memory = GuardedMemory(*blocks)
    try:
        yield memory
        for block in blocks:
            block.assert_neighbours_unchanged()
    finally:
        memory.close()


class GuardedVmm(InProcessVmm):
    """A VMM of this process with such memory."""

    def __init__(self, memory: GuardedMemory, any_guest: Guest) -> None:
        super().__init__(any_guest)
        self._guarded = memory
        self.fed_blocks = (memory.fed,)

    @property
    def memory(self) -> GuestMemory:
        return self._guarded.memory
