"""A source that says nothing while it should."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class IdleWatch:
    """Tells when a stream has brought nothing for too long."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        received: Callable[[], int | None],
        may_be_silent: Callable[[], bool],
        idle: Callable[[float], None],
    ) -> None:
        """Watch nothing before `begin`.

        :param received: bytes that the stream has brought; None when its silence does not matter
            any more, which ends the watch.
        :param may_be_silent: asked when it has brought nothing.
        :param idle: told for how many seconds it has brought nothing; ends the watch.
        """
        self._loop = loop
        self._received = received
        self._may_be_silent = may_be_silent
        self._idle = idle
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, first: float, further: float) -> None:
        """Watch a stream that has brought nothing yet.

        :param first: seconds until it has to have brought something.
        :param further: seconds in which it has to bring something from then on.
        """
        self._timer = self._loop.call_later(first, self._look, first, further, 0)

    def end(self) -> None:
        """Watch no more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, seconds: float, further: float, before: int) -> None:
        received = self._received()
        if received is None:
            return
        if received == before and not self._may_be_silent():
            self._idle(seconds)
            return
        self._timer = self._loop.call_later(further, self._look, further, further, received)
