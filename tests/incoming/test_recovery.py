"""A stream that breaks after the package, and a source that comes back."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from postcopyd.kernel.memory import Mapping
from postcopyd.kernel.userfaultfd import Operation, RegisterMode
from postcopyd.wire import stream_writer
from postcopyd.wire.return_path import PageRequest, ReceivedBitmap, ResumeAck, Shut
from tests.incoming.engine import Engine, Source, image
from tests.incoming.guest import LIMIT, PAGE, Touch
from tests.support import wait_until

pytestmark = pytest.mark.usefixtures("every_connection")

MakeEngine = Callable[..., Engine]
PAGES = 16
CONTENT = image(PAGES)


async def broken(engine: Engine, here: range = range(4), pages: int = PAGES) -> None:
    """A guest runs with some of its memory, and its stream breaks."""
    content = CONTENT if pages == PAGES else image(pages)
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, pages * PAGE)]})
    await engine.reach(State.RUNNING)
    await engine.source.postcopy("pc.ram", content, [page * PAGE for page in here])
    await seen(engine.source)
    engine.source.connection.close()
    await engine.reach(State.PAUSED)


async def seen(source: Source) -> None:
    """Return when all that the source has sent has been acted on."""
    await source.send(stream_writer.ping(9))
    await source.wait_for_pong(9)
    source.messages.clear()


def come_back(engine: Engine) -> Source:
    """The source's end of a new connection."""
    return Source(engine.connect_again(), engine.source.blocks)


async def ask_what_is_here(source: Source) -> set[int]:
    """Ask for the received bitmap; return the pages in it."""
    await source.send(stream_writer.received_bitmap_request("pc.ram"))
    answer = await source.wait_for(lambda message: isinstance(message, ReceivedBitmap))
    assert isinstance(answer, ReceivedBitmap)
    bits = int.from_bytes(answer.bitmap, "little")
    return {page for page in range(PAGES) if bits >> page & 1}


async def go_on(source: Source) -> None:
    await source.send(stream_writer.postcopy_resume())
    await source.wait_for(lambda message: isinstance(message, ResumeAck))


async def send_the_rest(engine: Engine, source: Source, here: set[int]) -> None:
    rest = [page * PAGE for page in range(PAGES) if page not in here]
    await source.postcopy("pc.ram", CONTENT, rest)
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
    assert await engine.guest.content() == CONTENT


async def test_a_source_that_comes_back_learns_what_is_here_and_sends_the_rest(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    await broken(engine)
    source = come_back(engine)
    here = await ask_what_is_here(source)
    assert here == set(range(4))
    await go_on(source)
    assert engine.migration.state is State.RUNNING
    assert engine.migration.report().failure is None
    await send_the_rest(engine, source, here)


@pytest.mark.parametrize("how", ["its connection", "its path"])
async def test_a_package_that_has_come_is_not_lost_with_what_it_came_on(
    make_engine: MakeEngine, how: str
) -> None:
    """The source has sent it, and may not be able to do so again."""
    engine = make_engine(pages=PAGES)
    engine.vmm.may_discard.clear()
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.ADVISE)
    await asyncio.to_thread(wait_until, lambda: "discard" in engine.vmm.told)
    # Now its package waits for the VMM, behind a PING that cannot be answered any more.
    if how == "its connection":
        engine.source.connection.close()
    else:
        engine.migration.path_lost("link eth0 was removed", for_good=True)
    engine.vmm.may_discard.set()
    await engine.reach(State.PAUSED)
    assert engine.migration.package is not None
    source = come_back(engine)
    assert await ask_what_is_here(source) == set()
    await go_on(source)
    await send_the_rest(engine, source, set())


@pytest.mark.parametrize("when", ["before the break", "while it is paused"])
async def test_what_is_waited_for_is_asked_again(make_engine: MakeEngine, when: str) -> None:
    engine = make_engine(pages=PAGES)
    if when == "before the break":
        engine.attach()
        await engine.source.advise()
        await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
        await engine.reach(State.RUNNING)
        touch = engine.guest.touch(9)
        await engine.source.wait_for_request()
        engine.source.connection.close()
        await engine.reach(State.PAUSED)
    else:
        await broken(engine)
        touch = engine.guest.touch(9)
        await asyncio.to_thread(wait_until, lambda: engine.migration.report().outstanding)
    source = come_back(engine)
    here = await ask_what_is_here(source)
    await go_on(source)
    assert await source.wait_for_request() == PageRequest("pc.ram", 9 * PAGE, PAGE)
    await source.postcopy("pc.ram", CONTENT, [9 * PAGE])
    assert await asyncio.to_thread(touch.result) == CONTENT[9 * PAGE : 10 * PAGE]
    await send_the_rest(engine, source, here | {9})
    assert (await engine.told(events.Resumed)).outstanding == 1


