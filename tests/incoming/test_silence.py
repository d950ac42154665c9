"""A source whose host is silent, and one that comes back before anybody has noticed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from postcopyd.wire import stream_writer
from postcopyd.wire.return_path import ReceivedBitmap, ResumeAck, Shut
from tests.incoming.engine import Engine, Source, image
from tests.incoming.guest import PAGE
from tests.silent import make_deaf, make_forgotten, tcp_pair

MakeEngine = Callable[..., Engine]
PAGES = 16
CONTENT = image(PAGES)
SOON = Settings(break_after=2)
LATE = Settings(break_after=3600)
LONGER_THAN_SOON = 4.0
"""Seconds; the kernel would have broken a stream by then."""


@pytest.fixture
def connect() -> Iterator[Callable[[Engine], Source]]:
    """Connect to an engine over TCP, and close the source's end when the test is over."""
    ends: list[socket.socket] = []

    def connect(engine: Engine) -> Source:
        ours, theirs = tcp_pair()
        ends.append(theirs)
        engine.migration.attach_stream(ours, f"connection {len(ends)}")
        return Source(theirs, engine.source.blocks)

    yield connect
    for end in ends:
        end.close()


Connect = Callable[[Engine], Source]


async def running(engine: Engine, connect: Connect) -> Source:
    """A guest runs, and none of its memory is here. The source has a TCP connection."""
    engine.use_no_stream()
    engine.migration.attach_vmm(engine.vmm)
    source = connect(engine)
    await source.advise()
    await source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.RUNNING)
    return source


async def resume_and_finish(engine: Engine, source: Source) -> None:
    """Take the migration up again with nothing here, on a connection that has asked for that."""
    await source.wait_for(lambda message: isinstance(message, ReceivedBitmap))
    await source.send(stream_writer.postcopy_resume())
    await source.wait_for(lambda message: isinstance(message, ResumeAck))
    await source.postcopy("pc.ram", CONTENT, range(0, PAGES * PAGE, PAGE))
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
    assert await engine.guest.content() == CONTENT


def come_back(engine: Engine, connect: Connect) -> Source:
    """A new connection that says at once that it comes back."""
    source = connect(engine)
    source.connection.send(stream_writer.received_bitmap_request("pc.ram"))
    return source


