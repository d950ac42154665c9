"""When nothing comes any more, somebody is told; nothing is ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from postcopyd.incoming import events
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.stall_watch import StallWatch
from postcopyd.incoming.states import State
from tests.incoming.engine import Engine
from tests.incoming.test_recovery import (
    CONTENT,
    PAGES,
    ask_what_is_here,
    broken,
    come_back,
    go_on,
    seen,
)
from tests.support import LIMIT

MakeEngine = Callable[..., Engine]
SOON = 0.05  # seconds


async def running(make_engine: MakeEngine) -> Engine:
    """A guest runs, and none of its memory is here."""
    engine = make_engine(pages=PAGES, settings=Settings(alarm_after=SOON))
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, engine.guest.length)]})
    await engine.reach(State.RUNNING)
    return engine


async def test_a_stall_is_told_again_when_it_has_lasted_twice_as_long_and_when_it_is_over() -> None:
    told: list[float] = []
    over = asyncio.Event()
    here = 0
    thrice = asyncio.Event()

    def stalled(seconds: float) -> None:
        told.append(seconds)
        if len(told) == 3:
            thrice.set()

    watch = StallWatch(
        asyncio.get_running_loop(),
        SOON,
        progress=lambda: here,
        waited=lambda: 0.0,
        stalled=stalled,
        over=lambda _: over.set(),
    )
    assert watch.seconds is None
    watch.start()
    watch.start()
    async with asyncio.timeout(LIMIT):
        await thrice.wait()
    assert told[0] >= SOON and told[1] >= 2 * SOON and told[2] >= 4 * SOON
    assert watch.seconds is not None and watch.seconds >= told[2]
    here += 1
    async with asyncio.timeout(LIMIT):
        await over.wait()
    assert watch.seconds is None
    watch.stop()
    watch.stop()


async def test_who_goes_on_is_not_complained_of() -> None:
    told: list[float] = []
    looks = 0
    enough = asyncio.Event()

    def progress() -> int:
        nonlocal looks
        looks += 1
        if looks == 20:
            enough.set()
        return looks

    watch = StallWatch(
        asyncio.get_running_loop(),
        SOON,
        progress=progress,
        waited=lambda: 0.0,
        stalled=told.append,
        over=told.append,
    )
    watch.start()
    async with asyncio.timeout(LIMIT):
        await enough.wait()
    watch.stop()
    assert told == []


async def test_a_source_that_answers_everything_but_one_fault_raises_an_alarm(
    make_engine: MakeEngine,
) -> None:
    engine = await running(make_engine)
    ignored = engine.guest.touch(3)
    await engine.source.wait_for_request()

    async def background() -> None:
        for page in (0, 1, 2, *range(4, PAGES)):
            await engine.source.postcopy("pc.ram", CONTENT, [page * 4096])
            await asyncio.sleep(SOON / 4)

    sending = asyncio.create_task(background())
    assert (await engine.told(events.Stalled)).outstanding == 1
    await sending
    await engine.source.postcopy("pc.ram", CONTENT, [3 * 4096])
    await engine.told(events.StallOver)
    assert await asyncio.to_thread(ignored.result) == CONTENT[3 * 4096 : 4 * 4096]


async def test_an_alarm_is_over_when_the_migration_has_ended(make_engine: MakeEngine) -> None:
    """Also where all that was missing came before anybody looked again."""
    engine = await running(make_engine)
    engine.guest.touch(3)
    await engine.told(events.Stalled)
    engine.migration.cancel("nobody waits any more", force=True)
    await engine.finish()
    await engine.told(events.StallOver)
    assert engine.migration.report().stalled_seconds is None


async def test_a_source_that_repeats_what_is_here_raises_an_alarm(make_engine: MakeEngine) -> None:
    engine = await running(make_engine)

    async def repeat() -> None:
        while True:
            await engine.source.postcopy("pc.ram", CONTENT, [0])
            await asyncio.sleep(SOON / 4)

    repeating = asyncio.create_task(repeat())
    assert (await engine.told(events.Stalled)).outstanding == 0
    repeating.cancel()


async def test_a_source_that_comes_back_again_and_again_and_brings_nothing_raises_an_alarm(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES, settings=Settings(alarm_after=SOON))
    await broken(engine)
    engine.events.clear()

    async def flap() -> None:
        while True:
            source = come_back(engine)
            await ask_what_is_here(source)
            source.connection.close()
            await engine.reach(State.PAUSED)

    flapping = asyncio.create_task(flap())
    await engine.told(events.Stalled)
    flapping.cancel()


async def test_a_source_that_falls_silent_after_the_package_raises_an_alarm(
    make_engine: MakeEngine,
) -> None:
    engine = await running(make_engine)
    touch = engine.guest.touch(3)
    await engine.source.wait_for_request()
    stalled = await engine.told(events.Stalled)
    assert stalled.seconds >= SOON and stalled.outstanding == 1
    seconds = engine.migration.report().stalled_seconds
    assert seconds is not None and seconds >= SOON
    assert engine.migration.state is State.RUNNING
    await engine.source.postcopy("pc.ram", CONTENT, [3 * 4096])
    assert await asyncio.to_thread(touch.result) == CONTENT[3 * 4096 : 4 * 4096]
    assert (await engine.told(events.StallOver)).seconds >= SOON


async def test_a_paused_migration_raises_an_alarm_too(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=PAGES, settings=Settings(alarm_after=SOON))
    await broken(engine)
    engine.events.clear()
    await engine.told(events.Stalled)
    source = come_back(engine)
    await ask_what_is_here(source)
    await go_on(source)
    await seen(source)
    await source.postcopy("pc.ram", CONTENT, [10 * 4096])
    await engine.told(events.StallOver)


async def test_before_the_package_and_after_the_end_there_is_no_alarm(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES, settings=Settings(alarm_after=SOON))
    engine.attach()
    await engine.source.advise()
    await engine.reach(State.ADVISE)
    await asyncio.sleep(4 * SOON)  # long enough for an alarm, if there was one
    engine.migration.cancel("the test has seen enough")
    await engine.finish()
    assert not [event for event in engine.events if isinstance(event, events.Stalled)]
