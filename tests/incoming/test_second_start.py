"""A source in doubt whether its package has arrived: one guest runs, whatever it tries."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from postcopyd.incoming import events
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from postcopyd.wire import stream_writer
from postcopyd.wire.return_path import Shut
from tests.incoming.engine import MACHINE, Engine, Source, image
from tests.incoming.guest import LIMIT, PAGE

MakeEngine = Callable[..., Engine]
PAGES = 8
CONTENT = image(PAGES)


async def is_closed(connection: socket.socket) -> bool:
    """See the destination close a connection on which it has said nothing."""
    try:
        async with asyncio.timeout(LIMIT):
            return not await asyncio.get_running_loop().sock_recv(connection, 1)
    except ConnectionResetError:
        return True


async def begins_anew(engine: Engine) -> bool:
    """Begin anew on another connection; False if it is closed and not answered."""
    connection = engine.connect_again()
    await Source(connection, engine.source.blocks).send(
        stream_writer.configuration(MACHINE),
        stream_writer.open_return_path(),
        stream_writer.ping(1),
    )
    return not await is_closed(connection)


async def with_package(engine: Engine) -> None:
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.source.wait_for_pong(4)


async def finish(engine: Engine, source: Source) -> None:
    await source.postcopy("pc.ram", CONTENT, range(0, PAGES * PAGE, PAGE))
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
    assert await engine.guest.content() == CONTENT


async def test_a_migration_that_has_not_begun_refuses_to_be_resumed_and_still_waits(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    engine.migration.attach_vmm(engine.vmm)
    for _ in range(3):
        early = engine.connect_again()
        await Source(early, engine.source.blocks).send(
            stream_writer.received_bitmap_request("pc.ram")
        )
        assert await is_closed(early)
    refused = await engine.told(events.ConnectionRefused)
    assert "migration 'vm0' has not begun" in refused.reason
    assert engine.migration.state is State.NONE
    engine.attach_stream()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await finish(engine, engine.source)


async def test_a_new_start_is_refused_while_the_guest_is_being_loaded_and_while_it_runs(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    engine.vmm.may_load.clear()
    await with_package(engine)
    assert engine.migration.state is State.LISTENING
    assert not await begins_anew(engine)
    engine.vmm.may_load.set()
    await engine.reach(State.RUNNING)
    assert not await begins_anew(engine)
    await finish(engine, engine.source)


async def test_a_new_start_is_refused_while_it_is_paused_and_while_it_is_being_resumed(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    await with_package(engine)
    await engine.reach(State.RUNNING)
    engine.source.connection.close()
    await engine.reach(State.PAUSED)
    for _ in range(3):
        assert not await begins_anew(engine)
        assert engine.migration.state is State.PAUSED
    source = Source(engine.connect_again(), engine.source.blocks)
    await source.send(stream_writer.received_bitmap_request("pc.ram"))
    await engine.reach(State.RECOVER)
    assert not await begins_anew(engine)
    await source.send(stream_writer.postcopy_resume())
    await finish(engine, source)
    assert engine.vmm.told.count("run") == 1


async def test_a_new_start_is_refused_while_it_waits_for_another_vmm(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    engine.vmm.refuses_to_load = True
    await with_package(engine)
    await engine.reach(State.PAUSED)
    assert engine.migration.waits_for_vmm
    for _ in range(3):
        assert not await begins_anew(engine)
        engine.source.connection.close()
    assert engine.migration.waits_for_vmm


async def test_a_source_that_comes_back_to_a_guest_that_is_complete_is_told_so(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(Settings(close_timeout=LIMIT), pages=PAGES)
    engine.vmm.may_load.clear()
    await with_package(engine)
    await engine.source.postcopy("pc.ram", CONTENT, range(0, PAGES * PAGE, PAGE))
    await engine.source.end()
    async with asyncio.timeout(LIMIT):
        while engine.migration.report().bytes_received < engine.source.sent:
            await asyncio.sleep(0)
    engine.source.connection.close()
    # One that is back before it is complete, has gone again, and is back once more.
    early = Source(engine.connect_again(), engine.source.blocks)
    await early.send(stream_writer.received_bitmap_request("pc.ram"))
    engine.vmm.may_load.set()
    assert await early.wait_for_shut() == Shut(0)
    late = Source(engine.connect_again(), engine.source.blocks)
    await late.send(stream_writer.received_bitmap_request("pc.ram"))
    assert await late.wait_for_shut() == Shut(0)
    assert not await begins_anew(engine)
    early.close()
    late.close()
    await engine.finish()
    assert await engine.guest.content() == CONTENT
