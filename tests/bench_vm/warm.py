"""Free memory that is really there."""

from __future__ import annotations

import contextlib
import errno
import mmap
from typing import Final

_POPULATE_WRITE: Final = 23
"""MADV_POPULATE_WRITE of linux/mman.h, since Linux 5.14; Python 3.11 has no name for it."""


def warm(size: int) -> None:
    """Use `size` bytes of memory once and give them back.

    Where the bench runs in a VM, its host takes free memory away. The first use of a page then
    costs 12 us instead of 1, and the run that meets more such pages loses.
    """
    with contextlib.closing(mmap.mmap(-1, size)) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        try:
            memory.madvise(_POPULATE_WRITE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            for offset in range(0, size, mmap.PAGESIZE):
                memory[offset] = 1
