"""What the interop tests share: the guest's firmware, and a word on machines without KVM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.guest_program import build_firmware
from tests.interop.qemu import accelerators


@pytest.fixture(scope="session")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_firmware(tmp_path_factory.mktemp("guest"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if "kvm" not in accelerators():
        terminalreporter.write_line("interop: KVM does not work here, so QEMU ran under TCG only")
