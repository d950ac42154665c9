"""The VMM's side of a migration: whose memory is filled, and how it becomes the guest.

A VMM that does not load its devices may be replaced by another: what has come for its memory, and
what it was given to load, is kept until one of them runs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from time import perf_counter

from postcopyd.incoming import handshake, inheriting, source_record
from postcopyd.incoming.aside import Aside
from postcopyd.incoming.assembling import Assembler
from postcopyd.incoming.blocktime import Blocktime, ThreadReport
from postcopyd.incoming.collecting import Collection
from postcopyd.incoming.estate import Estate
from postcopyd.incoming.filling import MemoryFilling
from postcopyd.incoming.journal import (
    JournalUnreadable,
    SourceRecord,
    VmmRecord,
)
from postcopyd.incoming.loading import Loading
from postcopyd.incoming.moving import check_fits
from postcopyd.incoming.replacing import Replacement
from postcopyd.incoming.report import BlockReport, Counters, Histogram
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.staging_limits import StagingLimits
from postcopyd.incoming.vmm import FedBlock, GuestMemory, Vmm, VmmFailure
from postcopyd.kernel import memory_file
from postcopyd.kernel.memory import HOST_PAGE_SIZE
from postcopyd.ram.block import RamBlock
from postcopyd.ram.page_map import received_bitmap
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import (
    Advise,
    BlockEntry,
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
        estate: Estate,
        settings: Settings,
        events: memoryview,
        counters: Counters,
        latency: Histogram,
        *,
        request: Callable[[list[tuple[RamBlock, range]]], None],
        removed: Callable[[RamBlock, int, int], None],
        caught_up: Callable[[], None],
        broken: Callable[[Exception], None],
        unheard: Callable[[str | None], None],
        given: Callable[[], None],
    ) -> None:
        """Wait for a VMM.

        `unheard` is that of `DeviceLoad`; `given` is called when `may_run` has become true; all
        else is that of `MemoryFilling`.
        """
        self._estate = estate
        self._settings = settings
        self._events = events
        self._package_file = -1
        self._counters = counters
        self._latency = latency
        self._request = request
        self._removed = removed
        self._caught_up = caught_up
        self._broken = broken
        self._unheard = unheard
        self._given = given
        self._loop = asyncio.get_running_loop()
        self.vmm: Vmm | None = None
        """None before one has come, and while one that did not load has none in its place."""
        self._replacement: Replacement | None = None
        self._may_be_unsettled = False
        """True for an inherited VMM: who has left it may have been killed before all that is left
        of it outlived us."""
        self.attached = asyncio.Event()
        self._filling: MemoryFilling | None = None
        self._assemblers: tuple[Assembler, Assembler] | None = None
        self._blocktime: Blocktime | None = None
        self._collection = Collection(())
        self._loading: Loading | None = None
        self._block_list: BlockList | None = None
        self._target_page_size = 0
        self._discard_asked = False
        self._aside = Aside(self._loop)
        self._staging_limits = StagingLimits(self._loop, settings, self._staged)
        self.loaded_at: float | None = None
        """When the VMM has run, seconds of `perf_counter`; None before."""
        self.may_run = False
        """True from when the VMM, or the last one, may run whether it has said so or not. Who has
        another one take its place says that it has not."""

    # -- which VMM -----------------------------------------------------------------------------

    def attach(self, vmm: Vmm) -> None:
        """Take over the first VMM.

        :raise Refused: if its memory cannot be accounted for. It then still is the caller's.
        """
        length = sum(block.length for block in vmm.memory.blocks)
        if length > self._settings.memory_limit:
            raise Refused(
                f"the VMM has {length >> 30} GiB of memory, more than "
                f"{self._settings.memory_limit >> 30} GiB: raise memory_gib"
            )
        try:
            self._open(vmm.memory, vmm.fed_blocks, vmm.thread_names)
        except (OSError, ValueError) as error:
            raise Refused(f"the memory of the VMM cannot be used: {error}") from error
        self._may_be_unsettled = self._estate.leaves(inheriting.WATCHES_MEMORY)
        inheriting.leave(vmm, self._estate)
        self._take(vmm)

    def _open(
        self,
        memory: GuestMemory,
        fed_blocks: tuple[FedBlock, ...],
        thread_names: Mapping[int, str],
    ) -> None:
        """Open the account of this memory, or that of a predecessor.

        All files are opened now, because a successor finds only those that were kept in time.

        :raise OSError: if there is no memory for it.
        :raise ValueError: if the blocks contradict each other.
        """
        estate = self._estate
        self._blocktime = Blocktime(thread_names) if thread_names else None
        self._collection = Collection(fed_blocks)
        self._collection.open(
            lambda size: estate.open(
                "collection", lambda: memory_file.create("postcopyd-collection", size)
            )
        )
        if self._package_file < 0:
            self._package_file = estate.open(
                "package", lambda: memory_file.create("postcopyd-package", 0)
            )
        self._filling = filling = MemoryFilling(
            memory,
            estate,
            self._events,
            self._counters,
            self._latency,
            self._blocktime,
            request=self._request,
            removed=self._removed,
            caught_up=self._caught_up,
            broken=self._broken,
        )
        self._assemblers = (filling.new_assembler(), filling.new_assembler())

    def attach_replacement(self, vmm: Vmm) -> None:
        """Take over another VMM in the place of one that has not loaded; `move` follows.

        :raise Refused: if it is not the machine that everything that is here is for. It then still
            is the caller's.
        """
        assert self._loading is not None and self._block_list is not None
        holdings = self.filling.holdings
        try:
            check_fits(holdings, vmm.memory)
            vmm.check_machine(self._loading.configuration.machine)
            handshake.check_block_list(
                self._block_list, holdings.blocks, Collection(vmm.fed_blocks)
            )
        except (ValueError, VmmFailure, ProtocolError) as error:
            raise Refused(f"{vmm.description} cannot take the guest: {error}") from error
        self.may_run = False
        self._replacement = Replacement(vmm, self._estate)
        self._take(vmm)

    def _take(self, vmm: Vmm) -> None:
        self.vmm = vmm
        self.attached.set()

    # -- from a predecessor --------------------------------------------------------------------

    def restore(
        self,
        memory: GuestMemory,
        fed_blocks: tuple[FedBlock, ...],
        thread_names: Mapping[int, str],
    ) -> None:
        """Go on with the account of a predecessor. `restore_vmm` follows if its VMM is there.

        :raise JournalUnreadable: if what it has left does not fit together.
        :raise OSError: if there is no memory for it.
        """
        try:
            self._open(memory, fed_blocks, thread_names)
        except ValueError as error:
            raise JournalUnreadable(str(error)) from error

    def restore_source(self, source: SourceRecord) -> None:
        """Know again what the source does not say again.

        :raise JournalUnreadable: if it cannot have said that.
        """
        try:
            configuration = source_record.configuration_of(source)
            self._loading = loading = Loading(configuration, self._unheard, self._is_given)
            loading.collection = self._collection
            self.take_block_list(source_record.block_list_of(source))
            loading.take_package(source_record.package_of(source, self._package_file))
            if source.target_page_size != HOST_PAGE_SIZE:
                raise ValueError(f"target pages of {source.target_page_size} bytes")
        except (ProtocolError, ValueError, StopIteration) as error:
            raise JournalUnreadable(f"what its source has said is wrong: {error}") from error
        self._target_page_size = source.target_page_size
        self._discard_asked = True

    def restore_vmm(self, vmm: Vmm, loaded_at: float | None) -> None:
        """Serve the faults of a predecessor's VMM, which is taken over.

        :param loaded_at: when it has run; None if it has not.
        :raise OSError: if it has exited.
        """
        self.vmm = vmm
        self._may_be_unsettled = True
        self.attached.set()
        self.listen()
        self.filling.inherit()
        if loaded_at is not None:
            self._runs(loaded_at)

    def restore_ended(self, vmm: Vmm | None) -> int:
        """Know what a predecessor has completed, whose VMM has all its memory for itself.

        :param vmm: taken over; None if it has gone since.
        :return: number of host pages that were never sent.
        """
        self.vmm = vmm
        return self.filling.holdings.missing_pages()

    @property
    def moving(self) -> bool:
        """True while what is here is on its way to the memory of a VMM that replaces another."""
        return self._replacement is not None and not self._replacement.in_place

    async def move(self, record: Callable[[], None]) -> None:
        """Give what is here to the memory of the VMM that has taken another's place.

        :param record: tells a successor how it stands, or raises OSError.
        :raise VmmFailure: if it does not do its part, or its memory cannot be written. Everything
            is as before then.
        """
        assert self._replacement is not None
        try:
            await self._replacement.move(self.filling, self._aside, record)
        except (OSError, ValueError) as error:
            raise VmmFailure(f"what is here cannot be given to it: {error}") from error
        self._replacement = None
        if self._blocktime is not None:
            self._blocktime.rename(self._the_vmm().thread_names)

    def let_go(self) -> None:
        """Keep everything for another VMM, and forget the one that has not loaded.

        :raise OSError: if there is no memory for pages that had just come: they are lost.
        """
        self.vmm = None
        if self._replacement is not None:
            self._replacement.give_up()
            self._replacement = None
        self.attached.clear()
        self.filling.let_go()

    def vmm_record(self) -> VmmRecord | None:
        """Return what the journal is to say of the VMM; None if that is what it has said."""
        if self._replacement is not None:
            return self._replacement.record
        return inheriting.record_of(self.vmm) if self.vmm is not None else None

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
        self._loading = Loading(configuration, self._unheard, self._is_given)

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
        await self._aside.do(holdings.empty)

    def take_block_list(self, message: BlockList) -> None:
        """Compare the source's RAM blocks with the VMM's.

        :raise ProtocolError: naming what differs.
        :raise OSError: if there is no memory for the blocks that are not watched.
        """
        handshake.check_block_list(message, self.filling.holdings.blocks, self._collection)
        self.loading.begin(message)
        self._block_list = message

    @property
    def block_entries(self) -> tuple[BlockEntry, ...]:
        """The source's RAM blocks, once they are known."""
        assert self._block_list is not None
        return self._block_list.blocks

    @property
    def has_block_list(self) -> bool:
        """True once the source's RAM blocks are known to be the VMM's."""
        return self._block_list is not None

    def keep(self, message: Pages | ZeroPages) -> None:
        """Keep pages that come before the switchover.

        :raise ProtocolError: if that is more than may be kept.
        :raise OSError: if there is no memory for them.
        """
        self._counters.pages_precopy += len(message)
        if not self.loading.take(message):
            holdings = self.filling.holdings
            holdings.stage(holdings.block_of(message.block), message, self._target_page_size)
            self._staging_limits.check(len(message))

    def _staged(self) -> int:
        return self._filling.holdings.staged_bytes if self._filling is not None else 0

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

    def stream_lost(self) -> None:
        """Forget what the stream has brought and could not be placed yet."""
        if self._filling is not None:
            self._filling.stream_lost()

    def received_bitmap(self, name: str) -> bytes:
        """Return the RECV_BITMAP payload of a block of the source's: what is here of it.

        :raise ProtocolError: if there is no such block.
        """
        bitmap = self.loading.received_bitmap(name)
        if bitmap is None:
            holdings = self.filling.holdings
            block = holdings.block_of(name)
            maps = holdings.page_map[block.index]
            bitmap = received_bitmap(block, maps, self._target_page_size)
        return bitmap

    def take_package(self, message: Package) -> None:
        """Take the device package, and leave it to a successor.

        :raise ProtocolError: if it is malformed.
        :raise OSError: if there is no memory for it.
        """
        self.loading.take_package(message)
        written = 0
        while written < len(message.data):
            written += os.pwrite(self._package_file, message.data[written:], written)

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
        await self._settled()
        pings = await self.loading.run(self._the_vmm())
        self._runs(perf_counter())
        return pings

    def converge(self) -> None:
        """Serve faults from what is here: everything has come. `load_converged` follows.

        :raise OSError: if the kernel refuses to register a block.
        """
        self.filling.holdings.all_came()
        self.listen()

    async def load_converged(self) -> None:
        """Have the VMM load its devices as they come. As `load`."""
        await self._settled()
        await self.loading.run_converged(self._the_vmm())
        self._runs(perf_counter())

    async def _settled(self) -> None:
        """Return when a VMM that was inherited may become the guest.

        Any other one has been told that it is taken, or has taken another's place, when everything
        was settled already.
        """
        if self._may_be_unsettled:
            await self._estate.settled()
            self._may_be_unsettled = False

    def _is_given(self) -> None:
        self.may_run = True
        self._given()

    def _runs(self, since: float) -> None:
        self.loaded_at = since
        self.filling.guest_runs()
        self._collection.close()

    @property
    def stalled(self) -> bool:
        """True while something that has come is in no memory that outlives us."""
        return self._filling is not None and self._filling.stalled

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
    def pages_outstanding(self) -> bool:
        """True while a page is not here that was asked for."""
        missing = next(self.loading.missing(), None)
        return missing is not None or self.filling.holdings.outstanding_pages() > 0

    def in_a_host_page(self, channel: int) -> bool:
        """Tell whether a channel, `MAIN` or `PREEMPT`, is in the middle of a host page."""
        return self._assemblers is not None and self._assemblers[channel].unfinished

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

        def close() -> None:
            self._close()
            closed()

        self._aside.then(close)

    def _close(self) -> None:
        self._staging_limits.leave()
        if self._filling is not None:
            self._filling.close()
        self._collection.close()
        if self._package_file >= 0:
            os.close(self._package_file)
            self._package_file = -1
        if self.vmm is not None:
            self.vmm.close()

    # -- how it stands -------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many pages are waited for now."""
        return len(self._filling.waiting) if self._filling is not None else 0

    @property
    def waited(self) -> float:
        """For how many seconds the oldest fault that waits has waited."""
        return self._filling.waited if self._filling is not None else 0.0

    @property
    def progress(self) -> tuple[int, int, int]:
        """How far the memory is that is to come; different whenever some of it has come."""
        placed = self._filling.progress if self._filling is not None else (0, 0)
        return *placed, self._collection.pages_received

    def blocks(self) -> list[BlockReport]:
        """Tell of each block how much is here."""
        blocks = self._filling.holdings.reports() if self._filling is not None else []
        return blocks + self._collection.reports()

    def threads(self) -> list[ThreadReport]:
        """Tell how long each thread of the VMM was blocked, where they can be told apart."""
        return self._blocktime.reports() if self._blocktime is not None else []
