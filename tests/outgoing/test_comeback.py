"""How long it is tried to come back."""

from __future__ import annotations

import asyncio
import random
import socket
import time

import pytest

from postcopyd.outgoing import comeback
from postcopyd.outgoing.comeback import Comeback
from postcopyd.outgoing.connecting import NobodyListens
from postcopyd.outgoing.connection import ConnectionLost
from postcopyd.outgoing.report import Account, Phase
from postcopyd.outgoing.standing import Standing
from postcopyd.outgoing.tls import NotTrusted

ALL_SENT = Standing(True, True, True, all_sent=True)
PACKAGE_SENT = Standing(True, True, True)
STOPPED = Standing(guest_stopped=True)


class Tries:
    """What each try to connect meets: an error, or a connection."""

    def __init__(self, *meets: ConnectionLost | None) -> None:
        self.meets = list(meets)
        self.number = 0

    async def __call__(self) -> socket.socket:
        self.number += 1
        error = self.meets[min(self.number, len(self.meets)) - 1]
        if error is not None:
            raise error
        return socket.socket()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a minute pass in no time."""
    monkeypatch.setattr(comeback, "_SECONDS", 0.2)


class Outages:
    """The outages of one migration."""

    def __init__(
        self, tries: Tries, standing: Standing | None = None, retry_for: float | None = None
    ) -> None:
        self.account = Account(time.monotonic)
        self.account.enter(Phase.POSTCOPY)
        self._comeback = Comeback(
            tries,
            None,
            retry_for,
            random.Random(1),
            standing or Standing(),
            self.account,
            self.account.enter,
        )

    async def end(self, lasted: float = 0.0, progressed: bool = False) -> None:
        (await self._comeback.connection("it broke", lasted, progressed)).close()


DOWN = ConnectionLost("the network is down")
NOBODY = NobodyListens("nobody listens")
STRANGER = NotTrusted("its certificate is another")


async def test_who_does_not_believe_us_before_the_package_is_not_tried_again() -> None:
    tries = Tries(DOWN, STRANGER, None)
    with pytest.raises(ConnectionLost, match="it broke; no way back: its certificate is another"):
        await Outages(tries).end()
    assert tries.number == 2


async def test_who_does_not_believe_us_is_tried_again_when_the_guest_may_be_there() -> None:
    tries = Tries(STRANGER, STRANGER, None)
    outages = Outages(tries, PACKAGE_SENT)
    await outages.end()
    assert outages.account.report().broken == "its certificate is another"


async def test_it_is_tried_until_there_is_a_connection_and_the_report_follows() -> None:
    tries = Tries(DOWN, DOWN, None)
    outages = Outages(tries)
    await outages.end()
    report = outages.account.report()
    assert tries.number == 3
    assert report.phase is Phase.RECONNECTING
    assert report.reconnects == 1
    assert report.broken == "the network is down"
    assert report.retry_seconds is None
    assert outages.account.broken_in is Phase.POSTCOPY


@pytest.mark.parametrize("standing", [Standing(), STOPPED, ALL_SENT])
async def test_it_ends_where_that_does_not_lose_the_guest(standing: Standing) -> None:
    with pytest.raises(
        ConnectionLost, match=r"^it broke; no way back in \d+\.\d s: nobody listens$"
    ):
        await Outages(Tries(NOBODY), standing).end()


@pytest.mark.parametrize("standing", [PACKAGE_SENT, ALL_SENT])
async def test_it_does_not_end_where_giving_up_would_lose_the_guest(standing: Standing) -> None:
    began = time.monotonic()
    error = DOWN if standing.all_sent else NOBODY
    outages = Outages(Tries(*[error] * 4, None), standing)
    while time.monotonic() - began < 0.5:
        await outages.end()


async def test_who_may_be_complete_has_to_be_gone_all_the_time() -> None:
    class Alternating(Tries):
        async def __call__(self) -> socket.socket:
            self.number += 1
            if time.monotonic() - began > 0.6:
                return socket.socket()
            raise NOBODY if self.number % 2 else DOWN

    began = time.monotonic()
    await Outages(Alternating(), ALL_SENT).end()


@pytest.mark.parametrize("standing", [Standing(), PACKAGE_SENT, ALL_SENT])
async def test_who_says_how_long_is_obeyed(standing: Standing) -> None:
    began = time.monotonic()
    with pytest.raises(ConnectionLost, match="no way back"):
        await Outages(Tries(DOWN), standing, 0.05).end()
    assert 0.05 <= time.monotonic() - began < 5


async def test_nothing_is_tried_if_it_is_not_to_be() -> None:
    tries = Tries(None)
    with pytest.raises(ConnectionLost, match=r"^it broke$"):
        await Outages(tries, PACKAGE_SENT, 0.0).end()
    assert tries.number == 0


@pytest.mark.parametrize(
    ("standing", "lasted", "progressed", "again"),
    [
        (Standing(), 0.0, False, False),
        (Standing(), 0.0, True, True),
        (Standing(), 5.0, False, True),
        (STOPPED, 5.0, False, False),
        (STOPPED, 5.0, True, True),
        (PACKAGE_SENT, 5.0, False, True),
    ],
)
async def test_what_begins_another_outage_with_all_its_time(
    standing: Standing, lasted: float, progressed: bool, again: bool
) -> None:
    outages = Outages(Tries(None), standing, 0.2)
    await outages.end()
    await asyncio.sleep(0.25)
    if again:
        await outages.end(lasted, progressed)
    else:
        with pytest.raises(ConnectionLost):
            await outages.end(lasted, progressed)
