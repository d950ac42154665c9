"""What takes long is done by a thread, at memory files that must stay open meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Aside:
    """One piece of work at a time; it goes on to its end, whatever becomes of who waits for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Do nothing yet."""
        self._loop = loop
        self._work: asyncio.Future[None] | None = None

    def begin(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """Do `work`, which does not wait for what is under way."""
        self._work = self._loop.run_in_executor(None, work)
        return self._work

    async def do(self, work: Callable[[], None]) -> None:
        """Do `work` when what is under way has ended, and return when it is done."""
        while self._work is not None and not self._work.done():
            await asyncio.wait([self._work])
        await asyncio.shield(self.begin(work))

    def then(self, follow: Callable[[], None]) -> None:
        """Call `follow` when what is under way has ended; at once if nothing is.

        Closing a file under a thread would let it loose on whatever gets its number next.
        """
        work = self._work
        if work is None or work.done():
            follow()
            return

        def ended(work: asyncio.Future[None]) -> None:
            if not work.cancelled():
                work.exception()  # why does not matter any more
            follow()

        work.add_done_callback(ended)
