"""Fixtures of the daemon's tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from postcopyd.daemon import network_watch
from tests.daemon.hosted import Hosted, held
from tests.support import LIMIT

network_watch.load()  # a thread that does it in the middle of a test has files open


@pytest.fixture
async def hosted(tmp_path: Path) -> AsyncIterator[Hosted]:
    """A registry with its handoff socket; at the end nothing of it may be left."""
    before = held()
    hosted = Hosted(tmp_path)
    hosted.start()
    yield hosted
    await hosted.stop()
    # uvloop closes a socket that it has watched when the watch has been ended, turns later.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LIMIT):
            while held() != before:
                await asyncio.sleep(0.01)
    assert held() == before
