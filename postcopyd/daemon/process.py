"""What the daemon asks of its process: a name, descriptors, memory that stays, no long pauses."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import resource
from pathlib import Path
from typing import Final

from postcopyd.daemon.logging import get_logger
from postcopyd.kernel import memory_lock

_CAP_IPC_LOCK: Final = 14  # linux/capability.h
_REMEDY: Final = (
    "raise the limit of locked memory (LimitMEMLOCK=infinity in the unit, ulimit -l unlimited in "
    "a shell), or set memory_lock = false"
)


def set_name(name: str) -> None:
    """Have ps(1) and top(1) show this process by `name`, of at most 15 bytes (proc(5), comm)."""
    with contextlib.suppress(OSError):  # where /proc cannot be written to it is python
        Path("/proc/self/comm").write_text(name)


def allow_descriptors(count: int) -> None:
    """Have at least `count` descriptors, or as many as the hard limit lets us have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinity = resource.RLIM_INFINITY
    wanted = count if hard == infinity else min(count, hard)
    if soft != infinity and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < count:
        get_logger().warning(
            "fewer descriptors than configured",
            descriptors=wanted,
            configured=count,
            remedy="raise the hard limit (LimitNOFILE= in the unit), or lower limits.descriptors",
        )


def may_open(count: int) -> bool:
    """Tell whether this process may have so many more descriptors."""
    opened: list[int] = []
    try:
        for _ in range(count):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return True


def lock_memory() -> None:
    """Keep our memory from being swapped out: each page once it is used, those to come included.

    Where that is not allowed it is logged, with what to do.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    if hard != resource.RLIM_INFINITY and not _may_lock_beyond_limit():
        # All that is mapped counts, used or not. A limit that is enough for now would later let
        # a mapping fail, in the middle of a migration.
        get_logger().warning(
            "our memory may be swapped out, which makes guests wait",
            reason=f"the limit of locked memory is {hard} bytes",
            remedy=_REMEDY,
        )
        return
    try:
        memory_lock.lock_all(on_fault=True)
    except OSError as error:
        get_logger().warning(
            "our memory may be swapped out, which makes guests wait",
            reason=str(error),
            remedy=_REMEDY,
        )


def quiet_collector() -> None:
    """Leave out of every later collection what is here now: a full one would hold up faults."""
    gc.collect()
    gc.freeze()


def _may_lock_beyond_limit() -> bool:
    status = Path("/proc/self/status").read_text()
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return effective is not None and bool(int(effective[1], 16) >> _CAP_IPC_LOCK & 1)
