"""The front's way to the other workers, where one of them does not take what is for it."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import ExitStack

import pytest

from postcopyd.daemon import exchange
from postcopyd.daemon.channel import Passed, There
from postcopyd.daemon.exchange import Exchange
from postcopyd.daemon.registry_error import RegistryError
from postcopyd.vmm.first_message import FirstMessage
from tests.daemon.hosted import closed
from tests.support import LIMIT


class OtherWorker:
    """Has every migration, and loses what is passed on to it."""

    async def where(self, name: str | None) -> There:
        return There(0, worker=1, owner=1, ready={0: 0, 1: 1}, waiting=(), number_waiting=0)

    def pass_on(self, worker: int, what: Passed, connection: socket.socket) -> None:
        assert worker == 1


async def test_a_vmm_whose_worker_dies_before_it_has_all_of_the_message_is_closed() -> None:
    vmm, connection = socket.socketpair()
    reading, writing = os.pipe()
    message = FirstMessage(connection)
    message.received += b" " * (1 << 20)  # more than a socket takes
    message.descriptors.append(writing)
    with vmm, ExitStack() as meanwhile:
        async with asyncio.timeout(LIMIT):
            assert await Exchange(OtherWorker(), 0, 2).pass_on("a", message, meanwhile)
        await closed(vmm)
        assert os.read(reading, 1) == b""  # nobody has its descriptors
    os.close(reading)


async def test_a_worker_that_takes_no_request_is_not_asked_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange, "_SUCCESSION", 0.1)
    async with asyncio.timeout(LIMIT):
        with pytest.raises(RegistryError, match="worker 1 takes no request") as refused:
            await Exchange(OtherWorker(), 0, 2).lists()
    assert refused.value.code == "unavailable"
