"""mlockall(2), mlock(2): keeping memory of this process from being swapped out."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from postcopyd.kernel.system_calls import failure, last_errno, libc

_MCL_CURRENT = 1
_MCL_FUTURE = 2
_MCL_ONFAULT = 4
_HINT = "give the right CAP_IPC_LOCK, or raise the limit RLIMIT_MEMLOCK (LimitMEMLOCK=infinity)"


def lock_all(on_fault: bool) -> None:
    """Lock all memory of this process, and all that it will map.

    :param on_fault: lock each page when it is first touched. If not, every page is brought into
        memory now, and those of later mappings when they are mapped: nothing is missing any more.
    :raise OSError: if the limit of locked memory is too low (ENOMEM), or zero (EPERM).
    """
    flags = _MCL_CURRENT | _MCL_FUTURE | (_MCL_ONFAULT if on_fault else 0)
    if libc.mlockall(flags) < 0:
        raise _failure("locking all memory")


def unlock_all() -> None:
    """Unlock all memory of this process, and stop locking what it maps."""
    if libc.munlockall() < 0:
        raise _failure("unlocking all memory")


def lock(address: int, length: int) -> None:
    """Bring a range into memory and lock it there.

    :raise OSError: if the limit of locked memory is too low, or a part is not mapped (ENOMEM), or
        the limit is zero (EPERM).
    """
    if libc.mlock(address, length) < 0:
        raise _failure(f"locking {address:#x}+{length:#x}")


def unlock(address: int, length: int) -> None:
    """Unlock a range.

    :raise OSError: if a part is not mapped (ENOMEM).
    """
    if libc.munlock(address, length) < 0:
        raise failure(f"unlocking {address:#x}+{length:#x}", last_errno())


def locked_bytes(pid: int | None = None) -> int:
    """Return how much memory a process has locked (VmLck), missing pages included.

    :param pid: None for this process.
    :raise FileNotFoundError: if it has exited.
    """
    status = Path(f"/proc/{pid or 'self'}/status").read_text()
    match = re.search(r"^VmLck:\s*(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) << 10 if match else 0  # a process that is exiting has no memory


def _failure(attempt: str) -> OSError:
    code = last_errno()
    return failure(attempt, code, _HINT if code in (errno.ENOMEM, errno.EPERM) else "")
