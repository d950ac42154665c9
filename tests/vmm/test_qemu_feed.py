"""What a QEMU is fed, and when."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

import pytest

from postcopyd.incoming.vmm import DeviceLoad
from postcopyd.vmm.qemu_feed import Feed, FeedRefused
from postcopyd.vmm.qemu_monitor import MonitorFailure
from postcopyd.wire.feed import FEED_END
from postcopyd.wire.return_path import ReturnPathWriter
from tests.support import LIMIT

STATE = b"the device sections"


class Monitor:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def execute(self, *_: object, within: float) -> None:
        await self.answer


async def fed(connection: socket.socket, end: bytes) -> bytes:
    """What comes until `end` has come."""
    data = b""
    async with asyncio.timeout(LIMIT):
        while end not in data:
            data += await asyncio.get_running_loop().sock_recv(connection, 65536)
    return data


@pytest.mark.parametrize("answers", [True, False], ids=["it begins", "it does not answer in time"])
async def test_a_qemu_is_given_the_end_only_when_it_has_begun(answers: bool) -> None:
    """One that has not answered in time may begin all the same, and must not run then."""
    given = asyncio.Event()
    collected = asyncio.Event()
    collected.set()
    load = DeviceLoad(b"", STATE, (), collected, print, given.set)
    monitor = Monitor()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        feed = Feed(cast(Any, monitor), ours, LIMIT)
        feeding = asyncio.create_task(feed.load(load, keep_process=True))
        assert FEED_END not in await fed(theirs, STATE)
        assert not given.is_set()
        if answers:
            monitor.answer.set_result(None)
            await fed(theirs, FEED_END)
            assert given.is_set()
            theirs.send(ReturnPathWriter().shut(0))
            await asyncio.wait_for(feeding, LIMIT)
        else:
            monitor.answer.set_exception(MonitorFailure("it has not answered"))
            with pytest.raises(FeedRefused, match="it has not answered"):
                await asyncio.wait_for(feeding, LIMIT)
            with pytest.raises(BlockingIOError):
                theirs.recv(4096)
            assert not given.is_set()
