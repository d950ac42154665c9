"""A whole migration into real memory: order, content, faults, the end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.states import State
from postcopyd.wire.return_path import Pong, Shut
from tests.incoming.engine import DEVICE_STATE, Engine, image
from tests.incoming.guest import HUGE, LIMIT, PAGE

pytestmark = pytest.mark.usefixtures("every_connection")

MakeEngine = Callable[..., Engine]


def whole(engine: Engine) -> dict[str, list[tuple[int, int]]]:
    return {engine.guest.name: [(0, engine.guest.length)]}


async def start(engine: Engine, state: State = State.RUNNING) -> None:
    """Go as far as `state`, with nothing received."""
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over(whole(engine))
    await engine.reach(state)


async def test_a_guest_runs_before_its_memory_and_every_fault_is_served(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=32)
    content = image(32)
    await start(engine)
    touch = engine.guest.touch(17)
    request = await engine.source.wait_for_request()
    assert (request.block, request.offset, request.length) == ("pc.ram", 17 * PAGE, PAGE)
    assert touch.waits
    await engine.source.postcopy("pc.ram", content, [17 * PAGE])
    assert await asyncio.to_thread(touch.result) == content[17 * PAGE : 18 * PAGE]
    rest = [page * PAGE for page in range(32) if page != 17]
    await engine.source.postcopy("pc.ram", content, rest)
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    engine.source.close()
    await engine.finish()
    assert engine.migration.state is State.END
    assert await engine.guest.content() == content
    report = engine.migration.report()
    assert report.counters.faults == 1
    assert report.counters.requests == 1
    assert report.counters.pages_by_fault == 1
    assert report.counters.pages_by_background == 31
    assert report.received == report.length == 32 * PAGE
    assert report.never_sent == 0
    assert report.fault_latency.count == 1


async def test_the_vmm_is_told_each_step_in_order(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=4)
    await start(engine)
    await engine.source.postcopy("pc.ram", image(4), range(0, 4 * PAGE, PAGE))
    await engine.source.end()
    await engine.source.wait_for_shut()
    assert engine.vmm.told == ["advise", "discard", "listening", "run", "complete"]
    assert engine.vmm.load is not None
    assert engine.vmm.load.device_state == DEVICE_STATE
    states = [event.new for event in engine.events if isinstance(event, events.StateChanged)]
    assert states == [
        State.ADVISE,
        State.DISCARD,
        State.LISTENING,
        State.RUNNING,
        State.END,
    ]
    assert engine.migration.package is not None
    assert DEVICE_STATE in engine.migration.package


async def test_the_ping_of_the_package_is_answered_when_the_devices_are_loaded(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=4)
    engine.vmm.may_load.clear()
    await start(engine, State.LISTENING)
    await engine.source.wait_for_pong(4)
    await engine.source.postcopy("pc.ram", image(4), range(0, 4 * PAGE, PAGE))
    await engine.source.end()
    assert Pong(3) not in engine.source.messages
    assert engine.migration.state is State.LISTENING
    engine.vmm.may_load.set()
    await engine.source.wait_for_pong(3)
    assert await engine.source.wait_for_shut() == Shut(0)


@pytest.mark.parametrize("shared", [False, True], ids=["private", "memory file"])
async def test_precopy_pages_survive_the_switchover_unless_discarded(
    make_engine: MakeEngine, shared: bool
) -> None:
    engine = make_engine(pages=64, shared=shared)
    old, new = image(64, seed=1), image(64, seed=2)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", old, range(0, 64 * PAGE, PAGE))
    # A second pass with some pages changed, then some that change again and are discarded.
    changed = [page * PAGE for page in (3, 4, 5, 30)]
    await engine.source.precopy("pc.ram", new, changed)
    stale = [(10 * PAGE, 6 * PAGE), (63 * PAGE, PAGE)]
    await engine.source.switch_over({"pc.ram": stale})
    await engine.reach(State.RUNNING)
    touch = engine.guest.touch(12)
    request = await engine.source.wait_for_request()
    assert request.offset == 12 * PAGE
    stale_pages = [page * PAGE for page in (12, 10, 11, 13, 14, 15, 63)]
    await engine.source.postcopy("pc.ram", new, stale_pages)
    await engine.source.end()
    await engine.source.wait_for_shut()
    assert await asyncio.to_thread(touch.result) == new[12 * PAGE : 13 * PAGE]
    expected = bytearray(old)
    for offset in changed + stale_pages:
        expected[offset : offset + PAGE] = new[offset : offset + PAGE]
    assert await engine.guest.content() == expected
    assert engine.migration.report().counters.pages_precopy == 68


async def test_a_fault_on_a_staged_page_is_served_without_the_source(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=2048)
    content = image(2048)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", content, range(0, 2048 * PAGE, PAGE))
    await engine.source.switch_over({"pc.ram": [(0, PAGE)]})
    await engine.reach(State.RUNNING)
    for page in (2047, 1023, 4):
        touched = await asyncio.to_thread(engine.guest.touch(page).result)
        assert touched == content[page * PAGE : (page + 1) * PAGE]
    await engine.source.postcopy("pc.ram", content, [0])
    await engine.source.end()
    await engine.source.wait_for_shut()
    assert await engine.guest.content() == content
    assert engine.migration.report().counters.requests == 0


@pytest.mark.parametrize("shared", [False, True], ids=["private", "memory file"])
async def test_huge_pages_are_assembled_and_placed_whole(
    make_engine: MakeEngine, huge_pages: Callable[[int], None], shared: bool
) -> None:
    huge_pages(8)
    engine = make_engine(pages=4, page_size=HUGE, shared=shared)
    content = bytearray(image(4, HUGE))
    content[2 * HUGE : 3 * HUGE] = bytes(HUGE)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", content, range(0, HUGE, PAGE))
    await engine.source.switch_over({"pc.ram": [(HUGE, 3 * HUGE)]})
    await engine.reach(State.RUNNING)
    touch = engine.guest.touch(3)
    request = await engine.source.wait_for_request()
    assert (request.offset, request.length) == (3 * HUGE, HUGE)
    await engine.source.postcopy("pc.ram", content, range(3 * HUGE, 4 * HUGE, PAGE))
    assert await asyncio.to_thread(touch.result) == content[3 * HUGE : 3 * HUGE + PAGE]
    await engine.source.postcopy("pc.ram", content, range(HUGE, 3 * HUGE, PAGE))
    await engine.source.end()
    await engine.source.wait_for_shut()
    assert await engine.guest.content() == content


async def test_pages_that_the_source_never_sends_are_zero(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=8)
    content = image(8)
    await start(engine)
    touch = engine.guest.touch(7)
    await engine.source.wait_for_request()
    await engine.source.postcopy("pc.ram", content, range(0, 4 * PAGE, PAGE))
    assert touch.waits
    await engine.source.end()
    await engine.source.wait_for_shut()
    assert await asyncio.to_thread(touch.result) == bytes(PAGE)
    assert await engine.guest.content() == content[: 4 * PAGE] + bytes(4 * PAGE)
    assert engine.migration.report().never_sent == 4


async def test_devices_find_zeros_where_the_source_never_sends_a_page(
    make_engine: MakeEngine,
) -> None:
    """They are loaded before the end, and the end waits for them."""
    engine = make_engine(pages=8)
    content = image(8)
    engine.vmm.may_load.clear()
    await start(engine, State.LISTENING)
    await asyncio.wait_for(engine.vmm.asked_to_load.wait(), LIMIT)
    early = engine.guest.touch(7)
    await engine.source.wait_for_request()
    await engine.source.postcopy("pc.ram", content, range(0, 4 * PAGE, PAGE))
    await engine.source.end()
    assert await asyncio.to_thread(early.result) == bytes(PAGE)
    assert await asyncio.to_thread(engine.guest.touch(6).result) == bytes(PAGE)
    engine.vmm.may_load.set()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await engine.guest.content() == content[: 4 * PAGE] + bytes(4 * PAGE)
    assert engine.migration.report().never_sent == 4


async def test_a_page_that_comes_twice_is_placed_once(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=8)
    first, second = image(8, seed=1), image(8, seed=2)
    await start(engine)
    await engine.source.postcopy("pc.ram", first, range(0, 8 * PAGE, PAGE))
    await engine.source.postcopy("pc.ram", second, [PAGE, 6 * PAGE, 4 * PAGE])
    await engine.source.end()
    await engine.source.wait_for_shut()
    assert await engine.guest.content() == first
    assert engine.migration.report().counters.pages_duplicate == 3


async def test_a_stream_waits_for_its_vmm(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=8)
    engine.attach_stream()
    await engine.source.advise()
    await engine.source.wait_for_pong(1)
    engine.migration.attach_vmm(engine.vmm)
    await engine.source.switch_over(whole(engine))
    await engine.reach(State.RUNNING)


async def test_memory_that_the_vmm_gives_back_on_the_way_reads_as_zeros(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=64)
    content = image(64)
    await start(engine)
    await engine.source.postcopy("pc.ram", content, range(0, 16 * PAGE, PAGE))
    # Pages that are here and pages that are not, given back by the balloon.
    await asyncio.to_thread(engine.guest.remove(8, 16).join, LIMIT)
    await engine.source.postcopy("pc.ram", content, range(16 * PAGE, 64 * PAGE, PAGE))
    await engine.source.end()
    await engine.source.wait_for_shut()
    assert await engine.guest.content() == (
        content[: 8 * PAGE] + bytes(16 * PAGE) + content[24 * PAGE :]
    )
    removals = [event for event in engine.events if isinstance(event, events.MemoryRemoved)]
    assert removals == [events.MemoryRemoved("pc.ram", 8 * PAGE, 16 * PAGE)]


async def test_a_balloon_that_never_rests_does_not_lose_a_page(make_engine: MakeEngine) -> None:
    """Every removal makes placing fail with EAGAIN for a while: put off, tried again, in order."""
    engine = make_engine(pages=512)
    content = image(512)
    await start(engine)

    def balloon() -> None:
        for page in range(400, 500):
            engine.guest.remove(page).join(LIMIT)

    inflating = asyncio.create_task(asyncio.to_thread(balloon))
    order = list(range(400))
    random.Random(3).shuffle(order)
    for place in range(0, 400, 8):
        await engine.source.postcopy(
            "pc.ram", content, [page * PAGE for page in order[place : place + 8]]
        )
    await inflating
    await engine.source.end()
    await engine.source.wait_for_shut()
    assert (await engine.guest.content())[: 400 * PAGE] == content[: 400 * PAGE]


async def test_what_is_put_off_is_not_overwritten_whoever_says_go_on(
    make_engine: MakeEngine,
) -> None:
    """What came before the switchover may all be placed just then, and says so."""
    engine = make_engine(pages=64)
    content = image(64)
    await start(engine)
    link = engine.migration._standing.link
    assert link is not None
    writer = engine.source.writer

    def comes(pages: range) -> None:
        offsets = range(pages.start * PAGE, pages.stop * PAGE, PAGE)
        records = engine.source.pages("pc.ram", content, offsets)
        engine.source.connection.send(writer.ram_part() + records + writer.ram_footer())
        link.main.receive_waiting()

    removal = engine.guest.remove(60)  # until its event is read, nothing can be placed
    engine.guest.wait_for_event()
    comes(range(1))
    assert engine.migration.report().received == 0
    for page in range(1, 16):
        engine.migration._sourcing.resume()
        comes(range(page, page + 1))
    await engine.source.postcopy("pc.ram", content, range(16 * PAGE, 60 * PAGE, PAGE))
    await engine.source.end()
    await engine.source.wait_for_shut()
    await asyncio.to_thread(removal.join, LIMIT)
    assert (await engine.guest.content())[: 60 * PAGE] == content[: 60 * PAGE]


async def test_threads_that_fault_while_the_background_streams_see_only_right_bytes(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=1024)
    content = image(1024)
    await start(engine)
    order = list(range(1024))
    random.Random(5).shuffle(order)
    touches = {page: engine.guest.touch(page) for page in order[:100]}

    async def answer() -> None:
        answered: set[int] = set()
        while not touches.keys() <= answered:
            request = await engine.source.wait_for_request()
            offsets = range(request.offset, request.offset + request.length, PAGE)
            await engine.source.postcopy("pc.ram", content, offsets)
            answered.update(offset // PAGE for offset in offsets)

    async def background() -> None:
        for place in range(100, 1024, 50):
            offsets = [page * PAGE for page in order[place : place + 50]]
            await engine.source.postcopy("pc.ram", content, offsets)

    await answer()
    await background()
    await engine.source.end()
    await engine.source.wait_for_shut()
    for page, touch in touches.items():
        result = await asyncio.to_thread(touch.result)
        assert result == content[page * PAGE : (page + 1) * PAGE]
    assert await engine.guest.content() == content
    counters = engine.migration.report().counters
    assert counters.requests <= 100 < counters.requests + counters.pages_around


async def test_a_balloon_at_work_at_the_end_is_not_left_asleep(make_engine: MakeEngine) -> None:
    """Who gives memory back sleeps until its event is read; nobody would read it later."""
    engine = make_engine(pages=256)
    await start(engine)
    await engine.source.postcopy("pc.ram", image(64), range(0, 64 * PAGE, PAGE))
    await engine.source.end()
    removers = [engine.guest.remove(page) for page in range(64, 256)]
    await engine.source.wait_for_shut()
    for remover in removers:
        await asyncio.to_thread(remover.join, LIMIT)
        assert not remover.is_alive()


async def test_cancelling_while_memory_is_being_emptied_waits_for_that(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=1024, shared=True)
    engine.attach()
    await engine.source.advise()
    await engine.source.wait_for_pong(1)
    engine.migration.cancel("too slow")
    await engine.finish()
    assert engine.migration.state is State.FAILED
