"""A daemon with several workers, and guests that run there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.hosted import Source, Vmm
from tests.support import LIMIT, wait_until

WORKERS = 3


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path, f"workers = {WORKERS}\n") as daemon:
        yield daemon
        assert "Traceback" not in daemon.log


def workers_of(daemon: RunningDaemon) -> dict[str, int]:
    """Name of each migration -> number of its worker."""
    return {migration["name"]: migration["worker"] for migration in daemon.client.list()}


def begin(source: Source) -> None:
    async def send() -> None:
        await source.begin()
        await source.send_package()

    asyncio.run(send())


@contextmanager
def running_guests(daemon: RunningDaemon, names: str) -> Iterator[dict[str, tuple[Vmm, Source]]]:
    """Migrations that run, with most of their memory still to come."""
    guests: dict[str, tuple[Vmm, Source]] = {}
    try:
        for name in names:
            vmm = Vmm(daemon.handoff, name)
            guests[name] = vmm, Source(vmm.destination.listen[0])
            begin(guests[name][1])
            assert vmm.destination.wait_for_device_state(LIMIT) == b""
            vmm.destination.loaded()
            wait_until(lambda name=name: daemon.client.show(name)["state"] == "running")  # type: ignore[misc]
        yield guests
    finally:
        for vmm, source in guests.values():
            source.close()
            asyncio.run(vmm.leave())


def complete(guest: tuple[Vmm, Source]) -> None:
    async def finish() -> None:
        await source.finish()
        await source.hear_the_end()

    vmm, source = guest
    asyncio.run(finish())
    vmm.destination.wait_for_completion(LIMIT)
    source.close()
