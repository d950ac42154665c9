"""What a predecessor has left of a migration, read and made sense of before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import msgspec

from postcopyd.incoming import inheriting
from postcopyd.incoming.estate import Estate
from postcopyd.incoming.inheriting import InheritedVmm, RestoreVmm
from postcopyd.incoming.journal import Journal, JournalUnreadable, MigrationRecord
from postcopyd.incoming.states import State
from postcopyd.incoming.vmm import Vmm, VmmFailure

_STAYS_IN = (State.END, State.CONVERGED, State.ABANDONING, State.ABANDONED)


class Legacy(msgspec.Struct, frozen=True):
    """What a predecessor knew of its migration, and the VMM that it had."""

    record: MigrationRecord
    state: State
    """In which it was."""
    inherited: InheritedVmm
    vmm: Vmm | None
    """None if it has gone, or if another one was waited for."""

    @property
    def begins_anew(self) -> bool:
        """True when the source still is the VM."""
        return _begins_anew(self.record)

    @property
    def goes_on_in(self) -> State:
        """In which state a successor begins that does not begin anew.

        One that has failed begins in PAUSED and takes that step again.
        """
        if self.state in _STAYS_IN:
            return self.state
        if self.state is State.FAILED or not self.record.all_came:
            return State.PAUSED
        if self.record.loaded_at is not None:
            return State.RUNNING
        return State.LISTENING if self.vmm is not None else State.PAUSED

    @property
    def failure(self) -> str | None:
        """Why it had failed or was paused, or is paused now; None when it just goes on."""
        if self.goes_on_in in (State.RUNNING, State.LISTENING):
            return None
        if self.record.failure:
            return self.record.failure
        if self.record.all_came and self.state is not State.FAILED:
            return "its VMM is of no use after the restart of postcopyd"
        return "postcopyd was restarted: the source has to come back"


@contextmanager
def legacy_of(
    journal: Journal,
    estate: Estate,
    restore_vmm: RestoreVmm,
    vmm_lost: Callable[[str], None],
) -> Iterator[Legacy | None]:
    """Give what a predecessor has left; None if that is no VMM yet that was told that it is taken.

    The VMM is the block's to take over; it is closed again if the block raises.

    :param vmm_lost: told why its VMM is of no use, if so.
    :raise JournalUnreadable: if what it has left does not fit together. Nothing was changed then.
    """
    record = journal.read()
    left = list(estate.inherited)
    if record is None or record.vmm is None:
        _leave_nothing(estate, left)
        yield None
        return
    try:
        state = State(record.state)
    except ValueError:
        raise JournalUnreadable(f"it speaks of a state {record.state!r}") from None
    vmm: Vmm | None = None
    with ExitStack() as on_error:
        try:
            inherited = inheriting.inherit(record.vmm, estate)
            on_error.callback(inherited.resources.close)
            if not record.waits_for_vmm:
                try:
                    vmm = restore_vmm(inherited)
                except VmmFailure as error:
                    vmm_lost(str(error))
                else:
                    on_error.callback(vmm.close)
        except JournalUnreadable:
            if not _begins_anew(record):
                raise
            _leave_nothing(estate, left)
            yield None
        else:
            yield Legacy(record, state, inherited, vmm)
        if vmm is not None:
            on_error.pop_all()


def _begins_anew(record: MigrationRecord) -> bool:
    return record.source is None and record.loaded_at is None


def _leave_nothing(estate: Estate, left: list[str]) -> None:
    """Forget a VMM that was not told yet that it is taken: it has to hand over again."""
    for name in left:
        estate.release(name)
