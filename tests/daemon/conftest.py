"""Fixtures of the daemon's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from postcopyd.daemon import network_watch
from tests.daemon.hosted import Hosted, held

network_watch.load()  # a thread that does it in the middle of a test has files open


@pytest.fixture
async def hosted(tmp_path: Path) -> AsyncIterator[Hosted]:
    """A registry with its handoff socket; at the end nothing of it may be left."""
    before = held()
    hosted = Hosted(tmp_path)
    hosted.start()
    yield hosted
    await hosted.stop()
    assert held() == before
