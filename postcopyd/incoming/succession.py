"""What a successor does with what a predecessor has left, who is dead.

Before the package the source is the VM: the migration begins anew, with the same VMM. After it
everything that is here goes on, and the source is waited for.
"""

from __future__ import annotations

from collections.abc import Callable

from postcopyd.incoming import events
from postcopyd.incoming.arrival import Arrival
from postcopyd.incoming.course import Course
from postcopyd.incoming.ending import Ending
from postcopyd.incoming.estate import Estate
from postcopyd.incoming.farewell import LAST_CONNECTION, Farewell
from postcopyd.incoming.journal import JournalUnreadable
from postcopyd.incoming.legacy import Legacy
from postcopyd.incoming.recipient import Recipient
from postcopyd.incoming.standing import Standing
from postcopyd.incoming.states import WAITS_FOR_MEMORY, State
from postcopyd.incoming.switchover import Switchover
from postcopyd.incoming.vmm import Vmm
from postcopyd.wire.stream_reader import ResumeState


class Succession:
    """Has one migration go on where a predecessor was."""

    def __init__(
        self,
        estate: Estate,
        course: Course,
        recipient: Recipient,
        switchover: Switchover,
        arrival: Arrival,
        farewell: Farewell,
        standing: Standing,
        ending: Ending,
        *,
        trace: Callable[[events.Event], None],
        note: Callable[[], None],
        waits_for_memory: Callable[[], None],
        attach_vmm: Callable[[Vmm], None],
        watch_vmm: Callable[[Vmm], None],
        vmm_lost: Callable[[str], None],
    ) -> None:
        """Take over nothing yet; the parts are those of the migration.

        :param trace: told of what happens once.
        :param note: tells the next successor how it stands.
        :param waits_for_memory: told that a guest may wait for its memory.
        :param attach_vmm: called with the VMM with which the migration begins anew.
        :param watch_vmm: called with the VMM that goes on, which may exit.
        :param vmm_lost: told why a VMM is of no use that has not run.
        """
        self._estate = estate
        self._course = course
        self._recipient = recipient
        self._switchover = switchover
        self._arrival = arrival
        self._farewell = farewell
        self._standing = standing
        self._ending = ending
        self._trace = trace
        self._note = note
        self._waits_for_memory = waits_for_memory
        self._attach_vmm = attach_vmm
        self._watch_vmm = watch_vmm
        self._vmm_lost = vmm_lost

    def take(self, legacy: Legacy) -> None:
        """Take over `legacy` and go on. A step that its owner may have begun is taken again.

        :raise JournalUnreadable: if it does not fit together; nobody has read zeros then.
        :raise OSError: if there is no memory for it.
        """
        record = legacy.record
        self._standing.take_over(legacy)
        state = legacy.state
        if legacy.begins_anew:
            self._begin_anew(legacy)
        elif record.source is None and not (state.ended or state is State.CONVERGED):
            raise JournalUnreadable(f"it knows of no source in state {state.value}")
        else:
            self._go_on_from(legacy)

    def _begin_anew(self, legacy: Legacy) -> None:
        for name in ("page-map", "collection", "package", LAST_CONNECTION):
            self._estate.forget(name)
        self._standing.peer = None
        if legacy.vmm is None:
            self._ending.fail("its VMM is of no use after the restart of postcopyd")
            return
        self._attach_vmm(legacy.vmm)
        if legacy.state.ended:
            self._ending.fail(
                legacy.record.failure or "it had ended before postcopyd was restarted"
            )
        elif legacy.state is State.CONVERGED:
            self._ending.fail(
                "postcopyd was killed while the VMM loaded its devices: the source goes on"
            )

    def _go_on_from(self, legacy: Legacy) -> None:
        recipient = self._recipient
        state, record, vmm = legacy.state, legacy.record, legacy.vmm
        names = vmm.thread_names if vmm is not None else {}
        recipient.restore(legacy.inherited.memory, legacy.inherited.fed_blocks, names)
        recipient.may_run = record.may_run
        self._switchover.began_at = record.switchover_at
        self._standing.preempt = record.preempt
        if record.source is not None:
            recipient.restore_source(record.source)
            if record.all_came:
                recipient.loading.all_came()
            self._standing.resume = ResumeState(
                recipient.block_entries, record.source.section_id, record.source.target_page_size
            )
        self._arrival.complete = record.all_came
        self._course.begin_in(legacy.goes_on_in, legacy.failure)
        self._standing.guest_lost = state is State.FAILED
        if self._course.state in WAITS_FOR_MEMORY:
            self._waits_for_memory()
        if self._course.state is State.PAUSED and not record.all_came:
            # Its source has to come back, so it has to see that this connection is of no use.
            self._farewell.release()
        self._farewell.inherit()
        self._trace(
            events.Restored(self._course.state.value, recipient.filling.holdings.missing_pages())
        )
        if state is State.END:
            self._standing.never_sent = recipient.restore_ended(vmm)
            self._ending.well()
            return
        if vmm is None:
            if state is State.ABANDONED:
                self._ending.without_the_rest()
            elif record.loaded_at is not None:
                self._ending.fail("its VMM has gone")
            return
        self._watch_vmm(vmm)
        try:
            recipient.restore_vmm(vmm, record.loaded_at)
        except OSError as error:
            if state is State.ABANDONED:
                self._ending.without_the_rest()
            elif record.loaded_at is None:
                self._vmm_lost(f"the VMM has gone: {error}")
            else:
                # With what the guest has done to its memory.
                self._ending.fail(f"the VMM has gone: {error}")
            return
        if state is State.ABANDONING:
            self._ending.poison()
        elif state is State.ABANDONED:
            self._ending.without_the_rest()
        elif state is State.FAILED:
            self._ending.fail(record.failure or "it had failed before postcopyd was restarted")
        elif record.loaded_at is None:
            self._switchover.load()
        self._note()
        self._ending.come_if_all_is_here()
