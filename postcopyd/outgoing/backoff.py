"""When to try again after a break. Sans-IO: time is an argument, chance a generator.

The guest waits, so the first try comes at once, and for a minute none is later than a second: a
destination that is started again is met quickly. The waits have full jitter (any length up to a
limit that doubles), so that the sources of a host that comes back do not all come at once.
"""

from __future__ import annotations

from random import Random
from typing import Final

FIRST_LIMIT: Final = 0.05
"""Seconds: the longest wait before the second try. It doubles with each try."""
EAGER_LIMIT: Final = 1.0
"""Seconds: no wait is longer in the first minute."""
EAGER_SECONDS: Final = 60.0
LIMIT: Final = 5.0
"""Seconds: no wait is longer later on."""


class Backoff:
    """The waits of one outage after the other."""

    def __init__(self, random: Random) -> None:
        """Take the jitter from `random`."""
        self._random = random
        self._began: float | None = None
        self._tries = 0

    def broke(self, now: float) -> None:
        """Begin an outage, unless there is one already.

        :param now: seconds on a clock that never goes back, as everywhere here.
        """
        if self._began is None:
            self._began = now
            self._tries = 0

    def over(self) -> None:
        """End the outage: the next break is tried to mend at once."""
        self._began = None

    def lasts(self, now: float) -> float:
        """Return for how many seconds the outage has lasted; 0.0 if there is none."""
        return 0.0 if self._began is None else now - self._began

    def wait(self, now: float) -> float:
        """Return how many seconds to wait before the next try, which counts as made."""
        tries = self._tries
        self._tries += 1
        if not tries:
            return 0.0
        limit = EAGER_LIMIT if self.lasts(now) < EAGER_SECONDS else LIMIT
        # 2 ** 7 leads beyond any limit; a power of all tries of a week would be a large number.
        return self._random.uniform(0.0, min(limit, FIRST_LIMIT * 2 ** min(tries - 1, 7)))
