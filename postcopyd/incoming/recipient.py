"""The VMM's side of a migration: whose memory is filled, and how it becomes the guest.

A VMM that does not load its devices may be replaced by another: what has come for its memory, and
what it was given to load, is kept until one of them runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter

from postcopyd.incoming import handshake
from postcopyd.incoming.assembling import Assembler
from postcopyd.incoming.blocktime import Blocktime, ThreadReport
from postcopyd.incoming.collecting import Collection
from postcopyd.incoming.filling import MemoryFilling
from postcopyd.incoming.loading import Loading
from postcopyd.incoming.report import BlockReport, Counters, Histogram
from postcopyd.incoming.vmm import Vmm, VmmFailure
from postcopyd.ram.block import RamBlock
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import (
    Advise,
    BlockList,
    Configuration,
    Discard,
    Package,
    Pages,
    ZeroPages,
)

MAIN, PREEMPT = 0, 1
"""The channels on which pages come."""


class Refused(Exception):
    """The migration does not take what was offered, or does not do what was asked; says why."""


class Recipient:
    """What one migration fills. Nothing can be asked of it before `attached`, but `attach`."""

    def __init__(
        self,
        counters: Counters,
        latency: Histogram,
        *,
        request: Callable[[list[tuple[RamBlock, range]]], None],
        removed: Callable[[RamBlock, int, int], None],
        caught_up: Callable[[], None],
        broken: Callable[[Exception], None],
    ) -> None:
        """Wait for a VMM. The callbacks are those of `MemoryFilling`."""
        self._counters = counters
        self._latency = latency
        self._request = request
        self._removed = removed
        self._caught_up = caught_up
        self._broken = broken
        self._loop = asyncio.get_running_loop()
        self.vmm: Vmm | None = None
        """None before one has come, and while one that did not load has none in its place."""
        self.attached = asyncio.Event()
        self._filling: MemoryFilling | None = None
        self._assemblers: tuple[Assembler, Assembler] | None = None
        self._blocktime: Blocktime | None = None
        self._collection = Collection(())
        self._loading: Loading | None = None
        self._block_list: BlockList | None = None
        self._target_page_size = 0
        self._discard_asked = False
        self._copying: asyncio.Future[None] | None = None
        self.loaded_at: float | None = None
        """When the VMM has run, seconds of `perf_counter`; None before."""

    # -- which VMM -----------------------------------------------------------------------------

    def attach(self, vmm: Vmm) -> None:
        """Take over the first VMM.

        :raise Refused: if its memory cannot be accounted for. It then still is the caller's.
        """
        blocktime = Blocktime(vmm.thread_names) if vmm.thread_names else None
        try:
            filling = MemoryFilling(
                vmm.memory,
                self._counters,
                self._latency,
                blocktime,
                request=self._request,
                removed=self._removed,
                caught_up=self._caught_up,
                broken=self._broken,
            )
        except (OSError, ValueError) as error:
            raise Refused(f"the memory of the VMM cannot be used: {error}") from error
        self._filling = filling
        self._blocktime = blocktime
        self._assemblers = (filling.new_assembler(), filling.new_assembler())
        self._collection = Collection(vmm.fed_blocks)
        self._take(vmm)

    def attach_replacement(self, vmm: Vmm) -> None:
        """Take over another VMM in the place of one that has not loaded; `move` follows.

        :raise Refused: if it is not the machine that everything that is here is for. It then still
            is the caller's.
        """
        assert self._loading is not None and self._block_list is not None
        holdings = self.filling.holdings
        try:
            holdings.check_fits(vmm.memory)
            vmm.check_machine(self._loading.configuration.machine)
            handshake.check_block_list(
                self._block_list, holdings.blocks, Collection(vmm.fed_blocks)
            )
        except (ValueError, VmmFailure, ProtocolError) as error:
            raise Refused(f"{vmm.description} cannot take the guest: {error}") from error
        self._take(vmm)

    def _take(self, vmm: Vmm) -> None:
        self.vmm = vmm
        self.attached.set()

    async def move(self) -> None:
        """Give what is here to the memory of the VMM that has taken another's place.

        :raise VmmFailure: if it does not do its part.
        :raise OSError: if its memory cannot be written.
        """
        vmm = self._the_vmm()
        await vmm.advise()
        await vmm.discard()
        await self._copy_aside(self.filling.move_to, vmm.memory)
        if self._blocktime is not None:
            self._blocktime.rename(vmm.thread_names)

    def let_go(self) -> None:
        """Keep everything for another VMM, and forget the one that has not loaded.

        :raise OSError: if there is no memory for pages that had just come: they are lost.
        """
        self.vmm = None
        self.attached.clear()
        self.filling.let_go()

    @property
    def filling(self) -> MemoryFilling:
        """The filling of its memory, once a VMM has come."""
        assert self._filling is not None
        return self._filling

    def _the_vmm(self) -> Vmm:
        assert self.vmm is not None
        return self.vmm

    # -- before the switchover -----------------------------------------------------------------

    def configure(self, configuration: Configuration) -> None:
        """Take the source's configuration, before there need be a VMM."""
        self._loading = Loading(configuration)

    @property
    def loading(self) -> Loading:
        """What the VMM needs to become the guest, once the source has begun."""
        assert self._loading is not None
        return self._loading

    @property
    def begun(self) -> bool:
        """True once the source has sent its configuration."""
        return self._loading is not None

    async def prepare(self, message: Advise, return_path_open: bool) -> None:
        """Agree on machine and page sizes, and empty all memory.

        :raise ProtocolError: if source and VMM differ.
        :raise VmmFailure: if the VMM is another machine, or does not do its part.
        :raise OSError: if memory does not let itself be emptied.
        """
        vmm = self._the_vmm()
        holdings = self.filling.holdings
        self._target_page_size = message.target_page_size
        self.loading.collection = self._collection
        vmm.check_machine(self.loading.configuration.machine)
        handshake.check_advise(message, holdings.blocks, self._collection, return_path_open)
        await vmm.advise()
        await self._copy_aside(holdings.empty)

    def take_block_list(self, message: BlockList) -> None:
        """Compare the source's RAM blocks with the VMM's.

        :raise ProtocolError: naming what differs.
        :raise OSError: if there is no memory for the blocks that are not watched.
        """
        handshake.check_block_list(message, self.filling.holdings.blocks, self._collection)
        self.loading.begin(message)
        self._block_list = message

    @property
    def has_block_list(self) -> bool:
        """True once the source's RAM blocks are known to be the VMM's."""
        return self._block_list is not None

    def keep(self, message: Pages | ZeroPages) -> None:
        """Keep pages that come before the switchover.

        :raise OSError: if there is no memory for them.
        """
        self._counters.pages_precopy += len(message)
        if not self.loading.take(message):
            holdings = self.filling.holdings
            holdings.stage(holdings.block_of(message.block), message, self._target_page_size)

    async def allow_discards(self) -> None:
        """Have huge pages forbidden; once, before the first discard or else the end of pre-copy.

        :raise VmmFailure: if the VMM does not do its part.
        """
        if not self._discard_asked:
            self._discard_asked = True
            await self._the_vmm().discard()

    def discard(self, message: Discard) -> None:
        """Forget what came for these ranges.

        :raise ProtocolError: if a range is not whole host pages.
        """
        if not self.loading.take(message):
            self.filling.holdings.discard(message)

    # -- after it ------------------------------------------------------------------------------

    def place(self, message: Pages | ZeroPages, channel: int) -> bool:
        """Place pages; False when something was put off: deliver nothing more until `caught_up`.

        :param channel: `MAIN` or `PREEMPT`.
        :raise ProtocolError: if a page is of no block, or interrupts a host page.
        :raise OSError: if there is no memory to keep a page in.
        """
        if self.loaded_at is None and self.loading.take(message):
            return True
        assert self._assemblers is not None
        assembler = self._assemblers[channel]
        return self.filling.place(message, self._target_page_size, assembler)

    def take_package(self, message: Package) -> None:
        """Take the device package.

        :raise ProtocolError: if it is malformed.
        """
        self.loading.take_package(message)

    def listen(self) -> None:
        """Serve faults from now on.

        :raise OSError: if the kernel refuses to register a block.
        """
        self.filling.listen(self._loop)
        self._the_vmm().listening()

    async def load(self) -> tuple[int, ...]:
        """Have the VMM load its devices as soon as what they need is here.

        :return: the values of the PINGs that report it.
        :raise VmmFailure: if the VMM does not load them; another one may.
        """
        pings = await self.loading.run(self._the_vmm())
        self._runs()
        return pings

    def converge(self) -> None:
        """Serve faults from what is here: everything has come. `load_converged` follows.

        :raise OSError: if the kernel refuses to register a block.
        """
        self.filling.holdings.all_came()
        self.listen()

    async def load_converged(self) -> None:
        """Have the VMM load its devices as they come. As `load`."""
        await self.loading.run_converged(self._the_vmm())
        self._runs()

    def _runs(self) -> None:
        self.loaded_at = perf_counter()
        self.filling.guest_runs()
        self._collection.close()

    @property
    def may_be_done(self) -> bool:
        """True when the VMM runs and nothing waits to be placed."""
        filling = self._filling
        return (
            self.loaded_at is not None
            and filling is not None
            and not filling.staged
            and not filling.stalled
        )

    @property
    def in_a_host_page(self) -> bool:
        """True while the main stream is in the middle of a host page."""
        return self._assemblers is not None and self._assemblers[MAIN].unfinished

    def read_faults(self) -> None:
        """Read and answer what faults there are; harmless when there are none."""
        if self._filling is not None:
            self._filling.read_faults()

    # -- the end -------------------------------------------------------------------------------

    def stop(self) -> None:
        """Read no more faults and place nothing more. Idempotent."""
        if self._filling is not None:
            self._filling.stop()

    def close(self, closed: Callable[[], None]) -> None:
        """Release everything, the VMM's descriptors too, and then call `closed`."""
        copying = self._copying
        if copying is None or copying.done():
            self._close(closed)
        else:
            # A thread is at work on the memory files: closing one under it would let it loose on
            # whatever gets the descriptor's number next.
            copying.add_done_callback(lambda copied: self._close(closed, copied))

    def _close(
        self, closed: Callable[[], None], copied: asyncio.Future[None] | None = None
    ) -> None:
        if copied is not None and not copied.cancelled():
            copied.exception()  # it has ended anyway: why does not matter any more
        if self._filling is not None:
            self._filling.close()
        self._collection.close()
        if self.vmm is not None:
            self.vmm.close()
        closed()

    async def _copy_aside(self, work: Callable[..., None], *arguments: object) -> None:
        """Have a thread do what takes long, at memory files that must stay open meanwhile."""
        self._copying = self._loop.run_in_executor(None, work, *arguments)
        await asyncio.shield(self._copying)

    # -- how it stands -------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many pages are waited for now."""
        return len(self._filling.waiting) if self._filling is not None else 0

    def blocks(self) -> list[BlockReport]:
        """Tell of each block how much is here."""
        blocks = self._filling.holdings.reports() if self._filling is not None else []
        return blocks + self._collection.reports()

    def threads(self) -> list[ThreadReport]:
        """Tell how long each thread of the VMM was blocked, where they can be told apart."""
        return self._blocktime.reports() if self._blocktime is not None else []
