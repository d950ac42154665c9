"""Connections whose handshake is under way: each may be the preempt channel, with a page on it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator

import pytest

from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from postcopyd.wire import stream_writer
from postcopyd.wire.return_path import Shut
from tests.incoming.engine import SECTION, Engine
from tests.incoming.guest import LIMIT, PAGE, Touch
from tests.incoming.test_recovery import CONTENT, PAGES, ask_what_is_here, come_back, go_on

MakeEngine = Callable[..., Engine]
LAST = PAGES - 1


@pytest.fixture
def coming() -> Iterator[socket.socket]:
    """A connection of which nobody knows yet whose it is."""
    coming, theirs = socket.socketpair()
    with coming, theirs:
        yield coming


async def ended_but_for_one_page(
    engine: Engine, coming: socket.socket
) -> tuple[Touch, Callable[[bool], None]]:
    """The stream is at its end, one page is waited for; `coming` was expected before that."""
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.RUNNING)
    over = engine.migration.expect_stream(coming)
    touch = engine.guest.touch(LAST)
    await engine.source.wait_for_request()
    await engine.source.postcopy("pc.ram", CONTENT, range(0, LAST * PAGE, PAGE))
    await engine.source.end()
    async with asyncio.timeout(LIMIT):
        while engine.migration.report().bytes_received < engine.source.sent:
            await asyncio.sleep(0)
    assert engine.migration.state is State.RUNNING
    assert touch.waits
    return touch, over


async def test_the_end_waits_for_who_may_be_the_preempt_channel(
    make_engine: MakeEngine, coming: socket.socket
) -> None:
    engine = make_engine(pages=PAGES)
    touch, over = await ended_but_for_one_page(engine, coming)
    channel = engine.connect_again()
    over(False)
    assert engine.migration.state is State.RUNNING
    page = stream_writer.StreamWriter(SECTION).page("pc.ram", LAST * PAGE)
    await asyncio.get_running_loop().sock_sendall(channel, page + CONTENT[LAST * PAGE :])
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await asyncio.to_thread(touch.result) == CONTENT[LAST * PAGE :]
    assert await engine.guest.content() == CONTENT


async def test_who_is_silent_then_is_borne_for_a_while_too(
    make_engine: MakeEngine, coming: socket.socket
) -> None:
    engine = make_engine(Settings(break_after=1), pages=PAGES)
    _, over = await ended_but_for_one_page(engine, coming)
    engine.connect_again()
    over(False)
    await engine.reach(State.PAUSED)
    assert "has said nothing for 1 s after the end of the stream" in str(engine.migration.failure)
    await come_back_with_the_page(engine)


async def test_what_may_be_lost_with_it_is_asked_for_again_and_not_taken_for_zeros(
    make_engine: MakeEngine, coming: socket.socket
) -> None:
    engine = make_engine(pages=PAGES)
    touch, over = await ended_but_for_one_page(engine, coming)
    over(True)
    await engine.reach(State.PAUSED)
    assert engine.migration.failure == (
        "a connection that may have been the preempt channel was lost in its handshake while pages "
        "are waited for"
    )
    await come_back_with_the_page(engine)
    assert await asyncio.to_thread(touch.result) == CONTENT[LAST * PAGE :]


async def come_back_with_the_page(engine: Engine) -> None:
    source = come_back(engine)
    assert await ask_what_is_here(source) == set(range(LAST))
    await go_on(source)
    await source.postcopy("pc.ram", CONTENT, [LAST * PAGE])
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
    assert await engine.guest.content() == CONTENT


async def test_a_stranger_has_no_page(make_engine: MakeEngine, coming: socket.socket) -> None:
    engine = make_engine(pages=PAGES)
    touch, over = await ended_but_for_one_page(engine, coming)
    over(False)
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await asyncio.to_thread(touch.result) == bytes(PAGE)
    assert engine.migration.report().never_sent == 1


async def test_nobody_is_waited_for_when_all_is_here(
    make_engine: MakeEngine, coming: socket.socket
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    over = engine.migration.expect_stream(coming)
    await engine.source.postcopy("pc.ram", CONTENT, range(0, PAGES * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    engine.source.close()
    await engine.finish()
    over(True)
    assert engine.migration.state is State.END
