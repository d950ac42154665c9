"""memfd_create(2): memory that is a file, of small pages (shmem) or huge ones (hugetlbfs)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path

from postcopyd.kernel.system_calls import failure, last_errno, libc

ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_HUGETLBFS_MAGIC = 0x958458F6
_TMPFS_MAGIC = 0x01021994


def create(name: str, size: int, huge_page_size: int | None = None, sealable: bool = True) -> int:
    """Return the close-on-exec descriptor of a new memory file of `size` bytes, all zeros.

    No memory is taken before it is touched or written. The caller closes it.

    :param name: what /proc shows; at most 249 bytes.
    :param huge_page_size: bytes; None for ordinary pages. `size` is a multiple of it.
    :raise OSError: if the kernel has no such huge pages, or `size` does not fit them.
    """
    flags = os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if sealable else 0)
    if huge_page_size is not None:
        flags |= os.MFD_HUGETLB | (huge_page_size.bit_length() - 1) << os.MFD_HUGE_SHIFT
    attempt = f"memory file {name!r} of {size} bytes"
    try:
        descriptor = os.memfd_create(name, flags)
    except OSError as error:
        hint = ""
        if huge_page_size is not None and error.errno in (errno.ENODEV, errno.EINVAL):
            hint = f"this kernel has no huge pages of {huge_page_size} bytes"
        raise failure(attempt, error.errno or errno.EIO, hint) from error
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        os.close(descriptor)
        hint = f"huge pages are of {huge_page_size} bytes" if huge_page_size else ""
        raise failure(attempt, error.errno or errno.EIO, hint) from error
    return descriptor


def seal(descriptor: int) -> None:
    """Make the file unchangeable for ever: neither its bytes nor its size nor its seals.

    :raise OSError: if it was created without `sealable` or is sealed already (EPERM), or somebody
        has it mapped for writing (EBUSY).
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, ALL_SEALS)
    except OSError as error:
        hint = "it is mapped for writing" if error.errno == errno.EBUSY else ""
        raise failure("sealing a memory file", error.errno or errno.EIO, hint) from error


def seals(descriptor: int) -> int:
    """Return the seals of a memory file, ``fcntl.F_SEAL_*``.

    :raise OSError: if it is none (EINVAL).
    """
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise failure("reading the seals of a memory file", error.errno or errno.EIO) from error


def open_again(descriptor: int) -> int:
    """Return a close-on-exec descriptor of the same memory file that is no copy of the given one.

    The caller closes it.

    :raise PermissionError: if we may not.
    :raise BlockingIOError: if somebody has a lease on it (F_SETLEASE), for which others would wait.
    :raise OSError: if it is no file, or descriptors are used up.
    """
    access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    return os.open(f"/proc/self/fd/{descriptor}", access | os.O_CLOEXEC | os.O_NONBLOCK)


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Give the memory of a range back: it reads as zeros, and is missing where it is mapped.

    Where a page, huge or not, is covered only in part, that part is filled with zeros and the page
    stays. (Huge pages: since Linux 5.19; before, that part is left alone.)

    :raise OSError: if the file is sealed (EPERM), or is none that has memory (EOPNOTSUPP).
    """
    if libc.fallocate(descriptor, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) < 0:
        raise failure(f"punching a hole of {length:#x} bytes at {offset:#x}", last_errno())


def is_memory_file(descriptor: int) -> bool:
    """Tell whether a descriptor of this process is of a file that memfd_create(2) has made.

    :raise FileNotFoundError: if it is not open.
    """
    link = str(Path(f"/proc/self/fd/{descriptor}").readlink())
    if not link.startswith("/memfd:"):
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        return False  # a file of that name on some disk
    return True


def huge_page_size_of(descriptor: int) -> int | None:
    """Return the page size of a file of huge pages, in bytes; None for any other file.

    :raise OSError: if the descriptor is not open.
    """
    kind, block_size = _file_system_of(descriptor)
    return block_size if kind == _HUGETLBFS_MAGIC else None


def is_shared_memory(descriptor: int) -> bool:
    """Tell whether a file is memory of ordinary pages: on a tmpfs, or made by memfd_create(2).

    :raise OSError: if the descriptor is not open.
    """
    return _file_system_of(descriptor)[0] == _TMPFS_MAGIC


def _file_system_of(descriptor: int) -> tuple[int, int]:
    """Return the kind of a file's file system and its block size, both of statfs(2)."""
    # struct statfs begins with f_type and f_bsize, both long, on every 64-bit machine.
    status = (ctypes.c_long * 32)()
    if libc.fstatfs(descriptor, ctypes.byref(status)) < 0:
        raise failure(f"asking for the file system of descriptor {descriptor}", last_errno())
    return int(status[0]), int(status[1])
