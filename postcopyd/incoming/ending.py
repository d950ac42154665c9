"""How a migration ends: with all memory, without what is missing, or failed.

First nothing can change any more and the report is settled; then both sides are told; then
everything is given back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator

from postcopyd.incoming import events
from postcopyd.incoming.arrival import Arrival
from postcopyd.incoming.course import Course
from postcopyd.incoming.farewell import Farewell
from postcopyd.incoming.placing import VmmGone
from postcopyd.incoming.recipient import Recipient
from postcopyd.incoming.report import MissingRange
from postcopyd.incoming.standing import Standing
from postcopyd.incoming.states import State
from postcopyd.incoming.tasks import Tasks
from postcopyd.incoming.vmm import Vmm

ListMissing = Callable[[Callable[[], Iterator[MissingRange]]], Awaitable[None]]
"""Keeps a list of all that is missing for ever. It is given in order, as often as it is asked for:
what could not be written is written again from its begin."""


async def list_nowhere(_: Callable[[], Iterator[MissingRange]]) -> None:
    """Keep no list."""


class Ending:
    """Ends one migration, once."""

    def __init__(
        self,
        course: Course,
        recipient: Recipient,
        arrival: Arrival,
        farewell: Farewell,
        standing: Standing,
        tasks: Tasks,
        *,
        trace: Callable[[events.Event], None],
        note: Callable[[], None],
        settle: Callable[[], None],
        list_missing: ListMissing,
        tell_source: Callable[[], None],
        drop_stream: Callable[[], None],
        vmm_gone: Callable[[VmmGone], None],
        release: Callable[[], None],
    ) -> None:
        """End nothing yet.

        :param trace: told of what happens once.
        :param note: tells a successor how it stands.
        :param settle: has the report be as it is now.
        :param list_missing: until it is done nothing is given back, and a successor lists again.
        :param tell_source: tells the source that the migration has failed, if it can be told.
        :param drop_stream: closes all connections of the source.
        :param vmm_gone: told when there is no memory any more that could be poisoned.
        :param release: gives everything back; called last.
        """
        self._course = course
        self._recipient = recipient
        self._arrival = arrival
        self._farewell = farewell
        self._standing = standing
        self._tasks = tasks
        self._trace = trace
        self._note = note
        self._settle = settle
        self._list_missing = list_missing
        self._tell_source = tell_source
        self._drop_stream = drop_stream
        self._vmm_gone = vmm_gone
        self._release = release
        self._all_is_poisoned = False

    # -- with all memory -------------------------------------------------------------------------

    def all_came(self) -> bool:
        """Tell whether nothing more can come from the source that is of use."""
        state = self._course.state
        return state is State.CONVERGED or self._arrival.all_came(self._standing.link)

    def come_if_all_is_here(self) -> None:
        """End it if everything has come and is placed, or is poisoned; else do nothing."""
        recipient, course = self._recipient, self._course
        if course.state is State.ABANDONING:
            if self._all_is_poisoned and recipient.may_be_done:
                course.step(State.ABANDONED)
                self.without_the_rest()
            return
        if not self._arrival.complete and self.all_came() and not recipient.stalled:
            if recipient.loaded_at is None:
                recipient.filling.all_came()
            self._arrival.complete = True
            self._note()
        if not recipient.may_be_done or not self._arrival.complete:
            return
        if course.state not in (State.CONVERGED, State.RUNNING):
            return
        try:
            never_sent = recipient.filling.finish()
        except OSError as error:
            self.fail(f"the memory of the VMM cannot be released: {error}")
            return
        self._standing.all_is_resident(never_sent)
        course.step(State.END)
        self.well()

    def well(self) -> None:
        """Tell that all memory is here. In END."""
        never_sent = self._standing.never_sent
        assert never_sent is not None
        pages = sum(block.pages for block in self._recipient.filling.holdings.blocks)
        seconds = self._standing.window_seconds or 0.0
        self._trace(events.Completed(pages - never_sent, never_sent, seconds))
        self._settle()
        self._tasks.end_with_vmm()
        self._tasks.begin(self._say_goodbye())

    async def _say_goodbye(self) -> None:
        """Tell both sides that all is well, and let the source close its connection."""
        self._farewell.say(self._standing.link)
        if self._recipient.vmm is not None:
            await self._recipient.vmm.complete(0)
        await self._farewell.wait_for_close()
        self._release()

    # -- without what is missing -----------------------------------------------------------------

    def poison(self) -> None:
        """Make a memory error of everything that is missing, and end it then. In ABANDONING."""
        self._tasks.begin_for_vmm(self._poison())

    async def _poison(self) -> None:
        filling = self._recipient.filling
        filling.go_on()
        try:
            await filling.poison_missing()
        except VmmGone as error:
            self._vmm_gone(error)
        else:
            self._all_is_poisoned = True
            self.come_if_all_is_here()

    def without_the_rest(self) -> None:
        """Tell what is missing for ever. In ABANDONED."""
        holdings = self._recipient.filling.holdings
        self._standing.missing = missing = holdings.missing()
        self._trace(events.Abandoned(holdings.missing_pages(), missing.length))
        with contextlib.suppress(OSError):  # it has exited
            self._recipient.filling.finish()
        self._settle()
        self._tasks.end_with_vmm()
        self._tasks.begin(self._say_that_no_more_comes())

    async def _say_that_no_more_comes(self) -> None:
        # The VMM first: nobody knows when there is room for the list.
        if self._recipient.vmm is not None:
            await self._recipient.vmm.complete(self._standing.missing.length)
        await self._list_missing(self._recipient.filling.holdings.missing_ranges)
        self._release()

    # -- failed ----------------------------------------------------------------------------------

    def fail(self, reason: str) -> None:
        """End without all memory: the source goes on, or the guest is lost."""
        before_package, link = self._course.state.before_package, self._standing.link
        lost = not before_package or (link is not None and link.package_begun)
        self._standing.guest_lost = lost
        self._course.failure = reason
        self._course.step(State.FAILED)
        self._trace(events.Failed(reason, lost))
        if before_package:
            self._tell_source()
        self._settle()
        self._tasks.end_with_vmm()
        self._recipient.stop()
        self._drop_stream()
        if self._recipient.vmm is None:
            self._release()
        else:
            self._tasks.begin(self._say_that_it_failed(self._recipient.vmm, reason))

    async def _say_that_it_failed(self, vmm: Vmm, reason: str) -> None:
        await vmm.failed(reason)
        self._release()
