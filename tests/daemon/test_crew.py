"""The supervisor's side of the workers: what they are told, and who is replaced."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable

import pytest

from postcopyd.daemon import channel, crew
from postcopyd.daemon.channel import Channel
from postcopyd.daemon.crew import Crew
from postcopyd.daemon.worker_process import WorkerProcess
from tests.support import LIMIT, belongings

MANY = 2000
"""Messages, far more than a channel takes whose other end does not read."""


class StandIn:
    """A process that does nothing until the test has its channel read."""

    pid = 0

    def __init__(self) -> None:
        self.killed = False
        ours, theirs = Channel.pair()
        self.channel = Channel(theirs)
        self.heard: list[channel.Message] = []
        self.worker = WorkerProcess(self, Channel(ours))

    def poll(self) -> int | None:
        return -9 if self.killed else None

    def wait(self) -> int:
        return -9

    def kill(self) -> None:
        self.killed = True

    def read(self) -> None:
        for message, descriptor in self.channel.received():
            self.heard.append(message)
            if descriptor is not None:
                os.close(descriptor)

    async def hear(self, predicate: Callable[[channel.Message], bool]) -> None:
        """Read until something has come for which `predicate` holds."""
        async with asyncio.timeout(LIMIT):
            while not any(map(predicate, self.heard)):
                self.read()
                await asyncio.sleep(0)


class EmployerStandIn:
    def __init__(self) -> None:
        self.crew = Crew(1, self)
        self.process = StandIn()
        self.at_first: list[tuple[channel.Message, int | None]] = []
        self.taken: list[channel.Message] = []
        self.cannot_take: channel.Message | None = None

    def begin(self, number: int, worker: WorkerProcess) -> None:
        for message, descriptor in self.at_first:
            self.crew.tell(number, message, descriptor)

    def take(self, number: int, message: channel.Message, descriptor: int | None) -> None:
        if message == self.cannot_take:
            raise OSError
        self.taken.append(message)

    def died(self, number: int) -> bool:
        return True


@pytest.fixture
async def employer() -> AsyncIterator[EmployerStandIn]:
    before = belongings()
    employer = EmployerStandIn()
    yield employer
    employer.crew.close()
    employer.process.channel.close()
    assert belongings() == before


async def test_what_a_worker_does_not_read_at_once_it_reads_later_in_order(
    employer: EmployerStandIn,
) -> None:
    employer.crew.start([employer.process.worker], ())
    said: list[channel.Message] = [channel.Forget(f"vm{number}") for number in range(MANY)]
    said.append(channel.Stop())
    for message in said:
        assert employer.crew.tell(0, message)
    await employer.process.hear(lambda message: message == channel.Stop())
    assert employer.process.heard == said


async def test_a_successor_that_does_not_read_at_once_gets_all_that_is_held(
    employer: EmployerStandIn,
) -> None:
    reading, writing = os.pipe()
    held: list[channel.Message] = [channel.Held("vm0", f"file-{number}") for number in range(MANY)]
    employer.at_first = [(message, reading) for message in held]
    employer.crew.start([employer.process.worker], ())
    assert not employer.process.killed
    await employer.process.hear(lambda message: message == held[-1])
    assert employer.process.heard == held
    os.close(reading)
    os.close(writing)


async def test_a_worker_is_over_with_the_first_thing_that_could_not_be_held(
    employer: EmployerStandIn,
) -> None:
    employer.crew.start([employer.process.worker], ())
    employer.cannot_take = channel.Settle()
    for message in (channel.Ready(), channel.Settle(), channel.Forgotten("vm0")):
        employer.process.channel.send(message)
    async with asyncio.timeout(LIMIT):
        while not employer.process.killed:
            await asyncio.sleep(0)
    assert employer.taken == [channel.Ready()]


async def test_a_worker_that_is_silent_for_long_is_killed(
    employer: EmployerStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "_SILENCE", 0.4)
    employer.crew.start([employer.process.worker], ())
    async with asyncio.timeout(LIMIT):
        while not employer.process.killed:
            await asyncio.sleep(0)


async def test_a_worker_is_not_blamed_for_the_time_in_which_we_stood_still_ourselves(
    employer: EmployerStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "_SILENCE", 0.4)
    employer.crew.start([employer.process.worker], ())
    time.sleep(1)  # as if all of us had been frozen
    for _ in range(3):
        await asyncio.sleep(0)
    assert not employer.process.killed


async def test_a_connection_does_not_wait_for_a_worker_that_does_not_read(
    employer: EmployerStandIn,
) -> None:
    employer.crew.start([employer.process.worker], ())
    for number in range(MANY):
        employer.crew.tell(0, channel.Forget(f"vm{number}"))
    reading, writing = os.pipe()
    employer.crew.tell(0, channel.Handed("request"), writing, at_once=True)
    employer.crew.tell(0, channel.Stop())
    os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)
    await employer.process.hear(lambda message: message == channel.Stop())
    assert channel.Handed("request") not in employer.process.heard
