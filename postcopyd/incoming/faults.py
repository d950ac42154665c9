"""Faults: from the userfaultfd to a request on the return path, or to an answer from what is here.

Every fault that is read ends as requested, placed or woken. A host page is asked for once, however
many threads wait for it. What the guest seems to need next is asked for as well (`fault_around`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter_ns

from postcopyd.incoming.blocktime import Blocktime
from postcopyd.incoming.fault_around import FaultAround, missing_runs
from postcopyd.incoming.placing import Placer
from postcopyd.incoming.report import Counters
from postcopyd.incoming.staging import BlockStage
from postcopyd.kernel.userfaultfd import (
    EVENT_PAGEFAULT,
    EVENT_REMOVE,
    EVENT_UNMAP,
    Userfaultfd,
)
from postcopyd.ram.block import BlockTable, RamBlock
from postcopyd.ram.page_map import PageMap


class UnexpectedEvent(Exception):
    """The userfaultfd told of something that cannot be served; the text says what."""


class FaultHandler:
    """Reads the events of one userfaultfd and answers them.

    `waiting` is shared with the `Placer`: VMM address of a host page -> when its fault was read.
    """

    def __init__(
        self,
        userfaultfd: Userfaultfd,
        blocks: BlockTable,
        page_map: PageMap,
        stages: list[BlockStage],
        placer: Placer,
        waiting: dict[int, int],
        counters: Counters,
        *,
        blocktime: Blocktime | None,
        request: Callable[[list[tuple[RamBlock, range]]], None],
        removed: Callable[[RamBlock, int, int], None],
    ) -> None:
        """Set up; nothing is read before `read`.

        :param blocktime: told which thread waits for which page; None if the ids are not known.
        :param request: asked for the pages that faults wait for, and behind them for those around:
            (block, numbers of host pages).
        :param removed: told of each range that the VMM gave back: block, offset, length.
        """
        self._read_events = userfaultfd.read_events
        self._blocks = blocks
        self._maps = page_map
        self._stages = stages
        self._placer = placer
        self._waiting = waiting
        self._counters = counters
        self._request = request
        self._removed = removed
        self._blocktime = blocktime
        self.keep_staged = True
        """While the guest has not run yet: what is placed stays in the staging as well, because
        another VMM may have to take this one's place."""
        self._faults: list[int] = []
        self._threads: list[int] = []
        self._around = FaultAround()
        self._deferred: dict[int, tuple[RamBlock, int]] = {}
        self._block = blocks[0]
        self._block_end = blocks[0].end

    @property
    def deferred(self) -> bool:
        """True while a fault waits for another try, because the memory was changing."""
        return bool(self._deferred)

    def read(self) -> None:
        """Read what is there, once, and answer it. To be called when the descriptor is readable.

        A read gives faults before other events, whatever came first, so the removals among them
        are applied before any fault is judged.

        :raise UnexpectedEvent: for a fault outside every block, or an event that was not enabled.
        :raise VmmGone: if the VMM has exited.
        """
        faults = self._faults
        threads = self._threads
        removals: list[tuple[int, int]] = []
        for event, first, second, third in self._read_events():
            if event == EVENT_PAGEFAULT:
                faults.append(second)
                threads.append(third)
            elif event == EVENT_UNMAP and self.keep_staged:
                pass  # says nothing of the content, which is the next VMM's then
            elif event in (EVENT_REMOVE, EVENT_UNMAP):
                removals.append((first, second))
            else:
                raise UnexpectedEvent(f"the userfaultfd reported event {event:#x}")
        if removals:
            self.apply_removals(removals)
        if faults:
            self._counters.faults += len(faults)
            try:
                self._answer(faults)
            finally:
                faults.clear()
                threads.clear()

    def drain(self) -> None:
        """Read and forget every event that is left, so that nobody waits for its being read."""
        while any(True for _ in self._read_events()):
            pass

    def _answer(self, faults: list[int]) -> None:
        now = perf_counter_ns()
        waiting = self._waiting
        requests: list[tuple[RamBlock, range]] = []
        around: list[tuple[RamBlock, range]] = []
        blocktime = self._blocktime
        for address, thread in zip(faults, self._threads, strict=True):
            block = self._block
            if not block.address <= address < self._block_end:
                block = self._find_block(address)
            size = block.page_size
            page = (address - block.address) // size
            page_address = block.address + page * size
            if blocktime is not None:
                blocktime.blocked(page_address, thread, now)
            if page_address in waiting:
                continue
            maps = self._maps[block.index]
            waiting[page_address] = now
            if maps.received[page]:
                self.answer(block, page)
                continue
            if not maps.requested[page]:
                maps.requested[page] = 1
                requests.append((block, range(page, page + 1)))
                window = self._around.window(block, page)
                if len(window) > 1:
                    around.append((block, window))
        if requests:
            self._counters.requests += len(requests)
            requests += self._missing(around)
            self._request(requests)

    def _missing(self, windows: list[tuple[RamBlock, range]]) -> Iterator[tuple[RamBlock, range]]:
        """Give those pages of the windows that are missing; they are asked for from now on."""
        for block, window in windows:
            maps = self._maps[block.index]
            for run in missing_runs(maps, window):
                maps.requested[run.start : run.stop] = 1
                self._counters.pages_around += len(run)
                yield block, run

    def _find_block(self, address: int) -> RamBlock:
        block = self._blocks.block_at(address)
        if block is None:
            raise UnexpectedEvent(f"a fault at {address:#x}, outside every block")
        self._block = block
        self._block_end = block.end
        return block

    def answer(self, block: RamBlock, page: int) -> None:
        """Answer a fault on a page that we have, now or as soon as the memory lets us.

        :raise VmmGone: if the VMM has exited.
        """
        if not self._answer_from_here(block, page):
            self._deferred[block.address + page * block.page_size] = (block, page)

    def _answer_from_here(self, block: RamBlock, page: int) -> bool:
        """Answer a fault on a page that we have; False to try again later."""
        maps = self._maps[block.index]
        if maps.staged[page]:
            stage = self._stages[block.index]
            size = block.page_size
            offset = page * size
            try:
                if not self._placer.try_run(block, offset, size, stage.address_of(offset, size)):
                    return False
                if self.keep_staged:
                    self._placer.placed_of_staged.add(block.address + offset)
                else:
                    stage.release(page, 1)
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                return False  # if only what was placed could not be given back, that is known then
            return True
        # Zeros; or placed between the fault and our reading it, which the kernel says, and the
        # waiter is woken; or dropped since by somebody who is not reported (a hole in its file).
        return self._placer.try_zero(block, page)

    def retry_deferred(self) -> bool:
        """Try the deferred faults again; True when none is left.

        :raise VmmGone: if the VMM has exited.
        """
        for page_address, (block, page) in list(self._deferred.items()):
            if not self._answer_from_here(block, page):
                return False
            del self._deferred[page_address]
        return True

    def apply_removals(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Note that the VMM gave back what lies from each start to its end: it reads as zeros now.

        A range may span several blocks, or touch none of ours. No page is looked at twice: a VMM
        that gives everything back again and again must not keep others waiting for long.
        """
        for block in self._blocks:
            for first, beyond in _joined(_whole_pages(block, ranges)):
                self._apply_removal(block, first, beyond)

    def _apply_removal(self, block: RamBlock, first: int, beyond: int) -> None:
        maps = self._maps[block.index]
        if maps.staged.find(1, first, beyond) >= 0:
            self._stages[block.index].release(first, beyond - first)
        maps.received[first:beyond] = 1
        maps.zero[first:beyond] = 1
        self._placer.any_removed = True
        size = block.page_size
        self._removed(block, first * size, (beyond - first) * size)
        self._release_waiters(block, first, beyond)

    def _release_waiters(self, block: RamBlock, first: int, beyond: int) -> None:
        """Answer the faults that wait for pages that were just given back."""
        low = block.address + first * block.page_size
        high = block.address + beyond * block.page_size
        for page_address in [address for address in self._waiting if low <= address < high]:
            # Only after the remover has gone on can anything be placed, so never at once.
            page = (page_address - block.address) // block.page_size
            self._deferred[page_address] = (block, page)


def _whole_pages(block: RamBlock, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Give first page and page behind the last of what each range has of a block, in whole pages.

    A part of a host page that is given back drops nothing (handoffs, A.3).
    """
    size = block.page_size
    for start, end in ranges:
        first = (max(start, block.address) - block.address + size - 1) // size
        beyond = (min(end, block.end) - block.address) // size
        if first < beyond:
            yield first, beyond


def _joined(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join runs that touch or overlap."""
    first = beyond = -1
    for start, end in sorted(runs):
        if start > beyond:
            if first >= 0:
                yield first, beyond
            first, beyond = start, end
        else:
            beyond = max(beyond, end)
    if first >= 0:
        yield first, beyond
