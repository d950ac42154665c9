"""One incoming migration: a stream on one side, a VMM on the other, the state machine between.

The parts live in their own files: the source's side (`source_link.py`), the VMM's side
(`recipient.py`), what the messages do (`reception.py`), how the VMM becomes the guest
(`switchover.py`), how a source is lost and comes back (`sourcing.py`), how it ends (`ending.py`),
and what becomes of it when its process dies (`succession.py`). Here they are put together.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from postcopyd.incoming import events
from postcopyd.incoming.arrival import Arrival
from postcopyd.incoming.cancelling import Cancelling
from postcopyd.incoming.company import Company
from postcopyd.incoming.connection import Connection
from postcopyd.incoming.course import Course
from postcopyd.incoming.ending import Ending, ListMissing, list_nowhere
from postcopyd.incoming.estate import JOURNAL, Estate
from postcopyd.incoming.farewell import Farewell
from postcopyd.incoming.faults import UnexpectedEvent
from postcopyd.incoming.inheriting import RestoreVmm
from postcopyd.incoming.journal import Journal
from postcopyd.incoming.legacy import legacy_of
from postcopyd.incoming.path import StreamPath
from postcopyd.incoming.placing import VmmGone
from postcopyd.incoming.recipient import Recipient, Refused
from postcopyd.incoming.report import Counters, Histogram, Report
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.sourcing import Sourcing
from postcopyd.incoming.stall_watch import StallWatch
from postcopyd.incoming.standing import Standing
from postcopyd.incoming.states import AFTER_SWITCHOVER, WAITS_FOR_MEMORY, State
from postcopyd.incoming.succession import Succession
from postcopyd.incoming.switchover import Switchover
from postcopyd.incoming.tasks import Tasks
from postcopyd.incoming.vmm import Vmm, VmmFailure
from postcopyd.kernel.userfaultfd import Feature, Userfaultfd
from postcopyd.ram.block import RamBlock
from postcopyd.wire.errors import ProtocolError

_LAST_WORDS = 0.5
"""Seconds in which a VMM that has exited may be seen to, by who knows more than that it has."""
_LONG_LAST_WORDS = 15.0
"""The same where nobody knows whether its guest has run."""


class IncomingMigration:
    """One VMM's memory on its way in.

    Give it a VMM (`attach_vmm`) and a stream (`attach_stream`), in either order, from within a
    running event loop. From then on it runs by itself; `wait` returns when it has ended and every
    descriptor is released. After an error it is in a known state: FAILED when the source still is
    the VM or the guest is lost, PAUSED when everything that is here is kept.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        trace: Callable[[events.Event], None],
        estate: Estate | None = None,
        list_missing: ListMissing = list_nowhere,
    ) -> None:
        """Make a migration that waits for its VMM and its stream.

        :param trace: told of everything that happens once (`events.py`); must not raise.
        :param estate: where it leaves what a successor needs, and what a predecessor has left:
            `restore` follows then. It is closed with the migration.
        :param list_missing: given all that is missing, in order, when it is abandoned: a report
            names the first `MOST_RANGES` only. When it returns everything is given back, and not
            before; the VMM does not wait for it.
        :raise OSError: if the kernel has no eventfd or no memory to give.
        :raise JournalUnreadable: if a predecessor has left a journal that cannot be read.
        """
        self._estate = estate = estate or Estate()
        self._loop = asyncio.get_running_loop()
        self._journal = Journal(estate.open(JOURNAL, Journal.create))
        try:
            self._cancelling = Cancelling(self._loop, self._carry_out_cancel)
        except BaseException:
            self._journal.close()
            raise
        self.name = name
        self._course = Course(self._stepped)
        self._settings = settings
        self._trace = trace
        self._counters = Counters()
        self._latency = Histogram()
        self._recipient = Recipient(
            estate,
            settings,
            self._journal.events,
            self._counters,
            self._latency,
            request=self._request_pages,
            removed=self._memory_removed,
            caught_up=self._caught_up,
            broken=self._filling_broken,
            unheard=self._vmm_unheard,
            given=self._note,
        )
        self._removed_before = False
        self._finished = asyncio.Event()
        self._arrival = Arrival(self._recipient)
        self._farewell = Farewell(estate, settings.close_timeout)
        self._tasks = Tasks(
            self._loop,
            vmm_failed=self._vmm_failed,
            failed=lambda error: self._sourcing.lose(str(error)),
        )
        self._switchover = Switchover(
            self._course,
            self._recipient,
            self._tasks,
            link=lambda: self._standing.link,
            all_came=lambda: self._arrival.complete,
            trace=trace,
            note=self._note,
            record=self._record,
            runs=lambda: self._ending.come_if_all_is_here(),
        )
        self._standing = Standing(
            name,
            self._course,
            self._recipient,
            self._switchover,
            self._arrival,
            self._counters,
            self._latency,
        )
        self._ending = Ending(
            self._course,
            self._recipient,
            self._arrival,
            self._farewell,
            self._standing,
            self._tasks,
            trace=trace,
            note=self._note,
            settle=self._settle,
            list_missing=list_missing,
            tell_source=lambda: self._sourcing.tell_that_it_failed(),
            drop_stream=lambda: self._sourcing.drop(),
            vmm_gone=self._filling_broken,
            release=self._release,
        )
        self._company = Company(self._loop, self._counters)
        self._stall = StallWatch(
            self._loop,
            settings.alarm_after,
            progress=lambda: self._recipient.progress,
            waited=lambda: self._recipient.waited,
            stalled=lambda seconds: trace(events.Stalled(seconds, self._recipient.waiting)),
            over=lambda seconds: trace(events.StallOver(seconds)),
        )
        self._sourcing = Sourcing(
            name,
            settings,
            self._course,
            self._recipient,
            self._switchover,
            self._arrival,
            self._farewell,
            self._standing,
            self._tasks,
            self._ending,
            self._company,
            trace=trace,
            request_pages=self._request_pages,
        )
        self._succession = Succession(
            estate,
            self._course,
            self._recipient,
            self._switchover,
            self._arrival,
            self._farewell,
            self._standing,
            self._ending,
            trace=trace,
            note=self._note,
            waits_for_memory=self._stall.start,
            attach_vmm=self.attach_vmm,
            watch_vmm=lambda vmm: self._tasks.begin_for_vmm(self._watch_vmm(vmm)),
            vmm_lost=self._vmm_lost,
        )

    # -- what others ask of it ---------------------------------------------------------------

    @property
    def state(self) -> State:
        """In which state it is."""
        return self._course.state

    @property
    def failure(self) -> str | None:
        """Why it failed, or why it is paused."""
        return self._course.failure

    @property
    def peer(self) -> str | None:
        """Where the source is, None before one has connected."""
        return self._standing.peer

    @property
    def before_package(self) -> bool:
        """True while the source still is the VM, so that an error ends cleanly."""
        return self.state.before_package

    @property
    def has_vmm(self) -> bool:
        """True while there is a VMM whose memory is filled."""
        return self._recipient.vmm is not None

    @property
    def waits_for_vmm(self) -> bool:
        """True when everything is kept for another VMM, because one has not loaded its devices."""
        return self._standing.waits_for_vmm

    @property
    def guest_may_have_run(self) -> bool:
        """True when it `waits_for_vmm`, and the guest may have run in the one before."""
        return self._standing.guest_may_have_run

    @property
    def path(self) -> StreamPath | None:
        """Where its stream goes through the network; None if there is none, or not over IP."""
        return self._standing.link.path if self._standing.link is not None else None

    @property
    def package(self) -> bytes | None:
        """The device package as it was received, None before it has come."""
        return self._standing.package

    @property
    def vmm(self) -> Vmm | None:
        """The VMM whose memory is filled."""
        return self._recipient.vmm

    def attach_vmm(self, vmm: Vmm, *, force: bool = False) -> None:
        """Fill the memory of `vmm`, which is taken over.

        When a VMM has not loaded its devices, another one may take its place.

        :param force: also where the guest may have run in that one.
        :raise Refused: if there is a VMM already, the migration has ended, its memory cannot be
            accounted for, or the guest may have run. `vmm` then still is the caller's.
        """
        if self.state.ended:
            raise Refused(f"migration {self.name!r} has ended")
        recipient = self._recipient
        if recipient.vmm is not None:
            raise Refused(f"migration {self.name!r} already has a VMM: {recipient.vmm.description}")
        if self.waits_for_vmm:
            if self.guest_may_have_run and not force:
                raise Refused(
                    f"the guest of migration {self.name!r} may have run in the VMM before: begun "
                    "once more as it was then, it would spoil what it has written since"
                )
            recipient.attach_replacement(vmm)
            self._tasks.begin_for_vmm(self._replace())
        else:
            recipient.attach(vmm)
        self._note()
        blocks = vmm.memory.blocks
        self._trace(
            events.VmmAttached(vmm.description, len(blocks), sum(block.length for block in blocks))
        )
        self._tasks.begin_for_vmm(self._watch_vmm(vmm))

    def attach_stream(self, connection: Connection, peer: str) -> None:
        """Receive the migration from `connection`, which is taken over.

        While there is a stream a further connection may be its preempt channel; what it is shows
        when it speaks.

        :raise Refused: if it is too late for one. `connection` then still is the caller's.
        """
        self._sourcing.attach(connection, peer)

    def expect_stream(self, connection: socket.socket) -> Callable[[bool], None]:
        """Be told that `connection` may be attached soon, because its handshake is under way.

        :return: to be called when it was attached, or will not be: then with True if a source may
            have made it, so that something may be lost with it.
        """
        return self._sourcing.expect(connection)

    def cancel(self, reason: str, force: bool = False) -> asyncio.Future[None]:
        """End it. Before the package the source goes on; after it the guest is lost.

        It is carried out by the event loop, like everything that happens to a migration. The
        future ends with `Refused` if the package was faster.

        :raise Refused: after the package, unless `force`; or when it has ended.
        """
        if self.state.ended:
            raise Refused(f"migration {self.name!r} has ended")
        self._check_may_end(force)
        return self._cancelling.ask(reason, force)

    def abandon(self, force: bool) -> None:
        """Go on without what has not come, because the source is gone for good.

        It becomes a memory error, the guest keeps the rest, and the migration ends; `wait` returns
        when that is done. To be called in the event loop.

        :param force: even if there is a source; its stream is dropped.
        :raise Refused: if that cannot be done. Nothing has changed then.
        """
        if self.state is State.ABANDONING:
            return
        if self.state.ended:
            raise Refused(f"migration {self.name!r} has ended")
        if self.before_package:
            raise Refused(f"the source of migration {self.name!r} still is the VM: cancel it")
        if self._recipient.vmm is None or self._recipient.loaded_at is None:
            raise Refused(
                f"the VMM of migration {self.name!r} has not loaded its devices: there is no guest "
                "yet that could keep anything"
            )
        if self.state is not State.PAUSED and not force:
            raise Refused(
                f"migration {self.name!r} is {self.state.value}, with its source at {self.peer}: "
                "what is missing may still come"
            )
        if Feature.POISON not in Userfaultfd.offered():
            raise Refused(f"this kernel has no UFFDIO_POISON: Linux {Feature.POISON.since} has")
        self._sourcing.drop()
        if self.state is not State.PAUSED:
            self._sourcing.lose("abandoned by an operator")
        self._course.step(State.ABANDONING)
        self._ending.poison()

    def path_lost(self, reason: str, for_good: bool) -> None:
        """Be told that the network does not carry the stream on `path` any more.

        The stream breaks when that has lasted for `Settings.path_grace`. It may be told again as
        long as more becomes known.

        :param for_good: the stream can never go on, so it breaks at once.
        """
        self._sourcing.path_lost(reason, for_good)

    def path_back(self) -> None:
        """Be told that the network would carry the stream again."""
        self._sourcing.path_back()

    def _check_may_end(self, force: bool) -> None:
        if not self.before_package and not force:
            raise Refused(
                f"migration {self.name!r} is {self.state.value}: its source cannot take the guest "
                f"back, so cancelling loses the guest"
            )

    async def wait(self) -> None:
        """Return when the migration has ended and holds no descriptor any more."""
        await self._finished.wait()

    def report(self) -> Report:
        """Tell how it stands."""
        return self._standing.report(self._stall.seconds, self._sourcing.path_loss)

    # -- from a predecessor, to a successor --------------------------------------------------

    def restore(self, restore_vmm: RestoreVmm) -> None:
        """Go on from what a predecessor has left, who is dead. To be called first, and once.

        Before the package the source is the VM: the migration begins anew, with the same VMM.
        After it everything that is here goes on, and the source is waited for. A step that the
        predecessor may have begun is taken again.

        :raise JournalUnreadable: if what it has left does not fit together. Nothing was changed
            then, and nobody reads zeros as long as its descriptors are kept.
        :raise OSError: if there is no memory for it.
        """
        with legacy_of(
            self._journal,
            self._estate,
            restore_vmm,
            lambda why: self._trace(events.VmmLost(why)),
        ) as legacy:
            if legacy is not None:
                self._succession.take(legacy)

    def let_go(self) -> None:
        """Let go of everything here, when `restore` has failed; what is kept stays kept."""
        self._tasks.end_with_vmm()
        self._recipient.stop()
        self._let_go(self._estate.close)

    def _note(self) -> None:
        """Tell a successor how it stands."""
        try:
            self._record()
        except OSError as error:
            self._trace(events.NotNoted(str(error)))

    def _record(self) -> None:
        """As `_note`.

        :raise OSError: if that cannot be told.
        """
        record = self._standing.record()
        self._journal.write(record)
        self._standing.recorded(record)

    # -- another VMM in the place of one that has not loaded --------------------------------------

    async def _replace(self) -> None:
        """Go on with another VMM where the one before has ended."""
        await self._switchover.replace()
        self._sourcing.resume()
        if self._arrival.stream_ended:
            self._sourcing.look_for_the_end()  # it may have ended while there was no VMM

    def _vmm_failed(self, error: VmmFailure) -> None:
        if not error.may_have_run:
            self._recipient.may_run = False
        self._vmm_lost(f"the VMM failed: {error}")

    def _vmm_lost(self, reason: str) -> None:
        """Go on without the VMM, which has gone or does not load its devices."""
        recipient = self._recipient
        if self.state.ended or recipient.vmm is None:
            return
        has_run = recipient.loaded_at is not None or recipient.vmm.has_run
        if self.before_package or has_run:
            self._ending.fail(reason)
            return
        self._tasks.end_with_vmm()
        if self._standing.link is not None:
            self._standing.link.pause()
        vmm = recipient.vmm
        try:
            recipient.let_go()
        except OSError as error:
            reason += f"; pages that had just come are lost until they are asked again: {error}"
        self._tasks.begin(self._dismiss(vmm, reason))
        self._course.failure = reason
        if self.state is not State.PAUSED:
            self._course.step(State.PAUSED)
        else:
            self._note()
        self._trace(events.VmmLost(reason))

    async def _lose_vmm_soon(self, reason: str) -> None:
        """Go on without the VMM, whose memory has gone; unless it says why first."""
        # A process gives its memory back before it closes anything, and that takes its time: the
        # more so as what it says then may be that it has not run.
        unknown = self._recipient.may_run and self._recipient.loaded_at is None
        await asyncio.sleep(_LONG_LAST_WORDS if unknown else _LAST_WORDS)
        self._vmm_lost(reason)

    async def _dismiss(self, vmm: Vmm, reason: str) -> None:
        try:
            await vmm.failed(reason)
        finally:
            vmm.close()

    # -- faults ------------------------------------------------------------------------------

    def _request_pages(self, requests: list[tuple[RamBlock, range]]) -> None:
        link = self._standing.link
        if link is None or self._course.state not in AFTER_SWITCHOVER:
            return
        request_pages = link.writer.request_pages
        message = b""
        for block, pages in requests:
            size = block.page_size
            message += request_pages(block.name, pages.start * size, len(pages) * size)
        link.send(message)

    def _memory_removed(self, block: RamBlock, offset: int, length: int) -> None:
        if not self._removed_before:
            self._removed_before = True
            self._trace(events.MemoryRemoved(block.name, offset, length))

    def _caught_up(self) -> None:
        self._sourcing.resume()
        if self._arrival.stream_ended:
            self._sourcing.look_for_the_end()
        self._ending.come_if_all_is_here()

    # -- the end -----------------------------------------------------------------------------

    def _filling_broken(self, error: Exception) -> None:
        if isinstance(error, VmmGone):
            self._tasks.begin_for_vmm(self._lose_vmm_soon(str(error)))
        elif isinstance(error, UnexpectedEvent | ProtocolError):
            self._sourcing.lose(str(error))
        else:
            self._sourcing.lose(f"filling the memory failed: {error}")

    def _vmm_unheard(self, reason: str | None) -> None:
        self._trace(events.VmmHeard() if reason is None else events.VmmUnheard(reason))

    async def _watch_vmm(self, vmm: Vmm) -> None:
        await vmm.gone()
        self._vmm_lost(f"the VMM has gone ({vmm.description})")

    def _carry_out_cancel(self, reason: str, force: bool) -> None:
        if not self.state.ended:
            self._check_may_end(force)
            self._ending.fail(reason)

    def _release(self) -> None:
        """Give back every descriptor and end every task; the report stays."""
        self._let_go(self._estate.settle)

    def _let_go(self, of_the_estate: Callable[[], None]) -> None:
        self._tasks.end()
        self._sourcing.drop()
        self._company.leave()
        self._stall.stop()
        self._cancelling.close()
        self._farewell.close()

        def released() -> None:
            self._journal.close()
            of_the_estate()
            self._finished.set()

        self._recipient.close(released)

    # -- helpers -----------------------------------------------------------------------------

    def _stepped(self, old: State, new: State) -> None:
        if new in WAITS_FOR_MEMORY:
            self._stall.start()
        else:
            self._stall.end()
        self._note()
        self._trace(events.StateChanged(old, new))

    def _settle(self) -> None:
        self._standing.settle(self._stall.seconds, self._sourcing.path_loss)
