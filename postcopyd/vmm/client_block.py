"""The RAM blocks of a Python VMM: memory of its own process that it hands to postcopyd."""

from __future__ import annotations

import mmap
import os
from typing import Self

from postcopyd.kernel import memory, memory_file


class Block:
    """One RAM block of this process. Close it when nothing uses its memory any more."""

    def __init__(
        self,
        name: str,
        address: int,
        length: int,
        page_size: int = mmap.PAGESIZE,
        *,
        descriptor: int | None = None,
        file_offset: int = 0,
    ) -> None:
        """Describe memory that is mapped already; `at` reads better."""
        self.name = name
        self.address = address
        """Bytes."""
        self.length = length
        """Bytes, a multiple of `page_size`."""
        self.page_size = page_size
        """Of the pages that back the memory, bytes."""
        self.descriptor = descriptor
        """The memory file behind shared memory; None for private memory."""
        self.file_offset = file_offset
        """Where in it the block begins, bytes."""
        self._mapping: memory.Mapping | None = None

    @classmethod
    def anonymous(cls, name: str, length: int, page_size: int = mmap.PAGESIZE) -> Self:
        """Map new private memory, of huge pages if `page_size` says so.

        :raise OSError: if there is no memory, or no such huge pages.
        """
        huge = page_size if page_size > mmap.PAGESIZE else None
        return cls._of(name, page_size, memory.Mapping.anonymous(length, huge), None)

    @classmethod
    def memory_file(cls, name: str, length: int, page_size: int = mmap.PAGESIZE) -> Self:
        """Create a memory file and map it shared, with huge pages if `page_size` says so.

        :raise OSError: if there is no memory, or no such huge pages.
        """
        huge = page_size if page_size > mmap.PAGESIZE else None
        descriptor = memory_file.create(name, length, huge)
        try:
            return cls._of(name, page_size, memory.Mapping.of_file(descriptor, length), descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def at(
        cls,
        name: str,
        address: int,
        length: int,
        page_size: int = mmap.PAGESIZE,
        *,
        descriptor: int | None = None,
        file_offset: int = 0,
    ) -> Self:
        """Describe memory that this process has mapped already; it stays the caller's.

        :param descriptor: the memory file, when the memory is a shared mapping of one.
        """
        return cls(name, address, length, page_size, descriptor=descriptor, file_offset=file_offset)

    @classmethod
    def _of(
        cls, name: str, page_size: int, mapping: memory.Mapping, descriptor: int | None
    ) -> Self:
        block = cls(name, mapping.address, mapping.length, page_size, descriptor=descriptor)
        block._mapping = mapping
        return block

    @property
    def view(self) -> memoryview:
        """The memory itself.

        :raise ValueError: if the block was not mapped here.
        """
        if self._mapping is None:
            raise ValueError(f"the memory of block {self.name!r} was not mapped by this class")
        return self._mapping.view

    def close(self) -> None:
        """Unmap what was mapped here, close the memory file that was created here. Idempotent.

        Not while a migration into it is under way, nor after one that has failed before
        `Destination.close`: unmapping waits for somebody to read the userfaultfd.
        """
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
            if self.descriptor is not None:
                os.close(self.descriptor)
                self.descriptor = None
