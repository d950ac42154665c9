"""The state machine of an incoming migration: everything about states lives here.

```
NONE -> ADVISE -> DISCARD -> LISTENING -> RUNNING -> END
         |  |                 ^  |  ^        |
         |  +-----------------+  |  |        v
         |                       +--+---> PAUSED <-> RECOVER -> LISTENING, RUNNING
         +-> CONVERGED -> END                 |
                                               v
                                          ABANDONING -> ABANDONED
```

LISTENING begins with the device package and ends when the VMM has loaded it: faults are served, the
guest has not run. If its VMM does not load, the migration is PAUSED until another VMM takes its
place. CONVERGED is a pre-copy that ends without a switchover: its device state comes without a
package, and until the VMM has loaded it the source still is the VM.

ABANDONING is what an operator asks for when the source is gone for good: everything that has not
come becomes a memory error, and then the migration has ended, ABANDONED: the guest keeps the rest.

FAILED can be reached from every state that is not an end: before the package it means that the
source goes on, after it that the guest is lost (its VMM is gone, or an operator gave it up). Any
other error after the package leads to PAUSED, because a source that has sent its package cannot
take the guest back (qemu-wire, 5.2).
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from postcopyd.wire import messages
from postcopyd.wire.errors import ProtocolError


class State(Enum):
    """Where a migration is."""

    NONE = "none"
    ADVISE = "advise"
    DISCARD = "discard"
    LISTENING = "listening"
    RUNNING = "running"
    CONVERGED = "converged"
    PAUSED = "paused"
    RECOVER = "recover"
    ABANDONING = "abandoning"
    END = "end"
    ABANDONED = "abandoned"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """True when nothing can follow."""
        return self in (State.END, State.ABANDONED, State.FAILED)

    @property
    def before_package(self) -> bool:
        """True while the source is still the VM, so that an error can abort cleanly."""
        return self in (State.NONE, State.ADVISE, State.DISCARD, State.CONVERGED)

    @property
    def in_switchover(self) -> bool:
        """True in the steps of a switchover, from its first word until the guest runs."""
        return self in (State.DISCARD, State.LISTENING, State.CONVERGED)


LEGAL_STEPS: dict[State, frozenset[State]] = {
    State.NONE: frozenset({State.ADVISE, State.FAILED}),
    State.ADVISE: frozenset({State.DISCARD, State.LISTENING, State.CONVERGED, State.FAILED}),
    State.DISCARD: frozenset({State.LISTENING, State.FAILED}),
    State.LISTENING: frozenset({State.RUNNING, State.PAUSED, State.FAILED}),
    State.RUNNING: frozenset({State.PAUSED, State.END, State.FAILED}),
    State.CONVERGED: frozenset({State.END, State.FAILED}),
    State.PAUSED: frozenset({State.LISTENING, State.RECOVER, State.ABANDONING, State.FAILED}),
    State.RECOVER: frozenset({State.LISTENING, State.RUNNING, State.PAUSED, State.FAILED}),
    State.ABANDONING: frozenset({State.ABANDONED, State.PAUSED, State.FAILED}),
    State.END: frozenset(),
    State.ABANDONED: frozenset(),
    State.FAILED: frozenset(),
}
"""Every legal step."""

LEGAL_MESSAGES: dict[type[messages.Message], frozenset[State]] = {
    messages.Configuration: frozenset({State.NONE}),
    messages.OpenReturnPath: frozenset({State.NONE, State.ADVISE}),
    messages.Ping: frozenset(
        {State.NONE, State.ADVISE, State.DISCARD, State.LISTENING, State.RUNNING, State.RECOVER}
    ),
    messages.Advise: frozenset({State.NONE}),
    messages.BlockList: frozenset({State.ADVISE}),
    messages.Pages: frozenset({State.ADVISE, State.LISTENING, State.RUNNING}),
    messages.ZeroPages: frozenset({State.ADVISE, State.LISTENING, State.RUNNING}),
    messages.RamSectionEnd: frozenset({State.ADVISE, State.LISTENING, State.RUNNING}),
    messages.SwitchoverStart: frozenset({State.ADVISE}),
    messages.Discard: frozenset({State.ADVISE, State.DISCARD}),
    messages.Package: frozenset({State.ADVISE, State.DISCARD}),
    messages.DeviceState: frozenset({State.ADVISE}),
    messages.Opaque: frozenset({State.CONVERGED}),
    messages.EndOfStream: frozenset({State.LISTENING, State.RUNNING}),
    messages.ReceivedBitmapRequest: frozenset({State.RECOVER}),
    messages.PostcopyResume: frozenset({State.RECOVER}),
}
"""In which states a message may come; one that is not listed is refused in all of them."""


_HINTS: dict[tuple[State, type[messages.Message]], str] = {
    (State.NONE, messages.BlockList): (
        "the source did not advise post-copy: switch its capability postcopy-ram on"
    ),
}
"""What to do about the mistakes that an honest operator makes."""


class IllegalStep(Exception):
    """A step that the table does not have: a mistake of ours, never of a peer."""


AFTER_SWITCHOVER: Final = (State.LISTENING, State.RUNNING)
"""While pages are placed where a guest may read them."""

WAITS_FOR_MEMORY: Final = (*AFTER_SWITCHOVER, State.PAUSED, State.RECOVER)
"""While a guest may wait for its memory."""


def check_step(old: State, new: State) -> None:
    """Refuse a step that is not in the table.

    :raise IllegalStep: naming both states.
    """
    if new not in LEGAL_STEPS[old]:
        raise IllegalStep(f"no step leads from {old.value} to {new.value}")


def check_message(state: State, message: messages.Message, position: int) -> None:
    """Refuse a message that may not come in `state`.

    :raise ProtocolError: naming the message, the state and the states in which it may come.
    """
    legal = LEGAL_MESSAGES.get(type(message), frozenset())
    if state not in legal:
        hint = _HINTS.get((state, type(message)))
        if hint is not None:
            raise ProtocolError(hint, position)
        name = type(message).__name__
        where = ", ".join(sorted(entry.value for entry in legal)) or "no state"
        raise ProtocolError(
            f"{name} came in state {state.value}; it is legal in: {where}", position
        )
