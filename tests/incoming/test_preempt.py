"""The preempt channel: urgent pages on a connection of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.states import State
from postcopyd.wire import stream_writer
from postcopyd.wire.return_path import ReceivedBitmap, Shut
from tests.incoming.engine import Engine, Source, image
from tests.incoming.guest import HUGE, PAGE
from tests.incoming.preempt_channel import (
    END,
    Connect,
    MakeEngine,
    all_is_received,
    come_back_with_everything,
    connect,
    switch_over,
)

__all__ = ["connect"]  # a fixture

pytestmark = pytest.mark.usefixtures("every_connection")


async def test_a_requested_page_comes_on_the_channel_and_the_others_on_the_stream(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(pages=16)
    content = image(16)
    engine.attach()
    channel = connect(engine)
    await switch_over(engine)
    for page in (9, 4):  # the second one is zero
        touch = engine.guest.touch(page)
        request = await engine.source.wait_for_request()
        assert request.offset == page * PAGE
        await channel.pages(content, [request.offset])
        expected = content[page * PAGE : (page + 1) * PAGE]
        assert await asyncio.to_thread(touch.result) == expected
    rest = [page * PAGE for page in range(16) if page not in (9, 4)]
    await engine.source.postcopy("pc.ram", content, rest)
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    report = engine.migration.report()
    assert report.preempt == "the test again"
    assert report.counters.pages_by_fault == 2
    assert report.received == engine.guest.length


async def test_the_end_of_the_stream_is_not_the_end_while_an_asked_page_is_on_its_way(
    make_engine: MakeEngine, connect: Connect
) -> None:
    """A QEMU 10.0 does not mark the end of the channel."""
    engine = make_engine(pages=4)
    content = image(4)
    engine.attach()
    channel = connect(engine)
    await switch_over(engine)
    touch = engine.guest.touch(2)
    await engine.source.wait_for_request()
    other = engine.guest.touch(3)
    await engine.source.wait_for_request()
    await channel.pages(content, [3 * PAGE])
    assert await asyncio.to_thread(other.result) == content[3 * PAGE :]
    await engine.source.postcopy("pc.ram", content, [0, PAGE])
    await engine.source.end()
    await engine.source.send()
    assert engine.migration.state is State.RUNNING
    assert touch.waits
    await channel.pages(content, [2 * PAGE])
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await asyncio.to_thread(touch.result) == content[2 * PAGE : 3 * PAGE]


async def test_a_channel_that_says_its_end_may_close_before_the_stream_ends(
    make_engine: MakeEngine, connect: Connect
) -> None:
    """As a QEMU 7.2 does it."""
    engine = make_engine(pages=4)
    content = image(4)
    engine.attach()
    channel = connect(engine)
    await switch_over(engine)
    await channel.pages(content, [0])
    await channel.send(END)
    channel.connection.close()
    await engine.source.postcopy("pc.ram", content, [PAGE, 2 * PAGE, 3 * PAGE])
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert engine.migration.report().received == 4 * PAGE
    assert engine.failures == []


async def test_pages_and_the_end_of_the_channel_may_come_at_once_behind_the_stream(
    make_engine: MakeEngine, connect: Connect
) -> None:
    """No order is kept between the two connections, and this one may have been held up."""
    engine = make_engine(pages=4)
    content = image(4)
    engine.attach()
    channel = connect(engine)
    await switch_over(engine)
    touches = [engine.guest.touch(page) for page in (1, 3)]
    for _ in touches:
        await engine.source.wait_for_request()
    await channel.pages(content, [0])
    await engine.told(events.PreemptAttached)
    await engine.source.postcopy("pc.ram", content, [2 * PAGE])
    await engine.source.end()
    await all_is_received(engine, engine.source, channel)
    # A QEMU 7.2 names the block of each page that has followed one of the main stream.
    named = [stream_writer.StreamWriter(0).page("pc.ram", page * PAGE) for page in (1, 3)]
    await channel.send(named[0], content[PAGE : 2 * PAGE], named[1], content[3 * PAGE :], END)
    assert await engine.source.wait_for_shut() == Shut(0)
    for page, touch in zip((1, 3), touches, strict=True):
        assert await asyncio.to_thread(touch.result) == content[page * PAGE : (page + 1) * PAGE]
    assert engine.migration.report().never_sent == 0


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (None, "the stream from the test broke: the source closed the connection"),
        (b"\0\0\0", "at byte 4111: the preempt channel stops in the middle of a page"),
    ],
)
async def test_a_channel_that_breaks_pauses_as_the_stream_does(
    make_engine: MakeEngine, connect: Connect, said: bytes | None, reason: str
) -> None:
    engine = make_engine(pages=4)
    content = image(4)
    engine.attach()
    channel = connect(engine)
    await switch_over(engine)
    await channel.pages(content, [0])
    await engine.told(events.PreemptAttached)
    if said is not None:
        await channel.send(said)
    channel.connection.close()
    await engine.reach(State.PAUSED)
    assert engine.migration.failure == reason
    assert await engine.source.wait_for_close() != b"never"  # both are closed


WRONG = {
    "unknown flags": (stream_writer.page_word(0, 0x40), "at byte 0: XBZRLE"),
    "a block list": (stream_writer.page_word(4096, 4), "at byte 0: a list of RAM blocks"),
    "no block named": (stream_writer.page_word(0, 0x28), "CONTINUE before any that names"),
    "an unknown block": (
        stream_writer.StreamWriter(0).page("pc.rom", 0) + bytes(PAGE),
        "RAM block 'pc.rom', which is not listed",
    ),
    "outside its block": (
        stream_writer.StreamWriter(0).page("pc.ram", 4 * PAGE) + bytes(PAGE),
        "a page at 0x4000 of block 'pc.ram'",
    ),
    "bytes behind its end": (END + b"\0", "at byte 8: bytes behind the end of the preempt channel"),
}


@pytest.mark.parametrize(("said", "reason"), WRONG.values(), ids=WRONG.keys())
async def test_what_is_wrong_on_the_channel_is_named(
    make_engine: MakeEngine, connect: Connect, said: bytes, reason: str
) -> None:
    engine = make_engine(pages=4)
    engine.attach()
    channel = connect(engine)
    await switch_over(engine)
    await channel.send(said)
    await engine.reach(State.PAUSED)
    assert engine.migration.failure is not None and reason in engine.migration.failure


async def test_pages_before_the_switchover_are_refused_and_the_source_goes_on(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(pages=4)
    engine.attach()
    channel = connect(engine)
    await engine.source.advise()
    await channel.pages(image(4), [0])
    await engine.finish()
    assert engine.migration.state is State.FAILED
    assert engine.migration.failure == "the preempt channel brings pages in state advise"


async def test_a_channel_may_connect_and_speak_before_the_stream_has_begun(
    make_engine: MakeEngine, connect: Connect
) -> None:
    """Which of two connections is read first is the event loop's affair."""
    engine = make_engine(pages=4)
    content = image(4)
    engine.attach()
    channel = connect(engine)
    engine.vmm.may_load.clear()
    await channel.send(b"\0")  # the first byte of a record
    await switch_over_without_running(engine)
    await channel.send(stream_writer.StreamWriter(0).page("pc.ram", 0)[1:], content[:PAGE])
    await engine.told(events.PreemptAttached)
    engine.vmm.may_load.set()
    await engine.source.postcopy("pc.ram", content, range(PAGE, 4 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert engine.migration.report().received == 4 * PAGE


async def switch_over_without_running(engine: Engine) -> None:
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, engine.guest.length)]})
    await engine.reach(State.LISTENING)


