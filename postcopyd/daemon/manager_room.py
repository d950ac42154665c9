"""Whether the service manager has room for all that migrations leave with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from postcopyd.daemon.logging import get_logger

MOST_OF_ONE: Final = 20
"""Descriptors that a migration leaves: nine and more, by what its VMM has of memory."""


def check(environment: Mapping[str, str], migrations: int) -> None:
    """Log it if the service manager does not keep what so many migrations may leave with it.

    It drops what is too much and tells nobody. Its limit is known from systemd 254 on.
    """
    limit = environment.get("FDSTORE", "")
    needed = migrations * MOST_OF_ONE
    if limit.isdecimal() and int(limit) < needed:
        get_logger().warning(
            "the service manager does not keep what so many migrations may leave: "
            "if all of the daemon is killed guests may be lost",
            keeps=int(limit),
            may_leave=needed,
            remedy=f"set FileDescriptorStoreMax={needed} in the unit, or lower limits.migrations "
            f"to {int(limit) // MOST_OF_ONE}",
        )
