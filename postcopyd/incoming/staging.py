"""Where pages wait that come before the switchover.

Before it a page may come any number of times and may be discarded again, so it must not go where
only UFFDIO_COPY may write (that places once). Two kinds of memory, two ways:

- Shared memory whose memory file the VMM handed over: pages are written straight into the file,
  a discard punches a hole. The VMM finds them there without a fault.
- Private memory: pages wait in a sparse staging file of ours. After LISTEN they are placed from
  there, the ones that a fault waits for first; once the guest runs the others follow, and each hole
  that is punched behind them gives the memory back. Until then everything stays, because another
  VMM may have to take the place of one that could not load its devices.

Files are written with pwrite, not through a mapping: a VMM that shrinks its file, or a machine
that runs out of memory, gives an errno then and not a SIGBUS that would end the daemon.
"""

from __future__ import annotations

import fcntl
import os

from bitarray import bitarray

from postcopyd.incoming.vmm import HandedBlock
from postcopyd.kernel import memory_file
from postcopyd.kernel.memory import HOST_PAGE_SIZE, Mapping, advise
from postcopyd.ram.block import RamBlock
from postcopyd.ram.page_map import BlockMap

_BLOCK = 512
"""Bytes: the unit of st_blocks."""

_MOVE = 1 << 20
"""Bytes that are moved at a time to another VMM's memory."""

_MADV_POPULATE_READ = 22  # Linux 5.14; Python's mmap has no name for it


