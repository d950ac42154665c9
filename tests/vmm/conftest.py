"""Fixtures of the handoff tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from tests.vmm.handoffs import Handoffs, Offer, listening


@pytest.fixture(scope="session", autouse=True)
def _helper_of_multiprocessing() -> None:
    """Start it before descriptors are counted: it keeps a pipe for the rest of the session."""
    resource_tracker.ensure_running()


@pytest.fixture
async def handoffs(tmp_path: Path) -> AsyncIterator[Handoffs]:
    """A listener that takes every VMM; no descriptor may be left of it at the end."""
    async with listening(tmp_path / "handoff.sock") as handoffs:
        yield handoffs


@pytest.fixture
def offer() -> Iterator[Offer]:
    """A native handoff that is right in everything."""
    with Offer() as offer:
        yield offer
