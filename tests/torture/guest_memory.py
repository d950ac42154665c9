"""A migration into the memory of another process, which does what the test says."""

from __future__ import annotations

import asyncio
from typing import cast

from postcopyd.incoming.settings import Settings
from postcopyd.incoming.vmm import GuestMemory, HandedBlock
from postcopyd.kernel.userfaultfd import Feature
from tests.incoming.engine import Engine
from tests.incoming.guest import PAGE, Guest
from tests.kernel.guest_process import GuestProcess

FEATURES = Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.THREAD_ID
DONTNEED = 4

_MADVISE = (
    "libc.madvise(ctypes.c_void_p(mapping.address + {offset}), ctypes.c_size_t({length}), {advice})"
)


class GuestElsewhere:
    """Memory of `pages` pages in a process of its own, which evaluates what it is asked."""

    def __init__(self, pages: int, features: Feature = FEATURES) -> None:
        self.name = "pc.ram"
        self.pages = pages
        self.page_size = PAGE
        self.length = pages * PAGE
        self.process = GuestProcess(self.length, features)

    @property
    def memory(self) -> GuestMemory:
        block = HandedBlock(self.name, self.process.address, self.length, PAGE, None, 0)
        return GuestMemory((block,), self.process.userfaultfd, registered=True)

    async def ask(self, expression: str) -> str:
        """Return what an expression is there; it may touch memory that has yet to come."""
        self.process.ask(expression)
        return await asyncio.to_thread(self.process.answer)

    async def advise(self, first: int, pages: int, advice: int = DONTNEED) -> int:
        """Have it call madvise(2)."""
        offset, length = first * PAGE, pages * PAGE
        return int(await self.ask(_MADVISE.format(offset=offset, length=length, advice=advice)))

    async def content(self, first: int = 0, pages: int | None = None) -> bytes:
        """Return what it reads there."""
        length = (self.pages - first if pages is None else pages) * PAGE
        text = await self.ask(f"ctypes.string_at(mapping.address + {first * PAGE}, {length}).hex()")
        return bytes.fromhex(text)

    def close(self) -> None:
        self.process.close()


def engine_for(guest: GuestElsewhere, settings: Settings | None = None) -> Engine:
    """Return an engine that fills it."""
    return Engine(cast(Guest, guest), settings)
