"""The source's discard plan: what to have forgotten of a block, in commands that QEMU takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TypeAlias

from bitarray import bitarray
from bitarray.util import intervals

from postcopyd.wire.stream_format import DISCARD_RANGES

Range: TypeAlias = tuple[int, int]
"""Start and length in bytes."""


def discard_plan(dirty: bitarray, page_size: int) -> Iterator[tuple[Range, ...]]:
    """Return the ranges of one block that the destination must forget, a command's worth at a time.

    A block of which nothing was sent is dirty from end to end and gives one range; a clean one
    gives no command at all. A QEMU source puts at most 12 ranges into a command (qemu-wire, 2).

    :param dirty: one bit a *host* page, 1 where the destination has nothing or something stale.
    :param page_size: of the host pages, bytes; every start and length is a multiple of it.
    :return: tuples of 1 to 12 neighbours, ascending; no two ranges overlap or touch.
    """
    ranges = (
        (start * page_size, (stop - start) * page_size)
        for is_dirty, start, stop in intervals(dirty)
        if is_dirty
    )
    while command := tuple(islice(ranges, DISCARD_RANGES)):
        yield command
