"""Poisoning: what will never come becomes a memory error for whoever touches it, and never zeros.

UFFDIO_POISON (Linux 6.6) leaves a mark where the page would be; an access to it is a SIGBUS with
BUS_MCEERR_AR, as for memory that the hardware has lost, which a QEMU under KVM hands on to its
guest; with BUS_ADRERR where the kernel has no CONFIG_MEMORY_FAILURE. Whatever the kernel answers,
it is answered here, as in `placing.py`.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Final

from postcopyd.incoming.holdings import Holdings
from postcopyd.incoming.placing import VmmGone
from postcopyd.kernel.userfaultfd import CHANGING, NO_MEMORY, PRESENT, Userfaultfd
from postcopyd.ram.block import RamBlock

_BATCH: Final = 4 << 20
"""Bytes poisoned in one turn of the event loop: other migrations have faults."""
_NOT_MAPPED: Final = -errno.ENOENT
_RETRY_AFTER: Final = 0.001  # seconds


async def poison_missing(
    userfaultfd: Userfaultfd, holdings: Holdings, read_events: Callable[[], None]
) -> None:
    """Poison every host page that is not here, and wake who waits for it.

    It may be done again after it was done in part: what is poisoned counts as missing still.

    :param read_events: reads what the userfaultfd tells; an unread event holds everything up.
    :raise VmmGone: if the VMM has exited.
    :raise OSError: if the kernel cannot poison (EINVAL, before Linux 6.6).
    """
    for block in holdings.blocks:
        received = holdings.page_map[block.index].received
        at_most = max(1, _BATCH // block.page_size)
        page = received.find(0, 0, block.pages)
        while page >= 0:
            beyond = received.find(1, page, min(page + at_most, block.pages))
            count = (beyond if beyond >= 0 else min(page + at_most, block.pages)) - page
            done = _poison(userfaultfd, holdings, block, page, count)
            if not done:
                read_events()
                await asyncio.sleep(_RETRY_AFTER)
            else:
                await asyncio.sleep(0)
            page = received.find(0, page + done, block.pages)


def _poison(
    userfaultfd: Userfaultfd, holdings: Holdings, block: RamBlock, page: int, count: int
) -> int:
    """Poison at most `count` host pages from `page` on; return how many are done with."""
    size = block.page_size
    address = block.address + page * size
    result = userfaultfd.poison(address, count * size)
    if result == _NOT_MAPPED and count > 1:
        # A run across the border of what is mapped is refused whole: page by page.
        result = userfaultfd.poison(address, size)
    if result > 0:
        return result // size
    if result == PRESENT:
        # Poisoned before, or placed in the instant in which a predecessor was killed.
        userfaultfd.wake(address, size)
        return 1
    if result == _NOT_MAPPED:
        maps = holdings.page_map[block.index]
        maps.received[page] = maps.zero[page] = 1
        return 1
    if result == CHANGING or result in NO_MEMORY:
        return 0
    raise VmmGone(f"poisoning {block.name!r} at {page * size:#x}: the VMM has exited")
