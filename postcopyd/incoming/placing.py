"""Placing: pages into the VMM's memory, through UFFDIO_COPY and UFFDIO_ZEROPAGE.

The rule of this file: a page is placed once. Whatever the kernel answers, it is answered here:

================= ================================================================================
all placed        the pages are marked received, the faults that waited for them are done
a part placed     go on behind it
EEXIST            the VMM has the page already: count it, wake it, never overwrite (but see
                  `_is_there` for huge pages)
EAGAIN            the VMM's memory layout is changing (an unread event, a fork): put off
ENOMEM, ENOSPC    no memory for the VMM now: put off
ENOENT            the range is not mapped or not registered any more: the VMM gave it up, drop it;
                  or keep it, while another VMM may have to take this one's place
ESRCH             the VMM has exited: `VmmGone`
================= ================================================================================

What is put off waits in `pending`; the stream stands still until `retry` has placed it, so the
bytes stay where they are.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from time import perf_counter_ns

import msgspec
from bitarray import bitarray

from postcopyd.incoming.blocktime import Blocktime
from postcopyd.incoming.report import Counters, Histogram
from postcopyd.kernel.huge_pages import free_huge_pages
from postcopyd.kernel.memory import HOST_PAGE_SIZE, Mapping
from postcopyd.kernel.userfaultfd import Userfaultfd
from postcopyd.ram.block import BlockTable, RamBlock
from postcopyd.ram.page_map import PageMap

_PRESENT = -errno.EEXIST
_PUT_OFF = frozenset({-errno.EAGAIN, -errno.ENOMEM, -errno.ENOSPC})
_NOT_MAPPED = -errno.ENOENT


class VmmGone(Exception):
    """The process whose memory is being filled has exited."""


class _Run(msgspec.Struct):
    """Pages that are contiguous in the block and, unless zero, in this process."""

    block: RamBlock
    offset: int
    length: int
    source: int
    """Address in this process; 0 for a run of zeros."""


class Placer:
    """Places pages and keeps the account of them.

    `waiting` maps the VMM address of each host page that a fault waits for to the time (in
    nanoseconds of `perf_counter_ns`) at which the fault was read.
    """

    def __init__(
        self,
        userfaultfd: Userfaultfd,
        blocks: BlockTable,
        page_map: PageMap,
        waiting: dict[int, int],
        counters: Counters,
        latency: Histogram,
        blocktime: Blocktime | None,
        shared: Container[int],
    ) -> None:
        """Place into `blocks` through `userfaultfd`.

        :param blocktime: told when threads go on; None when their ids are not known.
        :param shared: the indices of the blocks of shared memory.
        """
        self._copy = userfaultfd.copy
        self._zeropage = userfaultfd.zeropage
        self._continue = userfaultfd.continue_range
        self._wake = userfaultfd.wake
        self._maps = page_map
        self._waiting = waiting
        self._counters = counters
        self._latency = latency
        self._blocktime = blocktime
        self._shared = shared
        self.pending: deque[_Run] = deque()
        """Runs that were put off, in order."""
        self.any_removed = False
        """True once the VMM has removed memory: only then need a page be looked up before it is
        placed."""
        self.placed_of_staged: set[int] = set()
        """VMM address of each host page that is placed and still staged: before the guest runs."""
        self.keep: Callable[[RamBlock, int, int, int], None] | None = None
        """Given what is not mapped any more before the guest has run, as it is the next VMM's:
        block, offset, length, address here (0: zeros). None once it runs. May raise OSError."""
        huge = max((block.page_size for block in blocks), default=0)
        # Huge pages have no UFFDIO_ZEROPAGE: zeros are copied from a page that nobody ever wrote,
        # so that the kernel's one zero page stands behind all of it.
        self._zeros = Mapping.anonymous(max(huge, HOST_PAGE_SIZE))

    def close(self) -> None:
        """Release the zero page; runs that were put off are dropped. Idempotent."""
        self.pending.clear()
        self._zeros.close()

    def place_pages(
        self, block: RamBlock, offsets: Sequence[int], address: int, stride: int
    ) -> bool:
        """Place host pages of the common size; page i lies at `address + i * stride`.

        :return: False when something had to be put off: call `retry` before anything else.
        :raise VmmGone: if the VMM has exited.
        """
        size = block.page_size
        count = len(offsets)
        if self.any_removed:
            self._put_off(block, offsets, address, stride)
            return self.retry()
        received = self._maps[block.index].received
        if type(offsets) is range and stride == size:
            first = offsets[0]
            length = count * size
            result = self._copy(block.address + first, address, length)
            if result != length:
                run = _Run(block, first, length, address)
                self.pending.append(run)
                if result > 0:
                    self._answer(run, result)
                return self.retry()
            page = first // size
            received[page : page + count] = 1
        else:
            copy = self._copy
            base = block.address
            source = address
            for place, offset in enumerate(offsets):
                if copy(base + offset, source, size) != size:
                    self._mark(received, offsets[:place], size)
                    self._settle(block, offsets[:place])
                    self._put_off(block, offsets[place:], source, stride)
                    return self.retry()
                source += stride
            self._mark(received, offsets, size)
        if self._waiting:
            self._settle(block, offsets)
        else:
            self._counters.pages_by_background += count
        return True

    def place_zeros(self, block: RamBlock, offsets: Sequence[int]) -> bool:
        """Place zero pages. As `place_pages`."""
        size = block.page_size
        if type(offsets) is range:
            runs = [(offsets[0], len(offsets) * size)]
        else:
            runs = _runs(offsets, size)
        for offset, length in runs:
            self.pending.append(_Run(block, offset, length, 0))
        return self.retry()

    def place_host_page(self, block: RamBlock, offset: int, address: int) -> bool:
        """Place one host page of any size from `address`; 0 means zeros. As `place_pages`."""
        self.pending.append(_Run(block, offset, block.page_size, address))
        return self.retry()

    def try_run(self, block: RamBlock, offset: int, length: int, address: int) -> bool:
        """Place contiguous host pages from `address` that stay where they are.

        :return: False when a part is not placed yet: try again later, nothing was kept.
        :raise VmmGone: if the VMM has exited.
        """
        return self._advance(_Run(block, offset, length, address))

    def try_zero(self, block: RamBlock, page: int) -> bool:
        """Give a host page that reads as zeros by our own knowledge. As `try_run`."""
        size = block.page_size
        destination = block.address + page * size
        result = self._ask_zeros(block, destination, size)
        if result in _PUT_OFF:
            return False
        if result == _PRESENT:
            self._wake(destination, size)
        elif result < 0 and result != _NOT_MAPPED:
            raise VmmGone(f"zeros for {block.name!r} page {page}: the VMM has exited")
        self._finish_fault(destination)
        return True

    def _put_off(self, block: RamBlock, offsets: Sequence[int], address: int, stride: int) -> None:
        size = block.page_size
        for place, offset in enumerate(offsets):
            self.pending.append(_Run(block, offset, size, address + place * stride))

    @staticmethod
    def _mark(received: bitarray, offsets: Sequence[int], size: int) -> None:
        if not offsets:
            return
        if type(offsets) is range:
            page = offsets[0] // size
            received[page : page + len(offsets)] = 1
        else:
            received[[offset // size for offset in offsets]] = 1

    def unplaced(self) -> Iterator[tuple[RamBlock, int, int, int]]:
        """Give what was put off and forget it: block, offset, length, address here (0: zeros).

        For when the VMM has gone: each goes as far as it has not been placed.
        """
        pending, self.pending = self.pending, deque()
        for run in pending:
            yield run.block, run.offset, run.length, run.source

    def forget_unplaced(self) -> None:
        """Forget what was put off: whoever sent it sends it again."""
        self.pending.clear()

    def retry(self) -> bool:
        """Place what was put off, in order. As `place_pages`."""
        pending = self.pending
        while pending:
            run = pending[0]
            if not self._advance(run):
                self._counters.retries += 1
                return False
            pending.popleft()
        return True

    def _advance(self, run: _Run) -> bool:
        """Place a run as far as it goes; False if it had to be put off."""
        block = run.block
        size = block.page_size
        zero = self._maps[block.index].zero
        while run.length:
            length = run.length
            if self.any_removed:
                page = run.offset // size
                if zero[page]:
                    self._counters.pages_removed += 1
                    self._skip(run, size)
                    continue
                removed = zero.find(1, page, page + length // size)
                if removed >= 0:
                    length = (removed - page) * size
            result = self._ask(run, length)
            if result == _NOT_MAPPED and length > size:
                # A run across the border of what is mapped is refused whole: page by page.
                result = self._ask(run, size)
            if not self._answer(run, result):
                return False
        return True

    def _ask(self, run: _Run, length: int) -> int:
        """Have the kernel place the first `length` bytes of a run, or fewer."""
        destination = run.block.address + run.offset
        if run.source:
            return self._copy(destination, run.source, length)
        return self._ask_zeros(run.block, destination, length)

    def _ask_zeros(self, block: RamBlock, destination: int, length: int) -> int:
        if block.page_size == HOST_PAGE_SIZE:
            return self._zeropage(destination, length)
        return self._copy(destination, self._zeros.address, block.page_size)

    def _answer(self, run: _Run, result: int) -> bool:
        """Do what the kernel's answer to placing the head of `run` asks for; False to put off."""
        block = run.block
        size = block.page_size
        destination = block.address + run.offset
        page = run.offset // size
        maps = self._maps[block.index]
        counters = self._counters
        if result > 0:
            count = result // size
            maps.received[page : page + count] = 1
            if not run.source:
                counters.pages_zero += count
            self._settle(block, range(run.offset, run.offset + result, size))
            self._skip(run, result)
        elif result == _PRESENT:
            if size > HOST_PAGE_SIZE and not self._is_there(block, page):
                return False
            counters.pages_duplicate += 1
            maps.received[page] = 1
            self._wake(destination, size)
            self._finish_fault(destination)
            self._skip(run, size)
        elif result in _PUT_OFF:
            return False
        elif result == _NOT_MAPPED:
            if self.keep is not None:
                self.keep(block, run.offset, size, run.source)
            else:
                maps.received[page] = 1
                maps.zero[page] = 1
                self.any_removed = True
                counters.pages_removed += 1
            self.forget_fault(destination)
            self._skip(run, size)
        else:
            raise VmmGone(f"placing {block.name!r} at {run.offset:#x}: the VMM has exited")
        return True

    def _is_there(self, block: RamBlock, page: int) -> bool:
        """Tell whether a huge page is there of which the kernel says so.

        With its pool empty the kernel says EEXIST where it means ENOMEM, because it finds the slot
        of the page table that it has just made (hugetlb_mfill_atomic_pte of Linux 6.18). Believing
        it would lose the page. UFFDIO_CONTINUE takes no page, and fails with EFAULT if none is in
        the file; private memory has nobody to ask but the pool.
        """
        maps = self._maps[block.index]
        size = block.page_size
        if maps.received[page] and not maps.staged[page]:
            return True
        address = block.address + page * size
        if address in self.placed_of_staged:
            return True
        if block.index in self._shared:
            try:
                return self._continue(address, size) in (size, _PRESENT)
            except OSError as error:
                if error.errno == errno.EFAULT:
                    return False
                # Linux before 5.13 does not know it.
        return free_huge_pages(size) > 0

    @staticmethod
    def _skip(run: _Run, length: int) -> None:
        run.offset += length
        run.length -= length
        if run.source:
            run.source += length

    def _settle(self, block: RamBlock, offsets: Sequence[int]) -> None:
        """Count pages that were placed, and end the faults that waited for them."""
        waiting = self._waiting
        answered = 0
        if len(offsets) == 1:
            address = block.address + offsets[0]
            if address in waiting:
                self._finish_fault(address)
                answered = 1
        elif waiting:
            base = block.address
            if len(waiting) < len(offsets):
                # An offset below 0 or off the page grid is in neither, so no further check.
                members = offsets if type(offsets) is range else frozenset(offsets)
                found = [address for address in waiting if address - base in members]
            else:
                found = [base + offset for offset in offsets if base + offset in waiting]
            answered = len(found)
            for address in found:
                self._finish_fault(address)
        self._counters.pages_by_fault += answered
        self._counters.pages_by_background += len(offsets) - answered

    def _finish_fault(self, address: int) -> None:
        since = self._waiting.pop(address, None)
        if since is not None:
            now = perf_counter_ns()
            self._latency.record(now - since)
            if self._blocktime is not None:
                self._blocktime.released(address, now)

    def forget_fault(self, address: int) -> None:
        """End a fault that needed no page; its time says nothing about the migration."""
        self._waiting.pop(address, None)
        if self._blocktime is not None:
            self._blocktime.released(address, perf_counter_ns())


def _runs(offsets: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Join neighbouring pages: (offset, length) of each run, in order."""
    runs: list[tuple[int, int]] = []
    start = end = offsets[0]
    for offset in offsets:
        if offset != end:
            runs.append((start, end - start))
            start = offset
        end = offset + size
    runs.append((start, end - start))
    return runs