async def test_it_may_break_again_and_again_also_while_it_is_being_resumed(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    await broken(engine)
    for page in range(4, 8):
        asked = come_back(engine)
        await ask_what_is_here(asked)
        asked.connection.close()
        await engine.reach(State.PAUSED)
        source = come_back(engine)
        assert await ask_what_is_here(source) == set(range(page))
        await go_on(source)
        await source.postcopy("pc.ram", CONTENT, [page * PAGE])
        await seen(source)
        source.connection.close()
        await engine.reach(State.PAUSED)
    source = come_back(engine)
    here = await ask_what_is_here(source)
    await go_on(source)
    await send_the_rest(engine, source, here)


async def test_a_fault_outside_every_block_breaks_the_stream_and_faults_are_served_again(
    make_engine: MakeEngine,
) -> None:
    """The VMM watches more memory than it has handed over."""
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.RUNNING)
    with Mapping.anonymous(PAGE) as more:
        watch = engine.guest.userfaultfd
        watch.register(more.address, PAGE, RegisterMode.MISSING, Operation.COPY)
        outside = Touch(more.address, PAGE)
        await engine.reach(State.PAUSED)
        assert "outside every block" in (engine.migration.failure or "")
        watch.unregister(more.address, PAGE)
        outside.result()
    inside = engine.guest.touch(9)
    source = come_back(engine)
    assert await ask_what_is_here(source) == set()
    await go_on(source)
    assert await source.wait_for_request() == PageRequest("pc.ram", 9 * PAGE, PAGE)
    await send_the_rest(engine, source, set())
    assert inside.result() == CONTENT[9 * PAGE : 10 * PAGE]


async def test_half_a_page_of_the_broken_stream_is_not_in_the_bitmap(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.RUNNING)
    part = engine.source.writer.ram_part() + engine.source.pages("pc.ram", CONTENT, [0, PAGE])
    await seen(engine.source)
    await engine.source.send(part[: -PAGE // 2])
    engine.source.connection.close()
    await engine.reach(State.PAUSED)
    source = come_back(engine)
    here = await ask_what_is_here(source)
    assert here == {0}
    await go_on(source)
    await send_the_rest(engine, source, here)


async def test_a_source_that_is_back_before_its_break_is_noticed_waits_its_turn(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.RUNNING)
    source = come_back(engine)
    await source.send(stream_writer.received_bitmap_request("pc.ram"))
    await engine.source.postcopy("pc.ram", CONTENT, [0])  # the old one goes on meanwhile
    await seen(engine.source)
    assert engine.migration.state is State.RUNNING
    engine.source.connection.close()
    await source.wait_for(lambda message: isinstance(message, ReceivedBitmap))
    await go_on(source)
    await send_the_rest(engine, source, {0})


async def test_who_connects_to_a_paused_migration_and_says_nothing_is_dropped(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(Settings(first_byte_timeout=0.2), pages=PAGES)
    await broken(engine)
    silent = engine.connect_again()
    silent.setblocking(False)
    async with asyncio.timeout(LIMIT):
        assert await asyncio.get_running_loop().sock_recv(silent, 1) == b""
    silent.close()
    source = come_back(engine)
    here = await ask_what_is_here(source)
    await go_on(source)
    await send_the_rest(engine, source, here)


async def test_a_source_that_asks_twice_what_is_here_of_one_block_is_wrong(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    await broken(engine)
    source = come_back(engine)
    here = await ask_what_is_here(source)
    await source.send(stream_writer.received_bitmap_request("pc.ram"))
    await engine.reach(State.PAUSED)
    assert engine.migration.failure == "it asks twice what is here of block 'pc.ram'"
    source = come_back(engine)
    assert await ask_what_is_here(source) == here
    await go_on(source)
    await send_the_rest(engine, source, here)


async def test_a_new_stream_is_no_way_to_resume(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=PAGES)
    await broken(engine)
    wrong = come_back(engine)
    await wrong.send(stream_writer.configuration("pc-q35-7.2"))
    async with asyncio.timeout(LIMIT):
        assert await received(wrong.connection) == b""
    assert engine.migration.state is State.PAUSED
    failure = engine.migration.report().failure
    assert failure is not None
    assert "a resumed migration begins with a command" in failure
    source = come_back(engine)
    here = await ask_what_is_here(source)
    await go_on(source)
    await send_the_rest(engine, source, here)


async def received(connection: socket.socket) -> bytes:
    """What comes next; nothing when it was closed, with a reset or without."""
    try:
        return await asyncio.get_running_loop().sock_recv(connection, 1)
    except ConnectionResetError:
        return b""
