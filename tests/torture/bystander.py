"""Migrations that go on in the same event loop while another one has a hostile source or VMM."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from time import perf_counter

from postcopyd.incoming.states import State
from tests.incoming.engine import Engine, image
from tests.incoming.guest import PAGE, Guest

_PAGES = 64


class Bystander:
    """One right migration after the other; every page of each is waited for by a thread."""

    def __init__(self) -> None:
        self.completed = 0
        self.latencies: list[float] = []
        """Seconds from a thread's access until it had its page, in order."""
        self._stopping = False

    async def run(self) -> None:
        """Migrate until `stop`, and end the one that is under way."""
        while not self._stopping or not self.completed:
            engine = Engine(Guest(pages=_PAGES, register=False))
            try:
                await self._migrate(engine)
            finally:
                await engine.close()

    def stop(self) -> None:
        self._stopping = True

    async def _migrate(self, engine: Engine) -> None:
        content = image(_PAGES, seed=self.completed)
        source, length = engine.source, _PAGES * PAGE
        engine.attach()
        await source.advise()
        await source.switch_over({"pc.ram": [(0, length)]})
        await engine.reach(State.RUNNING)
        missing = set(range(0, length, PAGE))
        for page in range(_PAGES):
            began = perf_counter()
            touch = asyncio.ensure_future(asyncio.to_thread(engine.guest.touch(page).result))
            while not touch.done():
                await self._answer(engine, content, missing, touch)
            assert await touch == content[page * PAGE : (page + 1) * PAGE]
            self.latencies.append(perf_counter() - began)
        await source.postcopy("pc.ram", content, sorted(missing))
        await source.end()
        assert (await source.wait_for_shut()).status == 0
        source.close()
        await engine.finish()
        assert engine.migration.state is State.END
        self.completed += 1

    @staticmethod
    async def _answer(
        engine: Engine, content: bytes, missing: set[int], touch: asyncio.Future[bytes]
    ) -> None:
        """Send the next page that is asked for, unless the access has ended without."""
        asked = asyncio.ensure_future(engine.source.wait_for_request())
        await asyncio.wait((asked, touch), return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            asked.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asked
            return
        request = asked.result()
        wanted = range(request.offset, request.offset + request.length, PAGE)
        await engine.source.postcopy("pc.ram", content, wanted)
        missing.difference_update(wanted)


@contextlib.asynccontextmanager
async def bystander() -> AsyncIterator[Bystander]:
    """Have migrations go on meanwhile; at the end each must have completed with the right pages."""
    one = Bystander()
    running = asyncio.ensure_future(one.run())
    try:
        yield one
    finally:
        one.stop()
        await running
