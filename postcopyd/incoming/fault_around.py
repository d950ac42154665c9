"""Fault-around: pages that the guest will miss next, asked for with the one that it misses now.

A guest that goes on after a move misses its working set page by page: the kernel's code and data,
a stack, a table that is walked. Each of these faults costs a round trip, one behind the other. So
where faults come close to each other, in place and in time, the pages around the next one are
asked for as well, the more the longer it goes on. Faults that are spread over the memory are left
alone: there the neighbours are of no use to anybody, and what follows would queue behind them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from bitarray import bitarray

from postcopyd.kernel.memory import HOST_PAGE_SIZE
from postcopyd.ram.block import RamBlock
from postcopyd.ram.page_map import BlockMap

_REGION_SHIFT = 7
"""Faults on the same 128 pages are close in place ..."""
_CLOSE_IN_TIME = 20_000_000
"""... and those that follow each other within this many nanoseconds in time."""
_REGIONS = 256
"""Regions that are remembered: those of the last faults."""
_SMALLEST = 4
_LARGEST = 16
"""Pages of a window: more would hold up the next fault for longer than its own round trip."""


class FaultAround:
    """Remembers where the last faults were and says what to ask for around the next one."""

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._recent: OrderedDict[tuple[int, int], tuple[int, int]] = OrderedDict()

    def window(self, block: RamBlock, page: int, now: int) -> range:
        """Note a fault, and return the pages of its block to be asked for, its own among them.

        :param page: number of the host page.
        :param now: in nanoseconds, never before the last one.
        """
        if block.page_size != HOST_PAGE_SIZE:
            return range(page, page + 1)
        recent = self._recent
        region = (block.index, page >> _REGION_SHIFT)
        length, last = recent.pop(region, (0, 0))
        if not length or now - last > _CLOSE_IN_TIME:
            length = 1
        else:
            length = min(max(length * 2, _SMALLEST), _LARGEST)
        recent[region] = (length, now)
        if len(recent) > _REGIONS:
            recent.popitem(last=False)
        first = page - page % length
        return range(first, min(first + length, block.pages))


def missing_runs(maps: BlockMap, window: range) -> Iterator[range]:
    """Give the pages of `window` that are neither here nor asked for, joined to runs."""
    first, beyond = window.start, window.stop
    known: bitarray = maps.received[first:beyond] | maps.requested[first:beyond]
    start = known.find(0)
    while start >= 0:
        end = known.find(1, start)
        end = len(known) if end < 0 else end
        yield range(first + start, first + end)
        start = known.find(0, end)
