"""A preempt channel, and the migration that it belongs to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from postcopyd.incoming.states import State
from postcopyd.wire import stream_writer
from postcopyd.wire.return_path import ReceivedBitmap, Shut
from postcopyd.wire.stream_format import EOS
from tests.incoming.engine import Engine, Source
from tests.incoming.guest import LIMIT, PAGE

MakeEngine = Callable[..., Engine]
END = stream_writer.page_word(0, EOS)


class Channel:
    """The source's end of a preempt channel."""

    def __init__(self, engine: Engine) -> None:
        self.connection = engine.connect_again()
        self._writer = stream_writer.StreamWriter(0)
        self.sent = 0

    async def send(self, *parts: bytes) -> None:
        self.sent += sum(map(len, parts))
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


async def all_is_received(engine: Engine, *senders: Source | Channel) -> None:
    """Return when nothing is on its way any more."""
    async with asyncio.timeout(LIMIT):
        while engine.migration.report().bytes_received < sum(it.sent for it in senders):
            await asyncio.sleep(0)


async def come_back_with_everything(engine: Engine, content: bytes) -> None:
    await bring_everything(Source(engine.connect_again(), engine.source.blocks), content)


async def bring_everything(source: Source, content: bytes) -> None:
    await source.send(stream_writer.received_bitmap_request("pc.ram"))
    await source.wait_for(lambda message: isinstance(message, ReceivedBitmap))
    await source.send(stream_writer.postcopy_resume())
    await source.postcopy("pc.ram", content, range(0, len(content), PAGE))
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
