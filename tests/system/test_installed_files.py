"""What an operator installs works as installed: hardening that systemd sees, a user, a command."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from postcopyd.cli.postcopyd import main
from tests.support import LIMIT
from tests.system.unit_files import SERVICE, SOCKET, SYSUSERS, values

HIGHEST_EXPOSURE = 2.2
"""Of `systemd-analyze security`, where 10 is a service without any hardening."""


def test_the_service_is_exposed_no_more_than_it_must_be() -> None:
    threshold = str(int(HIGHEST_EXPOSURE * 10))
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", f"--threshold={threshold}", str(SERVICE)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env={**os.environ, "SYSTEMD_COLORS": "0"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_start_command_is_one_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = values(SERVICE, "ExecStart")
    with pytest.raises(SystemExit) as caught:
        main([*command.split()[1:], "--help"])
    assert caught.value.code == 0
    assert "usage: postcopyd serve" in capsys.readouterr().out


def test_the_user_and_group_of_the_units_are_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", str(SYSUSERS)],
        capture_output=True,
        timeout=LIMIT,
        check=True,
    )
    (user,) = (tmp_path / "etc" / "passwd").read_text().splitlines()
    assert user.split(":")[0] == values(SERVICE, "User")[0]
    groups = [line.split(":")[0] for line in (tmp_path / "etc/group").read_text().splitlines()]
    assert values(SERVICE, "Group") == values(SOCKET, "SocketGroup") == groups
