"""Alarm when nothing comes any more of memory that is missing.

After the package time ends nothing: the guest is here and nowhere else. But somebody should know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

_LOOKS: Final = 4
"""Looks at the progress in the time after which there is an alarm."""


class StallWatch:
    """Looks at how far something is, and alarms when that stays the same."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        alarm_after: float,
        *,
        progress: Callable[[], int],
        stalled: Callable[[float], None],
        over: Callable[[float], None],
    ) -> None:
        """Look at nothing before `start`.

        :param alarm_after: seconds without progress.
        :param progress: returns how far it is; any change is progress.
        :param stalled: told of a stall and how many seconds it lasts; again each time that it has
            lasted twice as long.
        :param over: told when a stall of which `stalled` was told is over, and how long it was.
        """
        self._loop = loop
        self._alarm_after = alarm_after
        self._progress = progress
        self._stalled = stalled
        self._over = over
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0
        self._since = 0.0
        self._next_alarm = alarm_after

    def start(self) -> None:
        """Look from now on. Harmless when it does already."""
        if self._timer is None:
            self._begin()
            self._later()

    def stop(self) -> None:
        """Look no more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def seconds(self) -> float | None:
        """How long nothing has come; None while there is no alarm."""
        if self._timer is None or self._next_alarm == self._alarm_after:
            return None
        return self._loop.time() - self._since

    def _begin(self) -> None:
        self._last = self._progress()
        self._since = self._loop.time()
        self._next_alarm = self._alarm_after

    def _later(self) -> None:
        self._timer = self._loop.call_later(self._alarm_after / _LOOKS, self._look)

    def _look(self) -> None:
        lasts = self._loop.time() - self._since
        if self._progress() != self._last:
            alarmed = self._next_alarm != self._alarm_after
            self._begin()
            if alarmed:
                self._over(lasts)
        elif lasts >= self._next_alarm:
            self._next_alarm *= 2
            self._stalled(lasts)
        self._later()
