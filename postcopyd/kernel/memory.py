"""mmap(2) and madvise(2): memory of this process, and what the kernel knows of it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import re
import weakref
from types import TracebackType
from typing import Final, Self

from postcopyd.kernel.system_calls import failure, last_errno, libc

HOST_PAGE_SIZE: Final = mmap.PAGESIZE
"""Bytes."""

# Python's mmap module has neither of these before 3.13.
_MAP_NORESERVE = 0x4000
_MAP_HUGETLB = 0x40000
_MAP_HUGE_SHIFT = 26
_MAP_FAILED = ctypes.c_void_p(-1).value

_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")
_ADVICE_NAMES = {value: name for name, value in vars(mmap).items() if name.startswith("MADV_")}


class Mapping:
    """A mapped range of this process. Close it: it is not unmapped by itself.

    Making one touches no memory, and holds no descriptor.
    """

    def __init__(self, length: int, protection: int, flags: int, descriptor: int, offset: int):
        """Map `length` bytes; one of the constructors below reads better."""
        address = libc.mmap(None, length, protection, flags, descriptor, offset)
        if address == _MAP_FAILED:
            hint = ""
            if flags & _MAP_HUGETLB:
                hint = "not that many huge pages are free, or there are none of that size"
            raise failure(f"mapping {length:#x} bytes of memory", last_errno(), hint)
        self.address: Final[int] = address
        """Of the first byte."""
        self.length: Final = length
        """Bytes."""
        self._writable = bool(protection & mmap.PROT_WRITE)
        self._closed = False
        array = (ctypes.c_ubyte * length).from_address(address)
        # Every view of the memory, and of a part of it, keeps this object: it tells whether one
        # is left.
        self._array = weakref.ref(array)
        self.view = _view_of(array, self._writable)
        """The memory itself. A missing page makes the thread that touches it wait with the
        interpreter's lock held: not to be touched where this process has to bring the page."""

    @classmethod
    def anonymous(
        cls, length: int, huge_page_size: int | None = None, *, reserve: bool = True
    ) -> Self:
        """Map private memory that reads as zeros.

        :param huge_page_size: bytes, `length` is a multiple of it; None for ordinary pages.
        :param reserve: whether memory is promised to it now: huge pages, or what the kernel's
            overcommit policy counts. If not, touching it when there is none kills the process.
        :raise OSError: if there is no address space or not that many huge pages (ENOMEM), or if
            the kernel has none of that size (EINVAL, ENODEV).
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if huge_page_size is not None:
            flags |= _MAP_HUGETLB | (huge_page_size.bit_length() - 1) << _MAP_HUGE_SHIFT
        if not reserve:
            flags |= _MAP_NORESERVE
        return cls(length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)

    @classmethod
    def of_file(cls, descriptor: int, length: int, offset: int = 0, writable: bool = True) -> Self:
        """Map a part of a file, shared. The descriptor stays the caller's, and may be closed.

        :param offset: bytes, whole pages of the file.
        :raise OSError: if `offset` is not (EINVAL), the file is not open for that (EACCES) or
            sealed (EPERM), or not that many huge pages are free (ENOMEM).
        """
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return cls(length, protection, mmap.MAP_SHARED, descriptor, offset)

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._closed

    def close(self) -> None:
        """Unmap it. Idempotent.

        :raise BufferError: if somebody still holds a part of `view`; it stays mapped then.
        """
        if self._closed:
            return
        self.view.release()
        array = self._array()
        if array is not None:
            self.view = _view_of(array, self._writable)
            raise BufferError(f"the memory at {self.address:#x} is still in use")
        self._closed = True
        if libc.munmap(self.address, self.length) < 0:
            raise failure(f"unmapping {self.address:#x}+{self.length:#x}", last_errno())

    def close_when_unused(self) -> None:
        """Unmap it as soon as nobody holds a part of `view` any more: now, or later by itself."""
        if self._closed:
            return
        self.view.release()
        array = self._array()
        if array is None:
            self.close()
        else:
            self._closed = True
            weakref.finalize(array, libc.munmap, self.address, self.length)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _view_of(array: ctypes.Array[ctypes.c_ubyte], writable: bool) -> memoryview:
    view = memoryview(array).cast("B")
    return view if writable else view.toreadonly()


def advise(address: int, length: int, advice: int) -> None:
    """Advise the kernel of a range of this process: ``mmap.MADV_*``. Waits for nobody's page.

    With a userfaultfd that reports removals, DONTNEED and REMOVE return only when its REMOVE
    event has been read, so another thread has to read it.

    :raise OSError: if the range is not mapped (ENOMEM); if it is not made of whole pages, is
        locked in memory (DONTNEED), or the kernel is built without such pages (HUGEPAGE), or
        is none that the advice is for (EINVAL).
    """
    if libc.madvise(address, length, advice) < 0:
        code = last_errno()
        name = _ADVICE_NAMES.get(advice, str(advice))
        hint = ""
        if code == errno.EINVAL and advice in (mmap.MADV_DONTNEED, mmap.MADV_REMOVE):
            hint = "memory that is locked (mlock) must be unlocked first"
        raise failure(f"madvise {name} of {address:#x}+{length:#x}", code, hint)


def page_size_of(address: int) -> int:
    """Return the size of the pages behind an address of this process, in bytes.

    From ``KernelPageSize`` in /proc/self/smaps, so it takes milliseconds in a large process.

    :raise OSError: if nothing is mapped there (EFAULT).
    """
    inside = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if match := _RANGE.match(line):
                inside = int(match[1], 16) <= address < int(match[2], 16)
            elif inside and line.startswith("KernelPageSize:"):
                return int(line.split()[1]) << 10
    raise failure(f"page size of memory at {address:#x}", errno.EFAULT, "nothing is mapped there")
