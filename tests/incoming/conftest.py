"""Fixtures of the engine's tests."""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator, Callable

import pytest

from postcopyd.incoming.settings import Settings
from tests.incoming.engine import Engine
from tests.incoming.guest import Guest


@pytest.fixture
async def make_engine() -> AsyncIterator[Callable[..., Engine]]:
    """Make engines; at the end each must have let go of every descriptor."""
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    made: list[Engine] = []

    def make(settings: Settings | None = None, **guest: object) -> Engine:
        made.append(Engine(Guest(register=False, **guest), settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for engine in made:
        await engine.close()
    gc.collect()
    left = {
        number: os.readlink(f"/proc/self/fd/{number}")
        for number in set(os.listdir("/proc/self/fd")) - before
        if os.path.exists(f"/proc/self/fd/{number}")
    }
    assert not left, f"descriptors left behind: {left}"
