"""What the interop tests share: the guest's firmware, a daemon, a word on machines without KVM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.interop.guest_program import build_firmware
from tests.interop.qemu_machine import accelerators


@pytest.fixture(scope="session")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_firmware(tmp_path_factory.mktemp("guest"))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    directory = tmp_path / "daemon"
    directory.mkdir()
    with running_daemon(directory) as daemon:
        yield daemon


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if "kvm" not in accelerators():
        terminalreporter.write_line("interop: KVM does not work here, so QEMU ran under TCG only")
