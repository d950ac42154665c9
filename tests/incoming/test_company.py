"""Migrations that share an event loop: none of them makes the others' faults wait for long."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable

from postcopyd.incoming.company import Company
from postcopyd.incoming.report import Counters
from postcopyd.incoming.states import State
from postcopyd.wire.return_path import PageRequest
from tests.incoming.engine import Engine, Source
from tests.incoming.guest import PAGE

MakeEngine = Callable[..., Engine]

BUSY_PAGES = 16384
_SO_SNDBUFFORCE = 32
SHORT = 32 * (PAGE + 64)
"""Bytes of a short turn, at most: 32 pages with what is around them."""


async def test_a_migration_alone_has_no_company() -> None:
    own = Counters()
    company = Company(asyncio.get_running_loop(), own)
    own.faults += 5
    assert not company.others_fault()
    company.leave()


async def test_faults_of_others_are_minded_for_a_while() -> None:
    loop = asyncio.get_running_loop()
    counters = [Counters() for _ in range(3)]
    companies = [Company(loop, own) for own in counters]
    counters[1].faults += 1
    assert companies[0].others_fault() and companies[2].others_fault()
    assert not companies[1].others_fault()
    turns = 1
    while companies[0].others_fault():
        turns += 1
    assert turns == 256
    counters[2].faults += 1
    assert companies[0].others_fault()
    for company in companies:
        company.leave()


async def test_who_leaves_is_not_minded_any_more_even_if_another_has_counted_the_same() -> None:
    loop = asyncio.get_running_loop()
    counters = [Counters(), Counters()]
    companies = [Company(loop, own) for own in counters]
    companies[1].leave()
    companies[1].leave()
    counters[1].faults += 1
    assert not companies[0].others_fault()
    third = Company(loop, Counters())
    counters[0].faults += 1
    assert third.others_fault()
    companies[0].leave()
    third.leave()


async def test_a_busy_stream_takes_short_turns_while_another_guest_faults(
    make_engine: MakeEngine,
) -> None:
    busy, faulting = make_engine(pages=BUSY_PAGES), make_engine(pages=BUSY_PAGES)
    for engine in (busy, faulting):
        engine.attach()
        await engine.source.advise()
        await engine.source.switch_over({"pc.ram": [(0, engine.guest.length)]})
        await engine.reach(State.RUNNING)
    flood = Flood(busy.source)
    longest = 0
    # Far from each other, so that each is asked for alone.
    for page in range(0, BUSY_PAGES, 1024):
        touch = faulting.guest.touch(page)
        request = await faulting.source.wait_for_request()
        assert request == PageRequest("pc.ram", page * PAGE, PAGE)
        before = busy.migration.report().bytes_received
        for _ in range(8):
            await asyncio.sleep(0)
            received = busy.migration.report().bytes_received
            longest = max(longest, received - before)
            before = received
        await faulting.source.postcopy("pc.ram", bytes(BUSY_PAGES * PAGE), [page * PAGE])
        await asyncio.to_thread(touch.result)
    assert 0 < longest <= 2 * SHORT
    await asyncio.to_thread(flood.join)


class Flood(threading.Thread):
    """Sends all memory of a busy guest as fast as it is taken."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        content = bytes([1]) * PAGE
        parts = [source.writer.ram_part()]
        for page in range(BUSY_PAGES):
            parts += [source.writer.page("pc.ram", page * PAGE), content]
        self._data = b"".join([*parts, source.writer.ram_footer()])
        self._connection = source.connection.dup()
        self._connection.setblocking(True)
        self._connection.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 8 << 20)
        self.start()

    def run(self) -> None:
        with self._connection:
            self._connection.sendall(self._data)
