"""The unit files: what systemd thinks of them, and that they fit the daemon."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from postcopyd.cli.postcopyd import TO_BE_STARTED_AGAIN
from postcopyd.daemon.config import Configuration
from tests.support import ROOT

UNITS = ROOT / "systemd"


def settings_of(name: str) -> dict[str, str]:
    """Return what a unit file sets; a setting given several times is joined with spaces."""
    settings: dict[str, str] = {}
    for line in (UNITS / name).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings[key] = f"{settings.get(key, '')} {value}".strip()
    return settings


def verify(directory: Path) -> subprocess.CompletedProcess[str]:
    """Let systemd look at a copy of the units; only the program's path is another."""
    program = directory / "postcopyd"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for name in ("postcopyd.service", "postcopyd.socket"):
        text = (UNITS / name).read_text().replace("/usr/local/bin/postcopyd", str(program))
        (directory / name).write_text(text)
    return subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=yes"]
        + [str(directory / name) for name in ("postcopyd.service", "postcopyd.socket")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    done = verify(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_would_find_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("postcopyd.service", "postcopyd.socket"):
        text = (UNITS / name).read_text()
        (broken / name).write_text(text.replace("ProtectSystem=strict", "ProtectSystm=strict"))
    monkeypatch.setattr("tests.system.test_units.UNITS", broken)
    copies = tmp_path / "copies"
    copies.mkdir()
    assert "ProtectSystm" in verify(copies).stderr


def test_the_socket_unit_has_the_paths_of_the_default_configuration() -> None:
    configuration = Configuration()
    sockets = settings_of("postcopyd.socket")
    assert sockets["ListenStream"].split() == [configuration.control, configuration.handoff]
    assert int(sockets["SocketMode"], 8) == configuration.control_mode


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("User", "postcopyd"),
        ("TimeoutStopSec", "infinity"),
        ("LimitMEMLOCK", "infinity"),
        ("CapabilityBoundingSet", ""),
        ("NoNewPrivileges", "yes"),
        ("RuntimeDirectoryPreserve", "yes"),
        ("RestartKillSignal", "SIGUSR1"),
        ("Restart", "on-failure"),
        ("RestartForceExitStatus", str(TO_BE_STARTED_AGAIN)),
        ("SuccessExitStatus", str(TO_BE_STARTED_AGAIN)),
        ("OOMPolicy", "continue"),
        ("WatchdogSignal", "SIGKILL"),
    ],
)
def test_the_service_has_what_the_daemon_relies_on(setting: str, value: str) -> None:
    assert settings_of("postcopyd.service")[setting] == value


def test_the_service_may_keep_and_use_the_descriptors_of_every_migration() -> None:
    service = settings_of("postcopyd.service")
    limits = Configuration().limits
    assert int(service["LimitNOFILE"]) >= limits.descriptors
    assert int(service["FileDescriptorStoreMax"]) >= 16 * limits.migrations
    assert "userfaultfd" in service["SystemCallFilter"].split()
    families = set(service["RestrictAddressFamilies"].split())
    assert families == {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"}


def test_the_user_of_the_units_is_the_one_that_sysusers_makes() -> None:
    words = (UNITS / "postcopyd.sysusers").read_text().splitlines()[-1].split()
    assert words[:2] == ["u", settings_of("postcopyd.service")["User"]]
    assert settings_of("postcopyd.socket")["SocketUser"] == words[1]
