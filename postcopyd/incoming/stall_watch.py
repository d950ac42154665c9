"""Alarm when nothing comes any more of memory that is missing, or not what a fault waits for.

After the package time ends nothing: the guest is here and nowhere else. But somebody should know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

_LOOKS: Final = 4
"""Looks at the progress in the time after which there is an alarm."""


class StallWatch:
    """Looks at how far something is, and alarms when that stays the same or somebody waits."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        alarm_after: float,
        *,
        progress: Callable[[], object],
        waited: Callable[[], float],
        stalled: Callable[[float], None],
        over: Callable[[float], None],
    ) -> None:
        """Look at nothing before `start`.

        :param alarm_after: seconds without progress.
        :param progress: returns how far it is; any change is progress.
        :param waited: returns for how many seconds somebody has waited, whatever the progress.
        :param stalled: told of a stall and how many seconds it lasts; again each time that it has
            lasted twice as long.
        :param over: told when a stall of which `stalled` was told is over, and how long it was.
        """
        self._loop = loop
        self._alarm_after = alarm_after
        self._progress = progress
        self._waited = waited
        self._stalled = stalled
        self._over = over
        self._timer: asyncio.TimerHandle | None = None
        self._last: object = None
        self._since = 0.0
        """When there was progress last."""
        self._stalled_since: float | None = None
        """None while there is no alarm."""
        self._next_alarm = alarm_after

    def start(self) -> None:
        """Look from now on. Harmless when it does already."""
        if self._timer is None:
            self._last, self._since = self._progress(), self._loop.time()
            self._later()

    def end(self) -> None:
        """Look no more, because nothing is waited for any more; an alarm is over. Idempotent."""
        self.stop()
        if self._stalled_since is not None:
            self._over(self._loop.time() - self._stalled_since)
            self._stalled_since = None
            self._next_alarm = self._alarm_after

    def stop(self) -> None:
        """Look no more, and tell nothing. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def seconds(self) -> float | None:
        """How long it has been stalled; None while there is no alarm."""
        if self._timer is None or self._stalled_since is None:
            return None
        return self._loop.time() - self._stalled_since

    def _later(self) -> None:
        self._timer = self._loop.call_later(self._alarm_after / _LOOKS, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        if (progress := self._progress()) != self._last:
            self._last, self._since = progress, now
        lasts = max(now - self._since, self._waited())
        if lasts >= self._next_alarm:
            if self._stalled_since is None:
                self._stalled_since = now - lasts
            self._next_alarm *= 2
            self._stalled(lasts)
        elif lasts < self._alarm_after and self._stalled_since is not None:
            self._over(now - self._stalled_since)
            self._stalled_since = None
            self._next_alarm = self._alarm_after
        self._later()
