"""The state machine: one table, and what it refuses."""

from __future__ import annotations

import itertools

import pytest

from postcopyd.incoming.states import (
    LEGAL_MESSAGES,
    LEGAL_STEPS,
    IllegalStep,
    State,
    check_message,
    check_step,
)
from postcopyd.wire import messages
from postcopyd.wire.errors import ProtocolError


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)))
def test_a_step_is_taken_exactly_when_the_table_has_it(old: State, new: State) -> None:
    if new in LEGAL_STEPS[old]:
        check_step(old, new)
    else:
        with pytest.raises(IllegalStep, match=f"from {old.value} to {new.value}"):
            check_step(old, new)


def test_every_state_can_be_reached_and_only_ends_lead_nowhere() -> None:
    reached = {State.NONE}
    while True:
        more = reached | {new for old in reached for new in LEGAL_STEPS[old]}
        if more == reached:
            break
        reached = more
    assert reached == set(State)
    assert {state for state in State if not LEGAL_STEPS[state]} == {
        State.END,
        State.ABANDONED,
        State.FAILED,
    }


def test_there_is_no_failure_without_the_guest_being_somewhere() -> None:
    """Every state that is not an end can fail; an abort is clean only before the package."""
    for state in State:
        assert state.ended or State.FAILED in LEGAL_STEPS[state]
    assert {state for state in State if state.before_package} == {
        State.NONE,
        State.ADVISE,
        State.DISCARD,
        State.CONVERGED,
    }


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize(
    "message",
    [
        messages.OpenReturnPath(),
        messages.Ping(1),
        messages.Advise(4096, 4096),
        messages.Discard("pc.ram", ((0, 4096),)),
        messages.Package(b""),
        messages.PostcopyResume(),
        messages.EndOfStream(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_out_of_order_is_refused_with_the_state_and_the_legal_ones(
    state: State, message: messages.Message
) -> None:
    legal = LEGAL_MESSAGES.get(type(message), frozenset())
    if state in legal:
        check_message(state, message, 17)
        return
    with pytest.raises(ProtocolError) as refusal:
        check_message(state, message, 17)
    text = str(refusal.value)
    assert type(message).__name__ in text
    assert f"state {state.value}" in text
    assert "17" in text
    for other in legal:
        assert other.value in text
