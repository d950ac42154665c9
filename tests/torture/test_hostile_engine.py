"""Hostile sources: whole streams to real memory, with neighbours of a known content around it.

Whatever comes, each stream has one clear end, nothing beside the blocks is touched, nothing is left
behind, and other migrations of the same event loop go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.migration import IncomingMigration
from postcopyd.incoming.recipient import Refused
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from tests.fuzz.hostile_streams import HostileStreams
from tests.incoming.guest import LIMIT, Guest, Touch
from tests.support import belongings
from tests.torture.bystander import bystander
from tests.torture.guarded import (
    HUGE,
    PAGE,
    GuardedBlock,
    GuardedMemory,
    GuardedVmm,
    guarded_memory,
)
from tests.torture.sampling import Sampling, Tally

_ENDS = (events.Failed, events.Paused, events.Completed, events.StreamDropped)
_WARM_UP = 50
"""Inputs before memory is counted."""
_GROWTH = 24 << 20
"""Bytes that a process may grow by, whatever the number of inputs: the allocator's affair."""


class HostileSource:
    """Gives one migration after the other to the same memory, each with a hostile source."""

    def __init__(self, memory: GuardedMemory, numbers: random.Random) -> None:
        self._memory = memory
        self._numbers = numbers
        self._streams = HostileStreams(memory.entries)
        self._any_guest = Guest(pages=1)
        self._told: list[events.Event] = []
        self._stepped = asyncio.Event()

    async def one_migration(self) -> str:
        """Return how it has ended; raise if that is not one clear end."""
        self._told.clear()
        settings = Settings(close_timeout=0.005)
        migration = IncomingMigration("hostile", settings, self._trace)
        vmm = GuardedVmm(self._memory, self._any_guest)
        migration.attach_vmm(vmm)
        touches: list[Touch] = []
        said = [self._streams.stream(self._numbers)]
        while self._numbers.random() < 0.4:
            said.append(self._streams.resumed(self._numbers))
        outcome = "nothing"
        for parts in said:
            outcome = await self._one_stream(migration, parts, touches)
            if migration.state is not State.PAUSED:
                break
        if not migration.state.ended:
            migration.cancel("the test is over", force=True)
        async with asyncio.timeout(LIMIT):
            await migration.wait()
        assert vmm.closed
        self._memory.begin_anew()
        for touch in touches:
            touch.result()
        for block in self._memory.blocks:
            block.assert_neighbours_unchanged()
        return outcome

    async def _one_stream(
        self, migration: IncomingMigration, parts: list[bytes], touches: list[Touch]
    ) -> str:
        """Bring one stream, close it, and return how that has ended."""
        ended_before = len(self._ends())
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        channels = [theirs]
        try:
            migration.attach_stream(ours, "hostile")
        except Refused:
            ours.close()
            theirs.close()
            return "refused"
        preempt_at = self._numbers.randrange(3 * len(parts) + 1)
        touch_at = self._numbers.randrange(3 * len(parts) + 1)
        for place, part in enumerate(parts):
            if place == preempt_at:
                self._begin_preempt(migration, channels)
            if place == touch_at:
                touches.append(self._touch())
            await _send(theirs, part)
        for channel in channels:
            channel.close()
        async with asyncio.timeout(LIMIT):
            while len(self._ends()) == ended_before:
                self._stepped.clear()
                await self._stepped.wait()
            if migration.state.ended:
                await migration.wait()
        ends = self._ends()[ended_before:]
        assert len(ends) == 1, ends
        reason = getattr(ends[0], "reason", "it is complete")
        assert reason and len(reason) < 2000
        assert migration.state in (State.FAILED, State.PAUSED, State.END, State.NONE)
        outcome: str = migration.state.value
        return outcome

    def _begin_preempt(self, migration: IncomingMigration, channels: list[socket.socket]) -> None:
        ours, theirs = socket.socketpair()
        channels.append(theirs)
        try:
            migration.attach_stream(ours, "hostile again")
        except Refused:
            ours.close()
            return
        theirs.setblocking(False)
        with contextlib.suppress(OSError):
            theirs.send(b"".join(self._streams.preempt(self._numbers)))

    def _touch(self) -> Touch:
        block = self._numbers.choice(self._memory.blocks)
        page = self._numbers.randrange(block.length // PAGE)
        return Touch(block.address + page * PAGE, 8)

    def _trace(self, event: events.Event) -> None:
        self._told.append(event)
        self._stepped.set()

    def _ends(self) -> list[events.Event]:
        return [
            event
            for event in self._told
            if isinstance(event, _ENDS)
            or (isinstance(event, events.ConnectionRefused) and "has not begun" in event.reason)
        ]

    def close(self) -> None:
        self._any_guest.close()


async def _send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(LIMIT):
            await asyncio.get_running_loop().sock_sendall(connection, data)


def resident() -> int:
    """Bytes of this process in memory, without what is shared: guests and the like."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * PAGE


@contextlib.contextmanager
def no_mistake_of_ours() -> Iterator[None]:
    """Check that nothing was raised that nobody was there for."""
    mistakes: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: mistakes.append(context))
    try:
        yield
        gc.collect()
    finally:
        loop.set_exception_handler(None)
    assert not mistakes, mistakes[:3]


async def bring(source: HostileSource, count: int, outcomes: Counter[str]) -> None:
    for _ in range(count):
        outcomes[await source.one_migration()] += 1


@pytest.mark.timeout(1800)
async def test_each_stream_has_one_clear_end_and_touches_its_blocks_alone(
    sampling: Sampling, tally: Callable[[str], Tally]
) -> None:
    outcomes = tally("hostile sources").outcomes
    numbers = sampling.numbers("hostile sources")
    blocks = GuardedBlock("pc.ram", 8), GuardedBlock("shared", 6, shared=True)
    with guarded_memory(*blocks) as memory, no_mistake_of_ours():
        source = HostileSource(memory, numbers)
        await bring(source, _WARM_UP, Counter())
        before, memory_before = belongings(), resident()
        async with bystander() as others:
            await bring(source, sampling.count(400, 30_000), outcomes)
        outcomes["right ones meanwhile"] += others.completed
        assert resident() - memory_before < _GROWTH
        left = belongings() - before
        del left["thread"]  # those that the event loop keeps for later
        assert not left
        source.close()
    assert {"failed", "paused", "end"} <= set(outcomes)


@pytest.mark.timeout(900)
async def test_half_a_huge_page_from_a_hostile_source_is_no_page(
    sampling: Sampling, tally: Callable[[str], Tally], huge_pages: Callable[[int], None]
) -> None:
    huge_pages(10)
    outcomes = tally("hostile sources of huge pages").outcomes
    blocks = (
        GuardedBlock("pc.ram", 2, HUGE),
        GuardedBlock("shared", 2, HUGE, shared=True),
        GuardedBlock("small", 4),
    )
    with guarded_memory(*blocks) as memory, no_mistake_of_ours():
        source = HostileSource(memory, sampling.numbers("hostile sources of huge pages"))
        await bring(source, sampling.count(60, 3000), outcomes)
        source.close()
