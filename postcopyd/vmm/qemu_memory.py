"""The memory behind a QEMU's RAM blocks: which kind it is, and whether post-copy can fill it.

What the process has mapped decides, not what its command line says. Nothing is changed in it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Final

import msgspec

from postcopyd.incoming.vmm import HandedBlock
from postcopyd.kernel import memory_file
from postcopyd.kernel.memory import HOST_PAGE_SIZE
from postcopyd.kernel.processes import pidfd_getfd, pidfd_open
from postcopyd.kernel.procfs import MappedRange, descriptor_table_size, mappings_with_flags
from postcopyd.vmm.adoption import AdoptionRefused
from postcopyd.vmm.qemu_texts import ListedBlock

_LOCKED: Final = "lo"
_HUGE_PAGES_ADVISED: Final = "hg"
_MEMFD: Final = "use memory-backend-memfd,share=on"

Ranges = tuple[tuple[int, int], ...]
"""Address and length of each, bytes."""


class FoundMemory(msgspec.Struct, frozen=True):
    """The memory of one QEMU, as the engine takes it."""

    blocks: tuple[HandedBlock, ...]
    huge_page_ranges: Ranges
    """Where the kernel may put huge pages in the place of ordinary ones."""

    @property
    def private_ranges(self) -> Ranges:
        """What can only be emptied from inside the process."""
        return tuple(
            (block.address, block.length) for block in self.blocks if block.memory_file is None
        )

    @property
    def has_huge_blocks(self) -> bool:
        """Whether a block consists of huge pages."""
        return any(block.page_size > HOST_PAGE_SIZE for block in self.blocks)

    @property
    def has_files(self) -> bool:
        """Whether a block is a memory file."""
        return any(block.memory_file is not None for block in self.blocks)


def find_memory(
    process_id: int, blocks: Sequence[ListedBlock], resources: ExitStack
) -> FoundMemory:
    """Find the mappings and the memory files of these blocks. Takes long enough for a thread.

    :param resources: closes the memory files.
    :raise AdoptionRefused: naming the block that cannot be filled, and the option to change.
    """
    try:
        mapped = list(mappings_with_flags(process_id))
        pidfd = pidfd_open(process_id)
        resources.callback(os.close, pidfd)
        finder = _Finder(process_id, pidfd, mapped, resources)
        handed = tuple(finder.find(block) for block in blocks)
    except (FileNotFoundError, ProcessLookupError):
        raise AdoptionRefused(f"QEMU, process {process_id}, has exited") from None
    except PermissionError as error:
        raise AdoptionRefused(
            f"the memory of QEMU, process {process_id}, may not be looked at ({error.strerror}): "
            "run postcopyd as the same user, or with CAP_SYS_PTRACE"
        ) from error
    return FoundMemory(handed, tuple(finder.huge_page_ranges))


class _Finder:
    def __init__(
        self,
        process_id: int,
        pidfd: int,
        mapped: list[tuple[MappedRange, frozenset[str]]],
        resources: ExitStack,
    ) -> None:
        self._process_id = process_id
        self._pidfd = pidfd
        self._mapped = mapped
        self._resources = resources
        self.huge_page_ranges: list[tuple[int, int]] = []

    def find(self, block: ListedBlock) -> HandedBlock:
        address = block.address
        assert address is not None
        pieces = self._pieces(block, address, address + block.used)
        first = pieces[0]
        if not first.permissions.endswith("s"):
            if first.inode and block.page_size == HOST_PAGE_SIZE:
                raise AdoptionRefused(
                    f"RAM block {block.name!r} is private memory of the file {first.path}: what "
                    f"the file holds would be taken for what has come; {_MEMFD}"
                )
            return HandedBlock(block.name, address, block.used, block.page_size, None, 0)
        return HandedBlock(
            block.name,
            address,
            block.used,
            block.page_size,
            self._memory_file(block, first),
            first.offset + address - first.start,
        )

    def _pieces(self, block: ListedBlock, begin: int, end: int) -> list[MappedRange]:
        """Return the mappings of a block: they are of one kind, without gaps, and writable."""
        pieces = []
        for mapped, flags in self._mapped:
            if mapped.start < end and mapped.end > begin:
                self._check_piece(block, mapped, flags)
                pieces.append(mapped)
                if _HUGE_PAGES_ADVISED in flags and block.page_size == HOST_PAGE_SIZE:
                    start = max(mapped.start, begin)
                    self.huge_page_ranges.append((start, min(mapped.end, end) - start))
        if (
            not pieces
            or pieces[0].start > begin
            or pieces[-1].end < end
            or not all(_goes_on(before, after) for before, after in pairwise(pieces))
        ):
            raise AdoptionRefused(
                f"RAM block {block.name!r} is not at {begin:#x} to {end:#x} of process "
                f"{self._process_id}, as QEMU says: it is not mapped there in one piece"
            )
        return pieces

    def _check_piece(self, block: ListedBlock, mapped: MappedRange, flags: frozenset[str]) -> None:
        if not mapped.permissions.startswith("rw"):
            raise AdoptionRefused(
                f"RAM block {block.name!r} is mapped without the right to write: use readonly=off"
            )
        if _LOCKED in flags:
            raise AdoptionRefused(
                f"RAM block {block.name!r} is locked in memory, where no page can be missing: "
                "start QEMU with -overcommit mem-lock=off"
            )

    def _memory_file(self, block: ListedBlock, mapped: MappedRange) -> int:
        """Return our own descriptor of the file that is mapped there."""
        file = self._open_file(mapped)
        if file is None:
            raise AdoptionRefused(
                f"RAM block {block.name!r} is shared memory ({mapped.path}) whose file cannot be "
                f"had: {_MEMFD}"
            )
        self._resources.callback(os.close, file)
        if block.page_size > HOST_PAGE_SIZE:
            if not memory_file.is_memory_file(file):
                raise AdoptionRefused(
                    f"RAM block {block.name!r} is the file {mapped.path}, which can shrink while "
                    "it is written: use memory-backend-memfd,hugetlb=on,share=on"
                )
        elif not memory_file.is_shared_memory(file):
            raise AdoptionRefused(
                f"RAM block {block.name!r} is the file {mapped.path}, which is not memory: {_MEMFD}"
            )
        end = mapped.offset + (mapped.end - mapped.start)
        if os.fstat(file).st_size < end:
            raise AdoptionRefused(
                f"RAM block {block.name!r} goes beyond the end of its file {mapped.path}"
            )
        return file

    def _open_file(self, mapped: MappedRange) -> int | None:
        """Return a copy of the descriptor through which the process has a mapped file open.

        They are tried one by one: to list another user's descriptors, or to open them, takes more
        rights than to trace its processes.
        """
        for number in range(descriptor_table_size(self._process_id)):
            try:
                copy = pidfd_getfd(self._pidfd, number)
            except OSError as error:
                if error.errno == errno.EBADF:
                    continue
                raise
            status = os.fstat(copy)
            device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
            if (device, status.st_ino) == (mapped.device, mapped.inode):
                return copy
            os.close(copy)
        return None


def _goes_on(before: MappedRange, after: MappedRange) -> bool:
    """Whether a mapping continues the one before it: same memory, same file."""
    return (
        before.end == after.start
        and before.permissions == after.permissions
        and (before.device, before.inode) == (after.device, after.inode)
        and (not before.inode or before.offset + before.end - before.start == after.offset)
    )
