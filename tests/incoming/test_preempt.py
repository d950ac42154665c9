"""The preempt channel: urgent pages on a connection of their own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.states import State
from postcopyd.wire import stream_writer
from postcopyd.wire.return_path import Shut
from postcopyd.wire.stream_format import EOS
from tests.incoming.engine import Engine, image
from tests.incoming.guest import HUGE, LIMIT, PAGE

MakeEngine = Callable[..., Engine]
END = stream_writer.page_word(0, EOS)


class Channel:
    """The source's end of a preempt channel."""

    def __init__(self, engine: Engine) -> None:
        self.connection = engine.connect_again()
        self._writer = stream_writer.StreamWriter(0)

    async def send(self, *parts: bytes) -> None:
        async with asyncio.timeout(LIMIT):
            await asyncio.get_running_loop().sock_sendall(self.connection, b"".join(parts))

    async def pages(self, content: bytes, offsets: list[int] | range) -> None:
        for offset in offsets:
            payload = content[offset : offset + PAGE]
            if any(payload):
                await self.send(self._writer.page("pc.ram", offset), payload)
            else:
                await self.send(self._writer.zero_page("pc.ram", offset))

    async def closed(self) -> bool:
        """True when the destination has closed it, with nothing said."""
        async with asyncio.timeout(LIMIT):
            try:
                return not await asyncio.get_running_loop().sock_recv(self.connection, 1)
            except ConnectionResetError:  # what we had said was not read
                return True


@pytest.fixture
async def connect() -> AsyncIterator[Callable[[Engine], Channel]]:
    made: list[Channel] = []

    def connect(engine: Engine) -> Channel:
        made.append(Channel(engine))
        return made[-1]

    yield connect
    for channel in made:
        channel.connection.close()


Connect = Callable[[Engine], Channel]


async def switch_over(engine: Engine) -> None:
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, engine.guest.length)]})
    await engine.reach(State.RUNNING)


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


@pytest.mark.parametrize("first_byte", [b"Q", b"\x08", b"\x11", b"\x16"])
async def test_another_stream_is_refused_and_the_migration_does_not_mind(
    make_engine: MakeEngine, connect: Connect, first_byte: bytes
) -> None:
    engine = make_engine(pages=4)
    engine.attach()
    stranger = connect(engine)
    await stranger.send(first_byte)
    assert await stranger.closed()
    refused = await engine.told(events.ConnectionRefused)
    assert refused.reason == "migration 'vm0' already has a source: the test"
    channel = connect(engine)
    await switch_over(engine)
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


async def test_a_channel_without_its_stream_is_named(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=4)
    engine.attach()
    await engine.source.send(stream_writer.StreamWriter(0).page("pc.ram", 0), bytes(PAGE))
    await engine.finish()
    assert engine.migration.state is State.FAILED
    assert engine.migration.failure is not None
    assert "preempt channel" in engine.migration.failure


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
