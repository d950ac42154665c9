"""Requests to end a migration, and those who do not wait for what comes of them."""

from __future__ import annotations

import asyncio

import pytest

from postcopyd.incoming.cancelling import Cancelling
from postcopyd.incoming.recipient import Refused
from tests.support import LIMIT


@pytest.mark.parametrize("refused", [False, True])
async def test_who_does_not_wait_any_more_is_in_nobody_elses_way(refused: bool) -> None:
    carried_out = []

    def cancel(reason: str, force: bool) -> None:
        carried_out.append((reason, force))
        if refused:
            raise Refused("too late")

    cancelling = Cancelling(asyncio.get_running_loop(), cancel)
    cancelling.ask("first", False).cancel()
    other = cancelling.ask("second", True)
    async with asyncio.timeout(LIMIT):
        await asyncio.wait([other])
    assert carried_out == [("first", False), ("second", True)]
    assert isinstance(other.exception(), Refused) is refused
    cancelling.close()


async def test_the_end_is_told_to_all_who_still_wait_for_it() -> None:
    cancelling = Cancelling(asyncio.get_running_loop(), lambda reason, force: None)
    cancelling.ask("first", False).cancel()
    other = cancelling.ask("second", False)
    cancelling.close()
    assert other.done() and other.exception() is None
