"""Filling the memory of one VMM: staging before the switchover, faults and placing after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from postcopyd.incoming.faults import FaultHandler, UnexpectedEvent
from postcopyd.incoming.placing import Placer, VmmGone
from postcopyd.incoming.report import BlockReport, Counters, Histogram
from postcopyd.incoming.staging import BlockStage
from postcopyd.incoming.vmm import GuestMemory
from postcopyd.kernel.memory import HOST_PAGE_SIZE
from postcopyd.kernel.userfaultfd import (
    Feature,
    Operation,
    RegisterMode,
    features_of,
)
from postcopyd.ram.block import BlockTable, RamBlock
from postcopyd.ram.host_page import HostPageAssembly, HostPageInterrupted
from postcopyd.ram.page_map import PageMap
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import Discard, Pages, ZeroPages

_RETRY_FIRST = 0.00025
_RETRY_LONGEST = 0.01
"""Seconds between tries of what was put off: all threads of the VMM may be waiting for it, so no
event need come that would remind us."""

_STAGED_BATCH = 64
"""Host pages placed from the staging in one turn of the event loop."""


class MemoryFilling:
    """The memory of one VMM on its way in.

    Owns the page map, the staging and everything that places; the VMM's own descriptors stay the
    VMM's. All callbacks come from the event loop that `listen` was called in.
    """

    def __init__(
        self,
        memory: GuestMemory,
        counters: Counters,
        latency: Histogram,
        *,
        request: Callable[[list[tuple[RamBlock, int]]], None],
        removed: Callable[[RamBlock, int, int], None],
        caught_up: Callable[[], None],
        broken: Callable[[Exception], None],
    ) -> None:
        """Set up the account.

        :param request: asked for pages that faults wait for: (block, host page number).
        :param removed: told of each range that the VMM gave back: block, offset, length in bytes.
        :param caught_up: told when what was put off is placed: the stream may go on.
        :param broken: told once when filling cannot go on: `VmmGone`, `UnexpectedEvent`, OSError.
        :raise OSError: if there is no memory for map or staging.
        :raise ValueError: if the blocks contradict each other.
        """
        self.blocks = BlockTable(
            [
                RamBlock(block.name, block.length, block.page_size, block.address, index)
                for index, block in enumerate(memory.blocks)
            ]
        )
        self._memory = memory
        self._counters = counters
        self._caught_up = caught_up
        self._broken = broken
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listening = False
        self._timer: asyncio.TimerHandle | None = None
        self._retry_delay = _RETRY_FIRST
        self._stage_cursor: tuple[int, int] | None = None
        self._assemblies: dict[int, HostPageAssembly] = {}
        self._rest: tuple[RamBlock, Pages | ZeroPages, int, int] | None = None
        self._closed = False
        self.waiting: dict[int, int] = {}
        """VMM address of each host page that a fault waits for -> when the fault was read."""
        self.page_map = PageMap(self.blocks)
        self._stages: list[BlockStage] = []
        try:
            for block, handed in zip(self.blocks, memory.blocks, strict=True):
                self._stages.append(BlockStage(block, handed, self.page_map[block.index]))
            self._placer = Placer(
                memory.userfaultfd, self.blocks, self.page_map, self.waiting, counters, latency
            )
        except BaseException:
            self._close_accounts()
            raise
        features = features_of(memory.userfaultfd.fileno()) or Feature(0)
        self._faults = FaultHandler(
            memory.userfaultfd,
            self.blocks,
            self.page_map,
            self._stages,
            self._placer,
            self.waiting,
            counters,
            request=request,
            removed=removed,
            sees_removals=Feature.EVENT_REMOVE in features,
        )

    # -- before the switchover ---------------------------------------------------------------

    def empty(self) -> None:
        """Make all shared memory truly empty; the VMM empties its private memory itself.

        :raise OSError: if a memory file does not let itself be emptied.
        """
        for stage in self._stages:
            stage.empty()

    def stage_pages(self, message: Pages, target_page_size: int) -> None:
        """Keep pages that came before the switchover.

        :raise OSError: if there is no memory for them.
        """
        block = self._block_of(message.block)
        stage = self._stages[block.index]
        offsets = message.offsets
        if _contiguous(message, target_page_size):
            stage.write(offsets[0], message.data)
        else:
            for place, offset in enumerate(offsets):
                stage.write(offset, message.payload(place))
        self._counters.pages_precopy += len(offsets)

    def stage_zeros(self, message: ZeroPages, target_page_size: int) -> None:
        """Keep zero pages that came before the switchover. As `stage_pages`."""
        stage = self._stages[self._block_of(message.block).index]
        offsets = message.offsets
        if type(offsets) is range and offsets.step == target_page_size:
            stage.write_zeros(offsets[0], len(offsets) * target_page_size)
        else:
            for offset in offsets:
                stage.write_zeros(offset, target_page_size)
        self._counters.pages_precopy += len(offsets)

    def discard(self, message: Discard) -> None:
        """Forget what came for these ranges.

        :raise ProtocolError: if a range is not whole host pages.
        """
        block = self._block_of(message.block)
        size = block.page_size
        for start, length in message.ranges:
            if start % size or length % size:
                raise ProtocolError(
                    f"discard of {start:#x}+{length:#x} in block {block.name!r} is not whole "
                    f"pages of {size:#x}",
                    None,
                )
            self._stages[block.index].discard(start, length)

    def _block_of(self, name: str) -> RamBlock:
        block = self.blocks.by_name(name)
        if block is None:
            raise ProtocolError(f"block {name!r} is not one of the VMM's", None)
        return block

    # -- after it ----------------------------------------------------------------------------

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Register all memory and serve faults from now on.

        :raise OSError: if the kernel refuses to register a block.
        """
        self._loop = loop
        userfaultfd = self._memory.userfaultfd
        if not self._memory.registered:
            for block in self.blocks:
                needed = Operation.COPY | Operation.WAKE
                if block.page_size == HOST_PAGE_SIZE:
                    needed |= Operation.ZEROPAGE
                userfaultfd.register(block.address, block.length, RegisterMode.MISSING, needed)
        self._listening = True
        loop.add_reader(userfaultfd.fileno(), self.read_faults)
        if self._advance_stage_cursor((0, 0)):
            loop.call_soon(self._place_staged)

    def read_faults(self) -> None:
        """Read and answer what faults there are; harmless when there are none."""
        if not self._listening:
            return
        try:
            self._faults.read()
        except (VmmGone, UnexpectedEvent, OSError) as error:
            self._fail(error)
            return
        if self._faults.deferred:
            self._retry_later()

    def place_pages(self, message: Pages, target_page_size: int) -> bool:
        """Place pages that a source sent after the switchover.

        :return: False when something was put off: deliver nothing more until `caught_up`.
        :raise ProtocolError: if a host page is interrupted.
        """
        block = self._block_of(message.block)
        try:
            if block.page_size == target_page_size:
                placed = self._placer.place_pages(
                    block, message.offsets, message.address, message.stride
                )
            else:
                placed = self._assemble(block, message, target_page_size)
        except VmmGone as error:
            self._fail(error)
            return False
        if not placed:
            self._retry_later()
        return placed

    def place_zeros(self, message: ZeroPages, target_page_size: int) -> bool:
        """Place zero pages that a source sent after the switchover. As `place_pages`."""
        block = self._block_of(message.block)
        try:
            if block.page_size == target_page_size:
                placed = self._placer.place_zeros(block, message.offsets)
            else:
                placed = self._assemble(block, message, target_page_size)
        except VmmGone as error:
            self._fail(error)
            return False
        if not placed:
            self._retry_later()
        return placed

    def _assemble(
        self, block: RamBlock, message: Pages | ZeroPages, target_page_size: int, place: int = 0
    ) -> bool:
        """Assemble host pages from the records of `message`, from number `place` on."""
        assembly = self._assemblies.get(block.page_size)
        if assembly is None:
            assembly = self._assemblies[block.page_size] = HostPageAssembly(block.page_size)
        offsets = message.offsets
        in_one_piece = _contiguous(message, target_page_size)
        while place < len(offsets):
            offset = offsets[place]
            count = 1
            if in_one_piece:
                to_border = block.page_size - offset % block.page_size
                count = min(len(offsets) - place, to_border // target_page_size)
            length = count * target_page_size
            payload = None
            if isinstance(message, Pages):
                start = place * message.stride
                payload = message.data[start : start + length]
            try:
                zero = assembly.add(block.name, offset, length, payload)
            except HostPageInterrupted as error:
                raise ProtocolError(str(error), None) from error
            place += count
            if zero is not None:
                host_page = offset - offset % block.page_size
                source = 0 if zero else assembly.address
                if not self._placer.place_host_page(block, host_page, source):
                    # The assembled page must stay where it is until it is placed.
                    self._rest = (block, message, target_page_size, place)
                    return False
        return True

    def finish(self) -> int:
        """End the filling: every page that can come has come.

        What the source never sent is zero there too (qemu-wire, 3.2): the kernel gives zeros for
        it from the moment at which the memory is no longer registered.

        :return: number of host pages that were never sent.
        :raise OSError: if the kernel refuses to unregister.
        """
        never_sent = sum(block.pages for block in self.blocks) - self.page_map.received_pages()
        userfaultfd = self._memory.userfaultfd
        self.stop()
        for block in self.blocks:
            userfaultfd.unregister(block.address, block.length)
        # A thread of the VMM that gave memory back sleeps until its event is read.
        self._faults.drain()
        self.waiting.clear()
        return never_sent

    @property
    def staged(self) -> bool:
        """True while pages wait in the staging."""
        return self._stage_cursor is not None

    @property
    def stalled(self) -> bool:
        """True while pages of the stream are put off: nothing more may be delivered."""
        return bool(self._placer.pending or self._rest)

    @property
    def unfinished_host_page(self) -> bool:
        """True in the middle of a host page that is larger than the pages on the wire."""
        return any(assembly.unfinished for assembly in self._assemblies.values())

    # -- what was put off --------------------------------------------------------------------

    def _retry_later(self) -> None:
        if self._timer is None and self._loop is not None:
            self._timer = self._loop.call_later(self._retry_delay, self._retry)
            self._retry_delay = min(self._retry_delay * 2, _RETRY_LONGEST)

    def _retry(self) -> None:
        self._timer = None
        if not self._listening:
            return
        stalled = self.stalled
        try:
            # An unread event holds up every placing, so events come first.
            self._faults.read()
            placed = self._placer.retry() and self._assemble_rest()
            answered = self._faults.retry_deferred()
        except (VmmGone, UnexpectedEvent, ProtocolError, OSError) as error:
            self._fail(error)
            return
        if placed and answered:
            self._retry_delay = _RETRY_FIRST
        else:
            self._retry_later()
        if stalled and placed:
            self._caught_up()

    def _assemble_rest(self) -> bool:
        """Go on with a message whose host page had to be put off."""
        if self._rest is None:
            return True
        block, message, target_page_size, place = self._rest
        self._rest = None
        return self._assemble(block, message, target_page_size, place)

    def _advance_stage_cursor(self, start: tuple[int, int]) -> bool:
        """Find the next staged page at or behind `start` (block, page); False at the end."""
        index, page = start
        while index < len(self.blocks):
            found = self.page_map[index].staged.find(1, page)
            if found >= 0:
                self._stage_cursor = (index, found)
                return True
            index, page = index + 1, 0
        self._stage_cursor = None
        return False

    def _place_staged(self) -> None:
        """Place a batch of what came before the switchover, then let faults have their turn."""
        if not self._listening or self._stage_cursor is None or self._loop is None:
            return
        if not self._advance_stage_cursor(self._stage_cursor):
            self._caught_up()
            return
        index, first = self._stage_cursor
        block = self.blocks[index]
        staged = self.page_map[index].staged
        limit = max(1, _STAGED_BATCH * HOST_PAGE_SIZE // block.page_size)
        beyond = staged.find(0, first, first + limit)
        count = (beyond if beyond >= 0 else min(first + limit, block.pages)) - first
        offset = first * block.page_size
        length = count * block.page_size
        stage = self._stages[index]
        try:
            placed = self._placer.try_run(block, offset, length, stage.address_of(offset, length))
        except VmmGone as error:
            self._fail(error)
            return
        if placed:
            stage.release(first, count)
            self._loop.call_soon(self._place_staged)
        else:
            self._counters.retries += 1
            self._loop.call_later(_RETRY_FIRST, self._place_staged)

    # -- the end -----------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        self.stop()
        self._broken(error)

    def stop(self) -> None:
        """Read no more faults and place nothing more. Idempotent."""
        if self._listening and self._loop is not None:
            self._loop.remove_reader(self._memory.userfaultfd.fileno())
        self._listening = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Release map, staging and buffers. Idempotent."""
        self.stop()
        self._close_accounts()

    def _close_accounts(self) -> None:
        if self._closed:
            return
        self._closed = True
        for stage in self._stages:
            stage.close()
        for assembly in self._assemblies.values():
            assembly.close()
        if hasattr(self, "_placer"):
            self._placer.close()
        self.page_map.close()

    def block_reports(self) -> list[BlockReport]:
        """Tell of each block how much is here."""
        return [
            BlockReport(
                name=block.name,
                length=block.length,
                page_size=block.page_size,
                pages=block.pages,
                received=0 if self._closed else self.page_map[block.index].received.count(),
            )
            for block in self.blocks
        ]


def _contiguous(message: Pages | ZeroPages, target_page_size: int) -> bool:
    """Tell whether the pages are neighbours in the block and, unless zero, in our memory."""
    offsets = message.offsets
    if isinstance(message, Pages) and message.stride != target_page_size:
        return False
    return type(offsets) is range and offsets.step == target_page_size
