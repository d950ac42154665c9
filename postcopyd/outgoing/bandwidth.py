"""A limit on bytes per second. Time is an argument, so it needs no clock."""

from __future__ import annotations

from typing import Final

_BURST_SECONDS: Final = 0.02
"""What may be made up for after a sleep that was longer than asked for."""


class Bandwidth:
    """A token bucket that may go into debt: what must not wait is spent, and background pays."""

    def __init__(self, rate: int | None) -> None:
        """Allow `rate` bytes a second; None for as many as the connection takes.

        :raise ValueError: if it is not at least 1.
        """
        if rate is not None and rate < 1:
            raise ValueError(f"a bandwidth of {rate} bytes a second sends nothing")
        self.rate = rate
        self._level = 0.0
        self._at: float | None = None

    def spend(self, count: int) -> None:
        """Account for `count` bytes that are sent, whatever `wait` says."""
        if self.rate is not None:
            self._level -= count

    def wait(self, now: float) -> float:
        """Return for how many seconds nothing may be sent that can wait; 0.0: go on.

        :param now: seconds on a clock that never goes back.
        """
        if self.rate is None:
            return 0.0
        if self._at is not None:
            earned = (now - self._at) * self.rate
            self._level = min(self._level + earned, self.rate * _BURST_SECONDS)
        self._at = now
        return max(0.0, -self._level / self.rate)
