"""The memory to be sent: RAM blocks whose contents are files.

The files are mapped, never copied. They must not shrink while an image is open: a page behind a
file's end cannot be read, and the kernel answers an access to one with SIGBUS.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Final

import msgspec
from bitarray import bitarray

from postcopyd.wire.messages import BlockEntry
from postcopyd.wire.names import encode_name
from postcopyd.wire.stream_format import SMALLEST_HOST_PAGE, TARGET_PAGE_SIZE

CHUNK_BYTES: Final = 128 << 10
"""Memory that is looked at in one go: between two such the event loop gets its turn."""
ZERO_PAGE: Final = bytearray(TARGET_PAGE_SIZE)
"""To be compared with a page, and on the left of it: that is one memcmp, where a view on the left
compares byte by byte."""


class ImageError(ValueError):
    """A file cannot be served as a RAM block; the text names the block and what to do."""


class BlockFile(msgspec.Struct, frozen=True):
    """What a RAM block is made of."""

    name: str
    """Its name in the stream, 1 to 255 bytes."""
    path: Path
    """A regular file; one on hugetlbfs or tmpfs, or /proc/self/fd/N, will do."""
    offset: int = 0
    """Where the block begins in the file, bytes."""
    length: int | None = None
    """Bytes, a multiple of `page_size`; None for the rest of the file."""
    page_size: int = SMALLEST_HOST_PAGE
    """Host page size that the block is announced with, a power of two."""


class ImageBlock:
    """One RAM block, open. `memory` shows the file as it is now."""

    def __init__(self, source: BlockFile) -> None:
        """Open and map the file.

        :raise ImageError: if it cannot be served.
        """
        self.name = source.name
        self.page_size = source.page_size
        self._offset = source.offset
        with ExitStack() as undo:
            try:
                self._descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
                undo.callback(os.close, self._descriptor)
                status = os.fstat(self._descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise ImageError(f"block {self.name!r}: {source.path} is not a regular file")
                self.length = _checked_length(source, status.st_size)
                # The whole file: hugetlbfs maps nothing that is not whole huge pages.
                self._mapping = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)
            except OSError as error:
                raise ImageError(
                    f"block {self.name!r}: cannot open {source.path}: {error.strerror}"
                ) from error
            undo.pop_all()
        self._whole = memoryview(self._mapping)
        self.memory = self._whole[source.offset : source.offset + self.length]
        """The block's bytes, read-only."""

    @property
    def pages(self) -> int:
        """Number of host pages."""
        return self.length // self.page_size

    @property
    def entry(self) -> BlockEntry:
        """What the block list says of it."""
        return BlockEntry(self.name, self.length, self.page_size)

    def holes(self) -> bitarray:
        """Return one bit a *target* page: 1 if nothing was ever written there, so that it is zero.

        A file that is written to meanwhile may lose a hole later, never gain one that is not zero.

        :raise OSError: if the file system cannot be asked.
        """
        pages = self.length // TARGET_PAGE_SIZE
        holes = bitarray(pages)
        holes.setall(1)
        place, end = self._offset, self._offset + self.length
        while place < end:
            try:
                data = os.lseek(self._descriptor, place, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # no data from here to the end of the file
            if data >= end:
                break
            place = min(os.lseek(self._descriptor, data, os.SEEK_HOLE), end)
            first = (data - self._offset) // TARGET_PAGE_SIZE
            behind = -(-(place - self._offset) // TARGET_PAGE_SIZE)
            holes[first:behind] = 0
        return holes

    def close(self) -> None:
        """Close the file; it is unmapped when the last view of `memory` has gone. Idempotent."""
        if self._descriptor < 0:
            return
        self.memory.release()
        self._whole.release()
        with suppress(BufferError):  # a traceback may hold views: no reason to hide its error
            self._mapping.close()
        os.close(self._descriptor)
        self._descriptor = -1


def _checked_length(source: BlockFile, file_size: int) -> int:
    """Return the length of the block, all of it in the file and in whole pages."""

    def refuse(what: str) -> ImageError:
        return ImageError(f"block {source.name!r}: {what}")

    try:
        encode_name(source.name)
    except ValueError as error:
        raise ImageError(str(error)) from None
    size = source.page_size
    if size < SMALLEST_HOST_PAGE or size & (size - 1):
        raise refuse(f"page size {size} is not a power of two from {SMALLEST_HOST_PAGE} on")
    if not file_size:
        raise refuse(f"{source.path} is empty")
    if not 0 <= source.offset < file_size:
        raise refuse(f"offset {source.offset} is outside {source.path} of {file_size} bytes")
    rest = file_size - source.offset
    length = rest if source.length is None else source.length
    if not 0 < length <= rest:
        raise refuse(
            f"length {length} is not there: {source.path} has {rest} bytes from offset "
            f"{source.offset} on"
        )
    if length % size:
        raise refuse(
            f"length {length} is not a multiple of its page size {size}: the nearest below is "
            f"{length - length % size}"
        )
    return length


class MemoryImage:
    """RAM blocks, in the order in which they are announced. A context manager that closes them."""

    def __init__(self, files: Sequence[BlockFile]) -> None:
        """Open all files.

        :raise ImageError: if there is none, two have the same name, or one cannot be served.
        """
        if not files:
            raise ImageError("a memory image needs at least one block")
        names = [file.name for file in files]
        for name in names:
            if names.count(name) > 1:
                raise ImageError(f"two blocks have the name {name!r}")
        self.blocks: tuple[ImageBlock, ...] = ()
        try:
            for file in files:
                self.blocks += (ImageBlock(file),)
        except BaseException:
            self.close()
            raise

    @property
    def length(self) -> int:
        """Bytes of all blocks together."""
        return sum(block.length for block in self.blocks)

    @property
    def page_sizes(self) -> int:
        """The host page sizes of all blocks, or-ed together, as ADVISE announces them."""
        summary = 0
        for block in self.blocks:
            summary |= block.page_size
        return summary

    def close(self) -> None:
        """Close all blocks. Idempotent."""
        for block in self.blocks:
            block.close()

    def __enter__(self) -> MemoryImage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
