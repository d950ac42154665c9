"""A source that is gone for good: what never came is a memory error, and the guest keeps the rest.

The guest here is this very process, so missing memory is touched through write(2), which fails with
EFAULT where a plain access would be a SIGBUS.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.recipient import Refused
from postcopyd.incoming.report import MOST_RANGES, MissingRange
from postcopyd.incoming.states import State
from postcopyd.kernel.userfaultfd import Feature, Userfaultfd
from postcopyd.wire import stream_writer
from tests.incoming.engine import Engine
from tests.incoming.guest import HUGE, LIMIT, PAGE, Guest
from tests.incoming.heirs import Holder, succeed
from tests.incoming.test_recovery import CONTENT, PAGES, broken, come_back, seen
from tests.support import GuestThread, libc

MakeEngine = Callable[..., Engine]
KINDS = pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])


class Access:
    """Reads the first bytes of a page in a thread, by a system call that can fail."""

    def __init__(self, guest: Guest, page: int) -> None:
        self._reading, self._writing = os.pipe()
        address = guest.address + page * guest.page_size
        self._thread = GuestThread(libc.write, self._writing, address, 8)

    @property
    def waits(self) -> bool:
        return self._thread.waits

    def result(self) -> bytes | None:
        """What is there; None for a memory error."""
        try:
            written = ctypes.c_int(self._thread.result()).value
            return os.read(self._reading, 8) if written == 8 else None
        finally:
            os.close(self._reading)
            os.close(self._writing)


async def read(guest: Guest, page: int) -> bytes | None:
    return await asyncio.to_thread(Access(guest, page).result)


async def assert_kept(guest: Guest, here: range) -> None:
    """What is here is as it was sent, and everything else is an error."""
    for page in range(guest.pages):
        expected = CONTENT[page * PAGE : page * PAGE + 8] if page in here else None
        assert await read(guest, page) == expected


@pytest.fixture
def holder() -> Iterator[Holder]:
    holder = Holder()
    yield holder
    assert holder.held == {}, "an ended migration leaves nothing"


@KINDS
async def test_what_never_came_is_an_error_and_what_came_is_kept(
    make_engine: MakeEngine, shared: bool
) -> None:
    engine = make_engine(pages=PAGES, shared=shared)
    await broken(engine, here=range(4))
    waiting = Access(engine.guest, 9)
    engine.guest.wait_for_event()  # nobody else reads it in this turn of the event loop
    engine.migration.abandon(force=False)
    assert await asyncio.to_thread(waiting.result) is None
    await engine.finish()
    await assert_kept(engine.guest, range(4))
    report = engine.migration.report()
    assert report.state == "abandoned"
    assert report.missing == [MissingRange("pc.ram", 4 * PAGE, (PAGES - 4) * PAGE)]
    assert not report.guest_lost and report.outstanding == 0
    assert engine.vmm.told[-1] == f"complete without {(PAGES - 4) * PAGE} bytes"
    assert await engine.told(events.Abandoned) == events.Abandoned(PAGES - 4, (PAGES - 4) * PAGE)


async def test_the_missing_ranges_are_listed_in_order(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=PAGES)
    await broken(engine, here=range(2, 5))
    engine.migration.abandon(force=False)
    await engine.finish()
    assert engine.migration.report().missing == [
        MissingRange("pc.ram", 0, 2 * PAGE),
        MissingRange("pc.ram", 5 * PAGE, (PAGES - 5) * PAGE),
    ]


async def test_huge_pages_are_errors_too(
    make_engine: MakeEngine, huge_pages: Callable[[int], None]
) -> None:
    huge_pages(3)
    engine = make_engine(pages=3, page_size=HUGE)
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, 3 * HUGE)]})
    await engine.reach(State.RUNNING)
    content = bytes(range(1, 9)) * (HUGE // 8)
    # The second one whole, and a part of the third, which is no page yet.
    await engine.source.postcopy(
        "pc.ram", bytes(HUGE) + content + content, range(HUGE, 2 * HUGE + 16 * PAGE, PAGE)
    )
    second = await asyncio.to_thread(Access(engine.guest, 1).result)
    assert second == bytes(range(1, 9))
    engine.source.connection.close()
    await engine.reach(State.PAUSED)
    engine.migration.abandon(force=False)
    await engine.finish()
    assert [await read(engine.guest, page) for page in range(3)] == [None, second, None]


async def test_memory_that_the_guest_gives_back_meanwhile_reads_as_zeros(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    await broken(engine, here=range(4))
    removing = engine.guest.remove(8, 2)
    await asyncio.to_thread(removing.join)
    engine.migration.abandon(force=False)
    await engine.finish()
    assert await read(engine.guest, 8) == bytes(8)
    assert await read(engine.guest, 10) is None
    assert engine.migration.report().missing == [
        MissingRange("pc.ram", 4 * PAGE, 4 * PAGE),
        MissingRange("pc.ram", 10 * PAGE, (PAGES - 10) * PAGE),
    ]
    removing = engine.guest.remove(12)  # nobody has to read its event any more
    await asyncio.to_thread(removing.join)
    assert await read(engine.guest, 12) == bytes(8)


async def test_no_source_is_taken_any_more(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=PAGES)
    await broken(engine)
    engine.migration.abandon(force=False)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(Refused, match="is abandoning: it takes no stream"):
        engine.migration.attach_stream(ours, "a source that is late")
    engine.migration.abandon(force=False)  # asked twice, done once
    await engine.finish()
    assert engine.vmm.told.count(f"complete without {(PAGES - 4) * PAGE} bytes") == 1


async def test_a_source_that_is_there_has_to_be_given_up_by_force(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.RUNNING)
    with pytest.raises(Refused, match="is running, with its source at the test"):
        engine.migration.abandon(force=False)
    assert engine.migration.state is State.RUNNING
    engine.migration.abandon(force=True)
    await engine.finish()
    await assert_kept(engine.guest, range(0))


async def test_before_there_is_a_guest_nothing_can_be_abandoned(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=PAGES)
    engine.vmm.may_load.clear()
    engine.attach()
    await engine.source.advise()
    await engine.reach(State.ADVISE)
    with pytest.raises(Refused, match="still is the VM: cancel it"):
        engine.migration.abandon(force=True)
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.LISTENING)
    engine.source.connection.close()
    await engine.reach(State.PAUSED)
    with pytest.raises(Refused, match="has not loaded its devices"):
        engine.migration.abandon(force=True)
    assert engine.migration.state is State.PAUSED


async def test_a_kernel_that_cannot_poison_is_told_of(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(pages=PAGES)
    await broken(engine)
    monkeypatch.setattr(Userfaultfd, "offered", staticmethod(lambda: Feature.THREAD_ID))
    with pytest.raises(Refused, match="has no UFFDIO_POISON: Linux 6"):
        engine.migration.abandon(force=False)
    assert engine.migration.state is State.PAUSED


@KINDS
@pytest.mark.parametrize("poisoned", [False, True], ids=["before", "half way"])
async def test_an_heir_goes_on_abandoning(
    holder: Holder, make_engine: MakeEngine, shared: bool, poisoned: bool
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES, shared=shared)
    await broken(engine, here=range(4))
    if poisoned:
        assert engine.guest.userfaultfd.poison(engine.guest.address + 6 * PAGE, 3 * PAGE) > 0
    engine.migration.abandon(force=False)
    succeed(engine, holder)
    assert engine.migration.state is State.ABANDONING
    await engine.finish()
    await assert_kept(engine.guest, range(4))
    assert engine.migration.report().missing == [
        MissingRange("pc.ram", 4 * PAGE, (PAGES - 4) * PAGE)
    ]


async def test_an_heir_of_one_that_has_abandoned_ends_it(
    holder: Holder, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    await broken(engine, here=range(4))
    told = asyncio.Event()

    async def complete_never(missing: int) -> None:
        told.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(engine.vmm, "complete", complete_never)
    engine.migration.abandon(force=False)
    await asyncio.wait_for(told.wait(), 20)
    succeed(engine, holder)
    await engine.finish()
    assert engine.migration.report().missing == [
        MissingRange("pc.ram", 4 * PAGE, (PAGES - 4) * PAGE)
    ]
    await assert_kept(engine.guest, range(4))


async def test_it_is_held_until_what_is_missing_is_listed_and_an_heir_lists_it_again(
    holder: Holder, make_engine: MakeEngine
) -> None:
    listed: list[list[MissingRange]] = []
    begun, slow = asyncio.Event(), asyncio.Event()

    async def list_missing(ranges: Callable[[], Iterator[MissingRange]]) -> None:
        listed.append(list(ranges()))
        begun.set()
        await slow.wait()

    engine = make_engine(keeper=holder, pages=PAGES, list_missing=list_missing)
    await broken(engine, here=range(2, 5))
    engine.migration.abandon(force=False)
    await asyncio.wait_for(begun.wait(), LIMIT)
    assert engine.migration.state is State.ABANDONED
    assert engine.vmm.told[-1].startswith("complete"), "the guest does not wait for a list"
    await assert_kept(engine.guest, range(2, 5))
    assert holder.held
    succeed(engine, holder, list_missing=list_missing)
    slow.set()
    await engine.finish()
    first, again = listed
    assert (
        first
        == again
        == [
            MissingRange("pc.ram", 0, 2 * PAGE),
            MissingRange("pc.ram", 5 * PAGE, (PAGES - 5) * PAGE),
        ]
    )


async def test_a_report_names_the_first_thousand_ranges_and_counts_all(
    make_engine: MakeEngine,
) -> None:
    listed: list[MissingRange] = []

    async def list_missing(ranges: Callable[[], Iterator[MissingRange]]) -> None:
        listed.extend(ranges())

    pages = 4096
    engine = make_engine(pages=pages, list_missing=list_missing)
    await broken(engine, here=range(0, pages, 2), pages=pages)
    engine.migration.abandon(force=False)
    await engine.finish()
    report = engine.migration.report()
    assert listed == [MissingRange("pc.ram", page * PAGE, PAGE) for page in range(1, pages, 2)]
    assert report.missing == listed[:MOST_RANGES]
    assert (report.missing_ranges, report.missing_length) == (pages // 2, pages // 2 * PAGE)


async def test_a_changing_memory_is_waited_for(make_engine: MakeEngine) -> None:
    """An event that nobody has read makes the kernel answer EAGAIN."""
    engine = make_engine(pages=PAGES)
    await broken(engine, here=range(4))
    removing = engine.guest.remove(15)
    engine.guest.wait_for_event()  # nobody else reads it in this turn of the event loop
    engine.migration.abandon(force=False)
    await engine.finish()
    await asyncio.to_thread(removing.join)
    assert await read(engine.guest, 15) == bytes(8)
    assert await read(engine.guest, 14) is None


async def test_a_source_that_waits_to_come_back_is_dropped_as_well(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.RUNNING)
    await engine.source.postcopy("pc.ram", CONTENT, [page * PAGE for page in range(4)])
    await seen(engine.source)
    back = come_back(engine)  # before its break is noticed
    await back.send(stream_writer.received_bitmap_request("pc.ram"))
    link = engine.migration._standing.link
    assert link is not None
    async with asyncio.timeout(LIMIT):
        while link._returning is None:
            await asyncio.sleep(0)
    engine.migration.abandon(force=True)
    assert await back.wait_for_close() == b""
    await engine.finish()
    assert engine.migration.state is State.ABANDONED
    assert engine.migration.report().missing == [
        MissingRange("pc.ram", 4 * PAGE, (PAGES - 4) * PAGE)
    ]
    await assert_kept(engine.guest, range(4))


async def test_a_source_that_has_come_back_and_not_spoken_is_dropped_as_well(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    await broken(engine, here=range(4))
    back = come_back(engine)
    engine.migration.abandon(force=False)
    assert await back.wait_for_close() == b""
    await engine.finish()
    assert engine.migration.state is State.ABANDONED
    await assert_kept(engine.guest, range(4))
