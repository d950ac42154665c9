"""memfd_create(2): memory that is a file."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2


def create(name: str, size: int, huge_page_size: int | None = None, sealable: bool = True) -> int:
    flags = os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if sealable else 0)
    if huge_page_size is not None:
        flags |= os.MFD_HUGETLB | (huge_page_size.bit_length() - 1) << os.MFD_HUGE_SHIFT
    descriptor = os.memfd_create(name, flags)
    try:
        os.ftruncate(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    result = _libc.fallocate(
        descriptor,
        _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE,
        ctypes.c_long(offset),
        ctypes.c_long(length),
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot punch a hole: {os.strerror(code)}")
