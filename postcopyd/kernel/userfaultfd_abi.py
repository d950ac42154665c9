"""What linux/userfaultfd.h calls things: events, flags, features, modes, operations, answers."""

from __future__ import annotations

import errno
from enum import IntFlag

EVENT_PAGEFAULT = 0x12
EVENT_FORK = 0x13
EVENT_REMAP = 0x14
EVENT_REMOVE = 0x15
EVENT_UNMAP = 0x16

PAGEFAULT_WRITE = 1
"""Flag of a page fault: it was a write."""
PAGEFAULT_WRITE_PROTECT = 2
"""Flag of a page fault: the page is there, but write-protected."""
PAGEFAULT_MINOR = 4
"""Flag of a page fault: the page is in the memory file, but not mapped."""

MODE_DONT_WAKE = 1
"""Of every placing operation: leave who waits for the page waiting."""
MODE_WRITE_PROTECT = 2
"""Of copy and continue: map the page write-protected."""
MODE_ALLOW_HOLES = 2
"""Of move: what is missing in the source is not an error."""

PRESENT = -errno.EEXIST
"""The page is there already, and stays as it is."""
CHANGING = -errno.EAGAIN
"""The memory's layout is changing: an event of this userfaultfd is unread, or a fork goes on."""
GONE = (-errno.ENOENT, -errno.ESRCH)
"""The range is not mapped or not registered (any more); the process has exited."""
NO_MEMORY = (-errno.ENOMEM, -errno.ENOSPC)
"""No page to be had: memory, a limit of a control group or of a tmpfs, the pool of huge pages.

Linux 6.18 does not say so of huge pages of which none is free: it says `PRESENT` instead."""


class Feature(IntFlag):
    """What a userfaultfd can do beyond missing anonymous pages (UFFD_FEATURE_*)."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16

    @property
    def since(self) -> str:
        """The first Linux, on x86-64, that has all of these features, such as ``6.8``."""
        versions = [version for bits, version in _SINCE if self & bits]
        return versions[-1] if versions else "4.3"


# In the order of the releases.
_SINCE = (
    (
        Feature.EVENT_FORK
        | Feature.EVENT_REMAP
        | Feature.EVENT_REMOVE
        | Feature.EVENT_UNMAP
        | Feature.MISSING_HUGETLBFS
        | Feature.MISSING_SHMEM,
        "4.11",
    ),
    (Feature.SIGBUS | Feature.THREAD_ID, "4.14"),
    (Feature.PAGEFAULT_FLAG_WP, "5.7"),
    (Feature.MINOR_HUGETLBFS, "5.13"),
    (Feature.MINOR_SHMEM, "5.14"),
    (Feature.EXACT_ADDRESS, "5.18"),
    (Feature.WP_HUGETLBFS_SHMEM, "5.19"),
    (Feature.WP_UNPOPULATED, "6.4"),
    (Feature.POISON, "6.6"),
    (Feature.WP_ASYNC, "6.7"),
    (Feature.MOVE, "6.8"),
)


class RegisterMode(IntFlag):
    """What a registered range reports (UFFDIO_REGISTER_MODE_*)."""

    MISSING = 1
    WRITE_PROTECT = 2
    MINOR = 4


class Operation(IntFlag):
    """Bits of the mask of ioctls that REGISTER gives back."""

    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08
    API = 1 << 0x3F
