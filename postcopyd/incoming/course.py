"""The way of one migration through its states."""

from __future__ import annotations

from collections.abc import Callable

from postcopyd.incoming.states import State, check_step


class Course:
    """In which state a migration is, and why it is no better one."""

    def __init__(self, stepped: Callable[[State, State], None]) -> None:
        """Begin in NONE.

        :param stepped: told of each step, from where and to where, when it has been taken.
        """
        self._stepped = stepped
        self.state = State.NONE
        self.failure: str | None = None
        """Why it failed, or why it is paused."""

    def step(self, new: State) -> None:
        """Go to another state, to which there must be a way."""
        old = self.state
        check_step(old, new)
        self.state = new
        self._stepped(old, new)

    def begin_in(self, state: State, failure: str | None) -> None:
        """Begin where a predecessor was: that is no step, so nobody is told."""
        self.state = state
        self.failure = failure