async def stays(engine: Engine, state: State) -> None:
    """Nothing happens for a while."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(LONGER_THAN_SOON):
            await engine.migration.wait()
    assert engine.migration.state is state


@pytest.mark.parametrize("asked", [False, True], ids=["idle", "while something is asked of it"])
async def test_a_stream_whose_source_is_silent_is_broken_after_the_time_that_is_set(
    make_engine: MakeEngine, connect: Connect, asked: bool
) -> None:
    engine = make_engine(SOON, pages=PAGES)
    source = await running(engine, connect)
    make_deaf(source.connection)
    touch = engine.guest.touch(9) if asked else None
    await engine.reach(State.PAUSED)
    failure = engine.migration.report().failure
    assert failure is not None
    assert "the stream from connection 1 broke: its host has been silent for 2 s" in failure
    await resume_and_finish(engine, come_back(engine, connect))
    if touch is not None:
        assert await asyncio.to_thread(touch.result) == CONTENT[9 * PAGE : 10 * PAGE]


async def test_before_the_package_it_fails_and_the_source_goes_on(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(SOON, pages=PAGES)
    engine.use_no_stream()
    engine.migration.attach_vmm(engine.vmm)
    source = connect(engine)
    await source.advise()
    await engine.reach(State.ADVISE)
    make_deaf(source.connection)
    await engine.finish()
    report = engine.migration.report()
    assert (report.state, report.guest_lost) == ("failed", False)
    assert "its host has been silent for 2 s" in (report.failure or "")


async def test_a_silent_preempt_channel_breaks_the_stream(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(SOON, pages=PAGES)
    await running(engine, connect)
    preempt = connect(engine)
    await preempt.send(preempt.pages("pc.ram", CONTENT, [0]))
    await engine.told(events.PreemptAttached)
    make_deaf(preempt.connection)
    await engine.reach(State.PAUSED)
    assert "its host has been silent for 2 s" in (engine.migration.failure or "")


async def test_a_source_that_has_to_wait_for_us_is_not_taken_for_dead(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(SOON, pages=1024)
    engine.use_no_stream()
    source = connect(engine)  # there is no VMM yet, so nothing is received
    source.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    await source.advise()
    content = image(1024)
    sending = asyncio.create_task(source.precopy("pc.ram", content, range(0, len(content), PAGE)))
    await stays(engine, State.NONE)
    assert not sending.done()
    engine.migration.attach_vmm(engine.vmm)
    await sending
    await source.switch_over({})
    await engine.reach(State.RUNNING)
    await source.postcopy("pc.ram", content, [])
    await source.end()
    assert await source.wait_for_shut() == Shut(0)


@pytest.mark.parametrize("asked", [False, True], ids=["idle", "while something is asked of it"])
@pytest.mark.parametrize("fall_silent", [make_deaf, make_forgotten])
async def test_a_source_that_is_back_is_met_long_before_its_old_stream_would_break(
    make_engine: MakeEngine,
    connect: Connect,
    fall_silent: Callable[[socket.socket], None],
    asked: bool,
) -> None:
    engine = make_engine(LATE, pages=PAGES)
    source = await running(engine, connect)
    fall_silent(source.connection)
    touch = engine.guest.touch(9) if asked else None
    await resume_and_finish(engine, come_back(engine, connect))
    if touch is not None:
        assert await asyncio.to_thread(touch.result) == CONTENT[9 * PAGE : 10 * PAGE]


async def test_nobody_ends_a_good_stream_by_coming_back_in_its_place(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(LATE, pages=PAGES)
    source = await running(engine, connect)
    pretender = come_back(engine, connect)
    await stays(engine, State.RUNNING)
    await source.postcopy("pc.ram", CONTENT, range(0, PAGES * PAGE, PAGE))
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
    assert not pretender.messages


async def test_of_two_that_come_back_the_later_one_waits_and_it_is_told_of_the_other(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(SOON, pages=PAGES)
    await running(engine, connect)
    first = come_back(engine, connect)
    second = come_back(engine, connect)
    refused = await engine.told(events.ConnectionRefused)
    assert refused.peer == "connection 2"
    assert refused.reason == "migration 'vm0' has been resumed once more since, by connection 3"
    await first.wait_for_close()
    await resume_and_finish(engine, second)


async def test_a_stream_that_something_on_the_way_keeps_open_gives_way_to_the_source_that_is_back(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(SOON, pages=PAGES)
    await running(engine, connect)
    touch = engine.guest.touch(9)
    await resume_and_finish(engine, come_back(engine, connect))
    assert await asyncio.to_thread(touch.result) == CONTENT[9 * PAGE : 10 * PAGE]
    paused = await engine.told(events.Paused)
    assert "it is back, and here nothing has come for 2 s" in paused.reason


async def test_a_stream_that_brings_pages_does_not_give_way(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(SOON, pages=PAGES)
    source = await running(engine, connect)
    pretender = come_back(engine, connect)
    for page in range(PAGES):
        await source.postcopy("pc.ram", CONTENT, [page * PAGE])
        await asyncio.sleep(LONGER_THAN_SOON / PAGES)
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
    assert not pretender.messages


async def test_a_stream_does_not_give_way_to_who_has_left_again(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(SOON, pages=PAGES)
    source = await running(engine, connect)
    come_back(engine, connect).connection.close()
    await stays(engine, State.RUNNING)
    await source.postcopy("pc.ram", CONTENT, range(0, PAGES * PAGE, PAGE))
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
