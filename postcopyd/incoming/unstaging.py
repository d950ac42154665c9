"""Placing what came before the switchover, beside the faults of the guest that runs."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Final

from postcopyd.incoming.holdings import Holdings
from postcopyd.incoming.placing import Placer, VmmGone
from postcopyd.incoming.report import Counters
from postcopyd.kernel.memory import HOST_PAGE_SIZE

_BATCH: Final = 64
"""Host pages of 4 KiB, or as many bytes, placed in one turn of the event loop."""

_RETRY: Final = 0.00025
"""Seconds to another try of what the kernel does not take now."""


class Unstaging:
    """Empties the staging into memory, a batch in each turn of the event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        holdings: Holdings,
        placer: Placer,
        counters: Counters,
        *,
        done: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """Find the first page that is staged; `go_on` begins.

        :param done: told when nothing is staged any more; never when nothing was.
        :param failed: told when it has stopped: `VmmGone`, OSError. `go_on` tries again.
        """
        self._loop = loop
        self._holdings = holdings
        self._placer = placer
        self._counters = counters
        self._done = done
        self._failed = failed
        self._turn: asyncio.Handle | None = None
        self._cursor = self._staged_from((0, 0))

    @property
    def under_way(self) -> bool:
        """True while pages wait in the staging."""
        return self._cursor is not None

    def go_on(self) -> None:
        """Place from the next turn of the event loop on. Harmless when that is so already."""
        if self._cursor is not None and self._turn is None:
            self._turn = self._loop.call_soon(self._place_batch)

    def stop(self) -> None:
        """Place nothing more, until `go_on`. Idempotent."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None

    def _staged_from(self, start: tuple[int, int]) -> tuple[int, int] | None:
        """Return the next staged page at or behind `start` (block, page); None at the end."""
        index, page = start
        while index < len(self._holdings.blocks):
            found = self._holdings.page_map[index].staged.find(1, page)
            if found >= 0:
                return index, found
            index, page = index + 1, 0
        return None

    def _place_batch(self) -> None:
        """Place a batch, then let faults have their turn."""
        self._turn = None
        assert self._cursor is not None
        self._cursor = self._staged_from(self._cursor)
        if self._cursor is None:
            self._done()
            return
        index, first = self._cursor
        block = self._holdings.blocks[index]
        staged = self._holdings.page_map[index].staged
        limit = max(1, _BATCH * HOST_PAGE_SIZE // block.page_size)
        beyond = staged.find(0, first, first + limit)
        count = (beyond if beyond >= 0 else min(first + limit, block.pages)) - first
        offset = first * block.page_size
        length = count * block.page_size
        stage = self._holdings.stages[index]
        try:
            placed = self._placer.try_run(block, offset, length, stage.address_of(offset, length))
            if placed:
                stage.release(first, count)
        except (VmmGone, OSError) as error:
            if not isinstance(error, OSError) or error.errno != errno.ENOMEM:
                self._failed(error)
                return
            placed = False
        if placed:
            self._turn = self._loop.call_soon(self._place_batch)
        else:
            self._counters.retries += 1
            self._turn = self._loop.call_later(_RETRY, self._place_batch)
