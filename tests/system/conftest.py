"""A machine on which the service runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import wait_until
from tests.system.installed import Installed, install
from tests.system.machine import booted_machine


@pytest.fixture(scope="session")
def installed() -> Iterator[Installed]:
    with (
        tempfile.TemporaryDirectory(prefix="postcopyd-machine.") as directory,
        booted_machine(Path(directory)) as machine,
    ):
        yield install(machine)


@pytest.fixture
def service(installed: Installed, tmp_path: Path) -> Iterator[Installed]:
    """The service, which runs and has nothing to do; it has to leave nothing with systemd."""
    installed.directory = tmp_path
    installed.systemctl("start", "postcopyd")
    assert installed.client.list() == []
    yield installed
    for migration in installed.client.list():
        if migration["state"] not in ("end", "failed"):
            installed.client.cancel(migration["name"], force=True)
        installed.client.cancel(migration["name"])  # forgets it
    wait_until(lambda: installed.stored == 0)
