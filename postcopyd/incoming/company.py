"""Migrations that share an event loop, and how the busy ones make room for those that wait.

A stream at full rate takes the loop for 2 ms at a time, which is good for throughput; in between
it looks at the faults of its own guest. Those of another guest would wait for the whole turn. So
while others fault, turns are short.
"""

from __future__ import annotations

import asyncio
from typing import Final
from weakref import WeakKeyDictionary

from postcopyd.incoming.report import Counters

_FOR: Final = 256
"""Turns for which others are taken to be faulting after a fault of theirs."""

_companies: WeakKeyDictionary[asyncio.AbstractEventLoop, list[Counters]] = WeakKeyDictionary()


class Company:
    """What one migration knows of the others in its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, own: Counters) -> None:
        """Join the others.

        :param own: what this migration counts; the others look at it.
        """
        self._own = own
        self._all = _companies.setdefault(loop, [])
        self._all.append(own)
        self._seen = self._faults_of_others()
        self._left = 0

    def others_fault(self) -> bool:
        """Tell whether another guest has faulted lately; to be asked once a turn."""
        if len(self._all) == 1:
            return False
        faults = self._faults_of_others()
        if faults != self._seen:
            self._seen = faults
            self._left = _FOR
        elif self._left:
            self._left -= 1
        return self._left > 0

    def _faults_of_others(self) -> int:
        return sum(counters.faults for counters in self._all) - self._own.faults

    def leave(self) -> None:
        """Be gone. Idempotent."""
        # By identity: two that have counted the same are equal.
        self._all[:] = [counters for counters in self._all if counters is not self._own]