async def test_the_channel_may_be_there_before_the_stream(
    make_engine: MakeEngine, connect: Connect
) -> None:
    """A QEMU makes both nearly at once, and a TLS handshake may overtake the other."""
    engine = make_engine(pages=4)
    content = image(4)
    engine.migration.attach_vmm(engine.vmm)
    channel = connect(engine)
    engine.attach_stream()
    await switch_over(engine)
    touch = engine.guest.touch(3)
    await engine.source.wait_for_request()
    await channel.pages(content, [3 * PAGE])
    assert await asyncio.to_thread(touch.result) == content[3 * PAGE :]
    await engine.source.postcopy("pc.ram", content, range(0, 3 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert engine.migration.report().peer == "the test"
    assert engine.migration.report().preempt == "the test again"


async def test_the_channel_may_be_there_before_the_stream_of_a_source_that_comes_back(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(pages=4)
    content = image(4)
    engine.attach()
    await switch_over(engine)
    engine.source.close()
    await engine.reach(State.PAUSED)
    channel = connect(engine)
    source = Source(engine.connect_again(), engine.source.blocks)
    await source.send(stream_writer.received_bitmap_request("pc.ram"))
    await source.wait_for(lambda message: isinstance(message, ReceivedBitmap))
    await source.send(stream_writer.postcopy_resume())
    touch = engine.guest.touch(3)
    await source.wait_for_request()
    await channel.pages(content, [3 * PAGE])
    assert await asyncio.to_thread(touch.result) == content[3 * PAGE :]
    await source.postcopy("pc.ram", content, range(0, 3 * PAGE, PAGE))
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
    assert [event for event in engine.events if isinstance(event, events.Paused)] == [
        await engine.told(events.Paused)
    ]


async def test_what_was_asked_for_before_a_break_may_still_come_behind_the_end_of_the_stream(
    make_engine: MakeEngine, connect: Connect
) -> None:
    """A source keeps its queue of requests over a break, also those that no fault waits for."""
    engine = make_engine(pages=16)
    content = image(16)
    engine.attach()
    await switch_over(engine)
    touches = []
    for page in (9, 10):  # the second one is close to the first
        touches.append(engine.guest.touch(page))
        assert (await engine.source.wait_for_request()).offset == page * PAGE
    asked_around = await engine.source.wait_for_request()
    assert (asked_around.offset, asked_around.length) == (8 * PAGE, PAGE)
    assert (await engine.source.wait_for_request()).offset == 11 * PAGE
    engine.source.close()
    await engine.reach(State.PAUSED)
    source = Source(engine.connect_again(), engine.source.blocks)
    channel = connect(engine)
    await source.send(stream_writer.received_bitmap_request("pc.ram"))
    await source.wait_for(lambda message: isinstance(message, ReceivedBitmap))
    await source.send(stream_writer.postcopy_resume())
    asked = [await source.wait_for_request() for _ in range(4)]
    assert [request.offset // PAGE for request in asked] == [9, 10, 8, 11]
    assert (await engine.told(events.Resumed)).outstanding == 2
    await channel.pages(content, [9 * PAGE])
    await engine.told(events.PreemptAttached)
    await source.postcopy(
        "pc.ram", content, [page * PAGE for page in range(16) if page not in (8, 9)]
    )
    await source.end()
    await all_is_received(engine, engine.source, source, channel)
    assert engine.migration.state is State.RUNNING
    await channel.pages(content, [8 * PAGE])
    assert await source.wait_for_shut() == Shut(0)
    assert engine.migration.report().never_sent == 0
    for touch in touches:
        await asyncio.to_thread(touch.result)


async def test_a_page_may_be_the_first_word_of_a_channel_and_come_behind_the_end(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(pages=4)
    content = image(4)
    engine.attach()
    channel = connect(engine)
    await switch_over(engine)
    touch = engine.guest.touch(1)
    request = await engine.source.wait_for_request()
    assert request.offset == PAGE
    await engine.source.postcopy("pc.ram", content, [0, 2 * PAGE, 3 * PAGE])
    await engine.source.end()
    await all_is_received(engine, engine.source, channel)
    await channel.pages(content, [PAGE])
    assert await asyncio.to_thread(touch.result) == content[PAGE : 2 * PAGE]
    assert await engine.source.wait_for_shut() == Shut(0)
    assert engine.migration.report().never_sent == 0


async def test_a_channel_without_its_stream_is_refused_by_name(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=4)
    engine.attach()
    await engine.source.send(stream_writer.StreamWriter(0).page("pc.ram", 0), bytes(PAGE))
    refused = await engine.told(events.ConnectionRefused)
    assert "preempt channel" in refused.reason
    assert engine.migration.state is State.NONE


async def test_each_channel_may_be_in_the_middle_of_a_huge_page(
    make_engine: MakeEngine, connect: Connect, huge_pages: Callable[[int], None]
) -> None:
    huge_pages(4)
    engine = make_engine(pages=2, page_size=HUGE)
    content = image(2, HUGE)
    engine.attach()
    channel = connect(engine)
    await switch_over(engine)
    await engine.source.postcopy("pc.ram", content, range(0, HUGE // 2, PAGE))
    touch = engine.guest.touch(1)
    request = await engine.source.wait_for_request()
    assert (request.offset, request.length) == (HUGE, HUGE)
    await channel.pages(content, range(HUGE, 2 * HUGE, PAGE))
    assert await asyncio.to_thread(touch.result) == content[HUGE : HUGE + PAGE]
    await engine.source.postcopy("pc.ram", content, range(HUGE // 2, HUGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert engine.migration.report().received == 2 * HUGE


async def test_a_channel_that_ends_in_the_middle_of_a_huge_page_has_lost_the_rest_of_it(
    make_engine: MakeEngine, connect: Connect, huge_pages: Callable[[int], None]
) -> None:
    huge_pages(2)
    engine = make_engine(pages=2, page_size=HUGE)
    content = image(2, HUGE)
    engine.attach()
    channel = connect(engine)
    await switch_over(engine)
    touch = engine.guest.touch(1)
    await engine.source.wait_for_request()
    await engine.source.postcopy("pc.ram", content, range(0, HUGE, PAGE))
    await engine.source.end()
    await channel.pages(content, range(HUGE, HUGE + HUGE // 2, PAGE))
    await channel.send(END)
    await engine.reach(State.PAUSED)
    assert engine.migration.failure == "the preempt channel ends in the middle of a host page"
    await come_back_with_everything(engine, content)
    assert await asyncio.to_thread(touch.result) == content[HUGE : HUGE + PAGE]
