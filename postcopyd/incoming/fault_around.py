"""Fault-around: pages that the guest will miss next, asked for with the one that it misses now.

A guest that goes on after a move misses its working set page by page: the kernel's code and data,
a stack, a table that is walked. Each of these faults costs a round trip, one behind the other. So
where a fault comes close to one of the last few, the pages around it are asked for as well, the
more the longer it goes on. Faults that are spread over the memory are left alone: there the
neighbours are of no use to anybody, and what follows would queue behind them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from bitarray import bitarray

from postcopyd.kernel.memory import HOST_PAGE_SIZE
from postcopyd.ram.block import RamBlock
from postcopyd.ram.page_map import BlockMap

_REGION_SHIFT = 7
"""Faults on the same 128 pages are close ..."""
_REGIONS = 16
"""... as long as no more than this many other such regions have had one in between. Of faults at
random over 300 MiB one in forty passes for close."""
_SMALLEST = 4
_LARGEST = 16
"""Pages of a window: more would hold up the next fault for longer than its own round trip."""


class FaultAround:
    """Remembers where the last faults were and says what to ask for around the next one."""

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._recent: OrderedDict[tuple[int, int], int] = OrderedDict()

    def window(self, block: RamBlock, page: int) -> range:
        """Note a fault on host page number `page`, and return the pages to be asked for.

        They are of the same block, and `page` is one of them.
        """
        if block.page_size != HOST_PAGE_SIZE:
            return range(page, page + 1)
        recent = self._recent
        region = (block.index, page >> _REGION_SHIFT)
        before = recent.pop(region, 0)
        length = min(max(before * 2, _SMALLEST), _LARGEST) if before else 1
        recent[region] = length
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
