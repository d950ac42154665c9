"""Filling the memory of one VMM: staging before the switchover, faults and placing after it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from time import perf_counter_ns

from bitarray import bitarray
from bitarray.util import intervals

from postcopyd.incoming.assembling import Assembler
from postcopyd.incoming.blocktime import Blocktime
from postcopyd.incoming.estate import Estate
from postcopyd.incoming.faults import FaultHandler, UnexpectedEvent
from postcopyd.incoming.holdings import Holdings
from postcopyd.incoming.moving import Move
from postcopyd.incoming.placing import Placer, VmmGone
from postcopyd.incoming.poisoning import poison_missing
from postcopyd.incoming.report import Counters, Histogram
from postcopyd.incoming.unstaging import Unstaging
from postcopyd.incoming.vmm import GuestMemory
from postcopyd.kernel.memory import HOST_PAGE_SIZE
from postcopyd.kernel.userfaultfd import (
    Operation,
    RegisterMode,
    removals_in,
)
from postcopyd.ram.block import RamBlock
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import Pages, ZeroPages

_RETRY_FIRST = 0.00025
_RETRY_LONGEST = 0.01
"""Seconds between tries of what was put off: all threads of the VMM may be waiting for it, so no
event need come that would remind us."""


class MemoryFilling:
    """The memory of one VMM on its way in.

    Owns what is here of it (`holdings`) and everything that places; the VMM's own descriptors stay
    the VMM's. All callbacks come from the event loop that `listen` was called in.

    Until the guest runs (`guest_runs`) everything that has come can be given to another VMM.
    """

    def __init__(
        self,
        memory: GuestMemory,
        estate: Estate,
        events: memoryview,
        counters: Counters,
        latency: Histogram,
        blocktime: Blocktime | None,
        *,
        request: Callable[[list[tuple[RamBlock, range]]], None],
        removed: Callable[[RamBlock, int, int], None],
        caught_up: Callable[[], None],
        broken: Callable[[Exception], None],
    ) -> None:
        """Set up the account.

        :param estate: what a predecessor has left of it, and where it is left to a successor.
        :param events: where the messages of the userfaultfd are read into.
        :param blocktime: told which thread waits how long; None when nobody wants to know.
        :param request: asked for pages: (block, numbers of host pages).
        :param removed: told of each range that the VMM gave back: block, offset, length in bytes.
        :param caught_up: told when what was put off is placed: the stream may go on.
        :param broken: told when filling cannot go on before `go_on`: `VmmGone`, `UnexpectedEvent`,
            OSError; and of a `ProtocolError` of the stream, which is no reason to stop.
        :raise OSError: if there is no memory for map or staging.
        :raise ValueError: if the blocks contradict each other.
        """
        self.holdings = Holdings(memory, estate)
        self._memory = memory
        self._events = events
        self._counters = counters
        self._latency = latency
        self._blocktime = blocktime
        self._request = request
        self._removed = removed
        self._caught_up = caught_up
        self._broken = broken
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listening = False
        self._broken_off = False
        self._runs = False
        self._never_sent = 0
        self._timer: asyncio.TimerHandle | None = None
        self._retry_delay = _RETRY_FIRST
        self._unstaging: Unstaging | None = None
        self._assemblers: list[Assembler] = []
        self.waiting: dict[int, int] = {}
        """VMM address of each host page that a fault waits for -> when the fault was read."""
        try:
            self._placer, self._faults = self._serve(memory)
        except BaseException:
            self.holdings.close()
            raise

    def _serve(self, memory: GuestMemory) -> tuple[Placer, FaultHandler]:
        """Return what places into this memory, and what reads its faults."""
        holdings = self.holdings
        placer = Placer(
            memory.userfaultfd,
            holdings.blocks,
            holdings.page_map,
            self.waiting,
            self._counters,
            self._latency,
            self._blocktime,
            frozenset(stage.block.index for stage in holdings.stages if stage.direct),
        )
        placer.keep = holdings.keep
        memory.userfaultfd.read_into(self._events)
        faults = FaultHandler(
            memory.userfaultfd,
            holdings.blocks,
            holdings.page_map,
            holdings.stages,
            placer,
            self.waiting,
            self._counters,
            blocktime=self._blocktime,
            request=self._request,
            removed=self._removed,
        )
        return placer, faults

    def new_assembler(self) -> Assembler:
        """Return an assembler for one more connection that pages come on."""
        assembler = Assembler(self._place_host_page)
        self._assemblers.append(assembler)
        return assembler

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Register all memory and serve faults from now on.

        :raise OSError: if the kernel refuses to register a block.
        """
        self._loop = loop
        userfaultfd = self._memory.userfaultfd
        if not self._memory.registered:
            for block in self.holdings.blocks:
                needed = Operation.COPY | Operation.WAKE
                if block.page_size == HOST_PAGE_SIZE:
                    needed |= Operation.ZEROPAGE
                userfaultfd.register(block.address, block.length, RegisterMode.MISSING, needed)
        self._read_from_now_on(loop)
        if any(assembler.waiting for assembler in self._assemblers):
            self._retry_later()

    def _read_from_now_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self._listening = True
        self._broken_off = False
        loop.add_reader(self._memory.userfaultfd.fileno(), self.read_faults)

    def go_on(self) -> None:
        """Serve faults again where an error has broken that off; harmless where none has.

        What was read and not answered then is read again.
        """
        if not self._broken_off or self._loop is None:
            return
        self._read_from_now_on(self._loop)
        for address in tuple(self.waiting):
            self._placer.forget_fault(address)
        self.inherit()
        if self._faults.deferred:
            self._retry_later()
        if self._unstaging is not None:
            self._unstaging.go_on()

    def guest_runs(self) -> None:
        """Place what is staged from now on: no other VMM can take this one's place any more."""
        assert self._loop is not None
        self._runs = True
        self._faults.keep_staged = False
        self._placer.keep = None
        self._unstaging = Unstaging(
            self._loop,
            self.holdings,
            self._placer,
            self._counters,
            done=self._caught_up,
            failed=self._fail,
        )
        if self._listening:  # otherwise `go_on` begins
            self._unstaging.go_on()

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

    def place(
        self, message: Pages | ZeroPages, target_page_size: int, assembler: Assembler
    ) -> bool:
        """Place pages that a source sent after the switchover.

        :param assembler: of the connection on which they came.
        :return: False when something was put off: deliver nothing more until `caught_up`.
        :raise ProtocolError: if a host page is interrupted.
        :raise OSError: if there is no memory to keep a page in.
        """
        block = self.holdings.block_of(message.block)
        try:
            if block.page_size != target_page_size:
                placed = assembler.take(block, message, target_page_size)
            elif self._keeps(block):
                placed = self._keep(block, message, target_page_size)
            elif isinstance(message, Pages):
                placed = self._placer.place_pages(
                    block, message.offsets, message.address, message.stride
                )
            else:
                placed = self._placer.place_zeros(block, message.offsets)
        except VmmGone as error:
            self._fail(error)
            return False
        if not placed:
            self._retry_later()
        return placed

    def _keeps(self, block: RamBlock) -> bool:
        """Tell whether what comes for `block` has to go to the staging for now.

        What is placed in private memory goes away with its VMM. So before the guest runs only
        what a fault waits for is placed there, and stays in the staging as well.
        """
        return not (self._runs or self.holdings.stages[block.index].direct)

    def _keep(self, block: RamBlock, message: Pages | ZeroPages, target_page_size: int) -> bool:
        """Stage pages, and place those that a fault waits for."""
        if self._placer.any_removed:
            return self._keep_one_by_one(block, message)
        self.holdings.stage(block, message, target_page_size)
        if isinstance(message, ZeroPages):
            # They stay one bit each; pages with content are counted when they are placed.
            self._counters.pages_zero += len(message)
            self._counters.pages_by_background += len(message)
        self._serve_waiters(block, [offset // block.page_size for offset in message.offsets])
        return True

    def _keep_one_by_one(self, block: RamBlock, message: Pages | ZeroPages) -> bool:
        """As `_keep`, without what the VMM has given back meanwhile."""
        zero = self.holdings.page_map[block.index].zero
        stage = self.holdings.stages[block.index]
        for place, offset in enumerate(message.offsets):
            if zero[offset // block.page_size]:
                self._counters.pages_removed += 1
                continue
            if isinstance(message, Pages):
                stage.write(offset, message.payload(place))
            else:
                stage.write_zeros(offset, block.page_size)
            self._serve_waiters(block, [offset // block.page_size])
        return True

    def _serve_waiters(self, block: RamBlock, pages: list[int]) -> None:
        if self.waiting and self._listening:
            for page in pages:
                if block.address + page * block.page_size in self.waiting:
                    self._faults.answer(block, page)
            if self._faults.deferred:
                self._retry_later()

    def _place_host_page(
        self, block: RamBlock, offset: int, content: memoryview, address: int
    ) -> bool:
        if not self._keeps(block):
            return self._placer.place_host_page(block, offset, address)
        page = offset // block.page_size
        if self._placer.any_removed and self.holdings.page_map[block.index].zero[page]:
            self._counters.pages_removed += 1
            return True
        stage = self.holdings.stages[block.index]
        if address:
            stage.write(offset, content)
        else:
            stage.write_zeros(offset, block.page_size)
        self._serve_waiters(block, [page])
        return True

    def inherit(self) -> None:
        """Go on where a predecessor was killed, or an error was met. After `listen`.

        What was read of the userfaultfd nobody hands out again: removals that may not have been
        noted are noted now, and whoever waits for a page tries again and is read again.
        """
        self._faults.apply_removals(tuple(removals_in(self._events)))
        # Whether there were any nobody leaves behind, only what reads as zeros because of them.
        self._placer.any_removed = any(
            self.holdings.page_map[block.index].zero.any() for block in self.holdings.blocks
        )
        for block in self.holdings.blocks:
            self._memory.userfaultfd.wake(block.address, block.length)

    # -- another stream in the place of one that broke ------------------------------------------

    def stream_lost(self) -> None:
        """Forget what has come and is not placed: the source sends it again."""
        self._placer.forget_unplaced()
        for assembler in self._assemblers:
            assembler.drop()

    def ask_again(self) -> tuple[list[tuple[RamBlock, range]], list[tuple[RamBlock, range]]]:
        """Return what has to be asked for again: what faults wait for, then what lay around that.

        Everything that was asked for: the source may have some of these requests still, and what it
        sends for them on its preempt channel may come behind the end of the main stream. Only for
        what counts as asked for is that waited for.
        """
        waited_for, around = [], []
        for block, outstanding in self.holdings.outstanding():
            for page in list(outstanding.search(bitarray("1"))):
                if block.address + page * block.page_size in self.waiting:
                    waited_for.append((block, range(page, page + 1)))
                    outstanding[page] = 0
            for asked, first, beyond in intervals(outstanding):
                if asked:
                    around.append((block, range(first, beyond)))
        return waited_for, around

    # -- another VMM in the place of one that has not run ---------------------------------------

    def let_go(self) -> None:
        """Stop, and keep what could not be placed any more. For when the VMM has gone.

        :raise OSError: if there is no memory for it.
        """
        self.stop()
        self._broken_off = False
        self._let_go_of_events()
        for block, start, length, address in self._placer.unplaced():
            self.holdings.keep(block, start, length, address)
        self.waiting.clear()

    def move_to(self, memory: GuestMemory, move: Move) -> None:
        """Fill the memory of another VMM from now on. After `let_go`; then `listen`.

        :param move: has copied everything to `memory`.
        :raise OSError: if there is no memory for what serves it. Nothing is lost then.
        """
        move.take_effect()
        # They are of the VMM before, and a successor would go through them again.
        self._events[:] = bytes(len(self._events))
        placer, faults = self._serve(memory)
        self._placer.close()
        self._memory, self._placer, self._faults = memory, placer, faults

    # -- the end of placing ----------------------------------------------------------------------

    def all_came(self) -> None:
        """Take what has not come for zeros, and give them to who waits: nothing more comes.

        For a VMM that has not run: its devices may wait for them, and `finish` waits for it.
        """
        self._never_sent += self.holdings.missing_pages()
        self.holdings.all_came()
        try:
            for address in tuple(self.waiting):
                block = self.holdings.blocks.block_at(address)
                assert block is not None
                self._serve_waiters(block, [(address - block.address) // block.page_size])
        except (VmmGone, OSError) as error:
            self._fail(error)

    def finish(self) -> int:
        """End the filling: every page that can come has come.

        What the source never sent is zero there too (qemu-wire, 3.2): the kernel gives zeros for
        it from the moment at which the memory is no longer registered. What is poisoned stays so.

        :return: number of host pages that were never sent.
        :raise OSError: if the kernel refuses to unregister.
        """
        never_sent = self._never_sent + self.holdings.missing_pages()
        self.stop()
        for block in self.holdings.blocks:
            try:
                self._memory.userfaultfd.unregister(block.address, block.length)
            except OSError as error:
                # The VMM has unmapped the whole block: nobody can wait there.
                if error.errno != errno.EINVAL:
                    raise
        # A thread of the VMM that gave memory back sleeps until its event is read.
        self._faults.drain()
        self.waiting.clear()
        return never_sent

    async def poison_missing(self) -> None:
        """Make everything that is not here a memory error. `finish` follows.

        :raise VmmGone: if the VMM has exited.
        :raise OSError: if the kernel cannot poison.
        """
        await poison_missing(self._memory.userfaultfd, self.holdings, self.read_faults)

    @property
    def progress(self) -> tuple[int, int]:
        """How far it is: host pages that are here, and bytes of those that are begun."""
        begun = sum(assembler.filled for assembler in self._assemblers)
        return self.holdings.page_map.received_pages(), begun

    @property
    def waited(self) -> float:
        """For how many seconds the oldest fault that waits has waited."""
        if not self.waiting:
            return 0.0
        return (perf_counter_ns() - min(self.waiting.values())) * 1e-9

    @property
    def staged(self) -> bool:
        """True while pages wait in the staging."""
        return self._unstaging is not None and self._unstaging.under_way

    @property
    def stalled(self) -> bool:
        """True while pages of the stream are put off: nothing more may be delivered."""
        waiting = any(assembler.waiting for assembler in self._assemblers)
        return waiting or bool(self._placer.pending)

    # -- what was put off --------------------------------------------------------------------

    def _retry_later(self) -> None:
        if self._timer is None and self._loop is not None:
            self._timer = self._loop.call_later(self._retry_delay, self._retry)
            self._retry_delay = min(self._retry_delay * 2, _RETRY_LONGEST)

    def _retry(self) -> None:
        self._timer = None
        if not self._listening:
            return
        try:
            # An unread event holds up every placing, so events come first.
            self._faults.read()
            answered = self._faults.retry_deferred()
            placed = self._placer.retry() and all(
                assembler.go_on() for assembler in self._assemblers
            )
        except (VmmGone, UnexpectedEvent, OSError) as error:
            self._fail(error)
            return
        except ProtocolError as error:
            self._broken(error)
            placed = False
        if placed and answered:
            self._retry_delay = _RETRY_FIRST
        else:
            self._retry_later()
        if placed:
            self._caught_up()

    # -- the end -----------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        self.stop()
        self._broken_off = not isinstance(error, VmmGone)
        self._broken(error)

    def stop(self) -> None:
        """Read no more faults and place nothing more. Idempotent."""
        if self._listening and self._loop is not None:
            self._loop.remove_reader(self._memory.userfaultfd.fileno())
        self._listening = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._unstaging is not None:
            self._unstaging.stop()

    def close(self) -> None:
        """Release map, staging and buffers. Idempotent."""
        self.stop()
        for assembler in self._assemblers:
            assembler.close()
        self._placer.close()
        self.holdings.close()
        self._let_go_of_events()

    def _let_go_of_events(self) -> None:
        self._memory.userfaultfd.read_into(memoryview(bytearray(len(self._events))))