class BlockStage:
    """The staging of one block. Offsets and lengths are bytes in the block, whole target pages.

    Every method that writes raises OSError when the file does not take it.
    """

    def __init__(
        self, block: RamBlock, handed: HandedBlock, maps: BlockMap, staging: int | None = None
    ) -> None:
        """Stage in the VMM's memory file, or where it has none in a staging file.

        :param staging: descriptor of the staging file, which is taken over; None where the VMM
            has a memory file.
        :raise OSError: if there is no memory or the file cannot be used.
        :raise ValueError: if the staging file has not the size of the block.
        """
        self.block = block
        self._maps = maps
        self.direct = handed.memory_file is not None
        """True when pages go straight into the VMM's memory."""
        self._mapping: Mapping | None = None
        self._view: memoryview | None = None
        if staging is None:
            assert handed.memory_file is not None
            self._file = os.dup(handed.memory_file)
            self._file_offset = handed.file_offset
        else:
            self._file = staging
            self._file_offset = 0
        self._huge = block.page_size > HOST_PAGE_SIZE
        self._moving = False
        try:
            if self.direct and self._huge:
                self._map_huge_file()
            elif not self.direct:
                # What is mapped beyond the end of a file is a SIGBUS.
                if (found := os.fstat(self._file).st_size) != block.length:
                    raise ValueError(f"the staging of {block.name!r} has {found} bytes")
                self._mapping = Mapping.of_file(self._file, block.length)
        except BaseException:
            os.close(self._file)
            raise

    def address_of(self, offset: int, length: int) -> int:
        """Return where staged bytes lie in this process, mapped and ready to be copied from.

        The kernel copies with page faults off: a byte that is not mapped yet makes it copy twice.
        """
        assert self._mapping is not None
        address = self._mapping.address + offset
        advise(address, length, _MADV_POPULATE_READ)
        return address

    def _map_huge_file(self) -> None:
        # A hugetlb file has no write(2), so it must be mapped; sealed against shrinking, and
        # with each page reserved before it is touched, the mapping cannot raise SIGBUS.
        seals = fcntl.fcntl(self._file, fcntl.F_GET_SEALS)
        if not seals & fcntl.F_SEAL_SHRINK:
            try:
                fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"the memory file of block {self.block.name!r} can shrink under us: create it "
                    f"with MFD_ALLOW_SEALING or seal it with F_SEAL_SHRINK",
                ) from error
        self._mapping = Mapping.of_file(self._file, self.block.length, self._file_offset)
        self._view = self._mapping.view

    @property
    def allocated(self) -> int:
        """Bytes of memory that the file takes."""
        return os.fstat(self._file).st_blocks * _BLOCK

    def write(self, offset: int, payload: memoryview) -> None:
        """Keep page content; the last one counts."""
        self._store(offset, payload)
        self._mark(offset, len(payload), staged=not self.direct, zero=False)

    def _store(self, offset: int, payload: memoryview) -> None:
        if self._view is None:
            self._write_file(offset, payload)
        else:
            self._reserve(offset, len(payload))
            self._view[offset : offset + len(payload)] = payload

    def write_zeros(self, offset: int, length: int) -> None:
        """Keep zero pages: for pages of the common size as knowledge, not as bytes."""
        if not self._huge:
            size = self.block.page_size
            if self._maps.received[offset // size : (offset + length) // size].any():
                self._punch(offset, length)
            self._mark(offset, length, staged=False, zero=True)
        else:
            self.write(offset, memoryview(bytes(length)))

    def _write_file(self, offset: int, payload: memoryview) -> None:
        while payload:
            written = os.pwrite(self._file, payload, self._file_offset + offset)
            offset += written
            payload = payload[written:]

    def _reserve(self, offset: int, length: int) -> None:
        size = self.block.page_size
        first = offset // size
        for page in range(first, (offset + length + size - 1) // size):
            if self._moving or not self._maps.received[page]:
                os.posix_fallocate(self._file, self._file_offset + page * size, size)

    def discard(self, offset: int, length: int) -> None:
        """Forget what has come there: it is stale, or never came. Whole host pages."""
        self._punch(offset, length)
        size = self.block.page_size
        pages = slice(offset // size, (offset + length) // size)
        maps = self._maps
        maps.received[pages] = maps.staged[pages] = maps.zero[pages] = 0

    def release(self, first: int, count: int) -> None:
        """Give back the memory of `count` host pages from `first` on, which are placed now."""
        size = self.block.page_size
        self._maps.staged[first : first + count] = 0
        self._punch(first * size, count * size)

    def empty(self) -> None:
        """Drop all content, also what the VMM wrote before."""
        self.discard(0, self.block.length)

    def take_over(self, other: BlockStage) -> None:
        """Copy what `other` has of the same block, for another VMM that has not run yet.

        Both have the same maps, which do not change by it; this one's memory has nothing to keep.
        Takes as long as copying does.
        """
        if self._is_in_the_place_of(other):
            return
        self._punch(0, self.block.length)
        self._moving = True
        size = self.block.page_size
        present = self._present()
        step = max(_MOVE // size, 1)
        page = present.find(1)
        while page >= 0:
            beyond = present.find(0, page, page + step)
            count = (beyond if beyond >= 0 else min(page + step, len(present))) - page
            self._store(page * size, other._read(page * size, count * size))
            page = present.find(1, page + count)
        self._moving = False

    def _is_in_the_place_of(self, other: BlockStage) -> bool:
        """Tell whether both have the same memory: VMMs may open one file, one after the other."""
        ours, theirs = os.fstat(self._file), os.fstat(other._file)
        same_file = (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)
        return same_file and self._file_offset == other._file_offset

    def all_is_staged(self) -> None:
        """Have everything that is here wait to be placed. After `take_over`."""
        self._maps.staged[: self.block.pages] = self._present()

    def nothing_is_staged(self) -> None:
        """Have nothing wait to be placed: it is in the VMM's memory. After `take_over`."""
        self._maps.staged.setall(0)

    def _present(self) -> bitarray:
        """Return which pages are here with content of their own."""
        pages = self.block.pages
        return self._maps.received[:pages] & ~self._maps.zero[:pages]

    def _read(self, offset: int, length: int) -> memoryview:
        if self._mapping is not None:
            return self._mapping.view[offset : offset + length]
        return memoryview(os.pread(self._file, length, self._file_offset + offset))

    def _punch(self, offset: int, length: int) -> None:
        memory_file.punch_hole(self._file, self._file_offset + offset, length)

    def _mark(self, offset: int, length: int, *, staged: bool, zero: bool) -> None:
        size = self.block.page_size
        pages = slice(offset // size, (offset + length + size - 1) // size)
        maps = self._maps
        maps.received[pages] = 0  # to a successor it has not come while it is neither
        maps.zero[pages] = zero
        maps.staged[pages] = staged
        maps.received[pages] = 1

    def close(self) -> None:
        """Release mapping and file. Idempotent."""
        if self._file < 0:
            return
        if self._mapping is not None:
            self._mapping.close()
        os.close(self._file)
        self._file = -1
