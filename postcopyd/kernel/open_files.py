"""kcmp(2): whether two descriptors are of one open file, as copies of a descriptor are."""

from __future__ import annotations

import contextlib
import os
import platform
import stat

from postcopyd.kernel.system_calls import system_call

_KCMP = {"x86_64": 312, "aarch64": 272}
_KCMP_FILE = 0


def is_same(one: int, other: int) -> bool:
    """Tell whether two descriptors of this process are of one open file.

    Where the kernel does not tell, two of one regular file count as such.

    :raise OSError: if one of them is not open.
    """
    number, us = _KCMP.get(platform.machine()), os.getpid()
    if number is not None:
        with contextlib.suppress(OSError):
            return system_call("comparing descriptors", number, us, us, _KCMP_FILE, one, other) == 0
    status, other_status = os.fstat(one), os.fstat(other)
    return stat.S_ISREG(status.st_mode) and os.path.samestat(status, other_status)
