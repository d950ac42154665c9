"""Fixtures of the engine's tests."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncIterator, Callable

import pytest

from postcopyd.incoming.ending import ListMissing, list_nowhere
from postcopyd.incoming.estate import Keeper
from postcopyd.incoming.settings import Settings
from tests.incoming.engine import Engine
from tests.incoming.guest import LIMIT, Guest
from tests.incoming.read_ahead import ReadAhead


@pytest.fixture(params=[None, ReadAhead], ids=["socket", "read ahead"])
def every_connection(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the engines of a test read sockets, and once more connections as TLS makes them."""
    monkeypatch.setattr(Engine, "connection", request.param)


@pytest.fixture
async def make_engine() -> AsyncIterator[Callable[..., Engine]]:
    """Make engines; at the end each must have let go of every descriptor."""
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    made: list[Engine] = []

    def make(
        settings: Settings | None = None,
        keeper: Keeper | None = None,
        list_missing: ListMissing = list_nowhere,
        **guest: object,
    ) -> Engine:
        own = Guest(register=False, **guest)  # type: ignore[arg-type]
        made.append(Engine(own, settings, keeper, list_missing))
        return made[-1]

    yield make
    for engine in made:
        await engine.close()
    gc.collect()
    # uvloop closes a socket that it has watched when the watch has been ended, turns later.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LIMIT):
            while _new_since(before):
                await asyncio.sleep(0.01)
    left = _new_since(before)
    assert not left, f"descriptors left behind: {left}"


def _new_since(before: set[str]) -> dict[str, str]:
    return {
        number: os.readlink(f"/proc/self/fd/{number}")
        for number in set(os.listdir("/proc/self/fd")) - before
        if os.path.exists(f"/proc/self/fd/{number}")
    }
