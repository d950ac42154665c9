"""Connections beside the stream that are no preempt channel, or have not yet said that they are."""

from __future__ import annotations

import asyncio
import socket

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from postcopyd.wire.return_path import Shut
from tests.incoming.engine import Source, image
from tests.incoming.guest import LIMIT, PAGE
from tests.incoming.preempt_channel import (
    END,
    Connect,
    MakeEngine,
    bring_everything,
    come_back_with_everything,
    connect,
    switch_over,
)

__all__ = ["connect"]  # a fixture

pytestmark = pytest.mark.usefixtures("every_connection")


async def test_who_says_nothing_keeps_no_source_out(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(pages=4)
    engine.migration.attach_vmm(engine.vmm)
    stranger = connect(engine)
    engine.attach_stream()
    await switch_over(engine)
    stranger.connection.close()
    await engine.source.postcopy("pc.ram", image(4), range(0, 4 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)


async def test_a_source_that_waits_for_its_vmm_is_not_silent(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(pages=4)
    engine.attach_stream()
    await engine.source.advise()  # nobody reads it yet
    stranger = connect(engine)
    await stranger.send(b"QEVM")
    assert await stranger.closed()
    engine.migration.attach_vmm(engine.vmm)
    await engine.source.switch_over({"pc.ram": [(0, engine.guest.length)]})
    await engine.reach(State.RUNNING)
    await engine.source.postcopy("pc.ram", image(4), range(0, 4 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)


@pytest.mark.parametrize("first_byte", [b"Q", b"\x08", b"\x11", b"\x16"])
async def test_another_stream_is_refused_and_the_migration_does_not_mind(
    make_engine: MakeEngine, connect: Connect, first_byte: bytes
) -> None:
    engine = make_engine(pages=4)
    engine.attach()
    await engine.source.advise()
    await engine.source.wait_for_pong(1)
    stranger = connect(engine)
    await stranger.send(first_byte)
    assert await stranger.closed()
    refused = await engine.told(events.ConnectionRefused)
    assert refused.reason == "migration 'vm0' already has a source: the test"
    channel = connect(engine)
    await engine.source.switch_over({"pc.ram": [(0, engine.guest.length)]})
    await engine.reach(State.RUNNING)
    content = image(4)
    await channel.pages(content, range(0, 4 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)


async def test_silent_connections_keep_nobody_out_and_are_closed_in_the_end(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(pages=4)
    engine.attach()
    silent = [connect(engine) for _ in range(3)]
    channel = connect(engine)
    one_too_many = connect(engine)
    assert await one_too_many.closed()
    silent.pop().connection.close()
    await switch_over(engine)
    content = image(4)
    await channel.pages(content, range(0, 4 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    engine.source.close()
    for connection in silent:
        assert await connection.closed()


async def test_who_stays_silent_does_not_hold_up_the_end_when_all_is_here(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(Settings(break_after=3600), pages=4)
    engine.attach()
    silent = connect(engine)
    await switch_over(engine)
    touch = engine.guest.touch(3)
    await engine.source.wait_for_request()
    await engine.source.postcopy("pc.ram", image(4), range(0, 4 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await asyncio.to_thread(touch.result) == image(4)[3 * PAGE :]
    engine.source.close()
    assert await silent.closed()


async def test_what_who_stays_silent_may_have_is_asked_for_again_and_not_taken_for_zeros(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(Settings(break_after=2), pages=4)
    content = image(4)
    engine.attach()
    silent = connect(engine)
    await switch_over(engine)
    await engine.source.postcopy("pc.ram", content, range(0, 3 * PAGE, PAGE))
    touch = engine.guest.touch(3)  # it may be on its way on the other connection
    await engine.source.wait_for_request()
    await engine.source.end()
    await engine.reach(State.PAUSED)
    assert engine.migration.failure == (
        "a connection that may have been the preempt channel has said nothing for 2 s after the "
        "end of the stream while pages are waited for"
    )
    assert await silent.closed()
    await come_back_with_everything(engine, content)
    assert await asyncio.to_thread(touch.result) == content[3 * PAGE :]
    assert engine.migration.report().never_sent == 0


async def test_a_stranger_that_stays_silent_again_does_not_keep_a_source_that_answers_paused(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(Settings(break_after=2), pages=4)
    content = image(4)
    engine.attach()
    connect(engine)
    await switch_over(engine)
    touch = engine.guest.touch(3)
    await engine.source.wait_for_request()
    await engine.source.end()
    await engine.reach(State.PAUSED)
    source = Source(engine.connect_again(), engine.source.blocks)
    connect(engine)
    await bring_everything(source, content)
    assert await asyncio.to_thread(touch.result) == content[3 * PAGE :]


async def test_a_stranger_says_nothing_of_a_preempt_channel_that_has_ended(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(Settings(break_after=3600), pages=4)
    engine.attach()
    channel = connect(engine)
    silent = connect(engine)
    await switch_over(engine)
    await engine.source.postcopy("pc.ram", image(4), range(0, 3 * PAGE, PAGE))
    touch = engine.guest.touch(3)  # which the source never sends: it is zero there
    await engine.source.wait_for_request()
    await channel.send(END)
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await asyncio.to_thread(touch.result) == bytes(PAGE)
    engine.source.close()
    assert await silent.closed()


async def test_a_page_that_was_lost_with_a_channel_that_had_said_nothing_is_not_taken_for_zeros(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(pages=4)
    content = image(4)
    engine.attach()
    silent = connect(engine)
    await switch_over(engine)
    touch = engine.guest.touch(3)
    await engine.source.wait_for_request()
    silent.connection.close()  # with the page, if it broke on its way
    await engine.reach(State.PAUSED)
    assert "may have been the preempt channel has gone" in (engine.migration.failure or "")
    await come_back_with_everything(engine, content)
    assert await asyncio.to_thread(touch.result) == content[3 * PAGE :]


async def test_a_page_that_was_lost_so_and_asked_for_later_is_not_taken_for_zeros(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(pages=4)
    content = image(4)
    engine.attach()
    silent = connect(engine)
    await switch_over(engine)
    silent.connection.close()
    await engine.source.postcopy("pc.ram", content, [0])
    touch = engine.guest.touch(3)
    await engine.source.wait_for_request()
    await engine.source.postcopy("pc.ram", content, [PAGE, 2 * PAGE])
    await engine.source.end()
    await engine.reach(State.PAUSED)
    await come_back_with_everything(engine, content)
    assert await asyncio.to_thread(touch.result) == content[3 * PAGE :]


async def test_who_leaves_without_a_word_does_not_matter_when_all_is_here(
    make_engine: MakeEngine, connect: Connect
) -> None:
    engine = make_engine(pages=4)
    engine.attach()
    silent = connect(engine)
    await switch_over(engine)
    silent.connection.close()
    await engine.source.postcopy("pc.ram", image(4), range(0, 4 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)


async def test_a_channel_from_another_host_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=4)
    engine.use_no_stream()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs = socket.create_connection(listener.getsockname(), source_address=("127.0.0.2", 0))
        engine.migration.attach_stream(listener.accept()[0], "127.0.0.1:1")
        engine.migration.attach_stream(listener.accept()[0], "127.0.0.2:1")
    theirs.settimeout(LIMIT)
    assert await asyncio.to_thread(theirs.recv, 1) == b""
    await engine.told(events.ConnectionRefused)
    ours.close()
    theirs.close()
