"""`postcopyd`: usage, and what it says of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from postcopyd.cli.postcopyd import main
from tests.certificates import Authority, tls_settings
from tests.support import ROOT


def test_a_right_configuration_is_said_to_be_right(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "config" / "postcopyd.toml"
    assert main(["check-config", str(path)]) == 0
    assert capsys.readouterr().out == f"{path} is right\n"


@pytest.mark.parametrize("command", [["check-config"], ["serve", "--config"]])
def test_every_mistake_is_told_with_its_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text('contrl = "/x"\nmemory_lock = 3\n')
    assert main([*command, str(path)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        f"{path}:1: there is no setting 'contrl'; did you mean 'control'?",
        f"{path}:2: memory_lock must be true or false; it is 3",
    ]


@pytest.mark.parametrize("command", [["check-config"], ["serve", "--config"]])
def test_a_configuration_that_is_not_there_is_named(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "absent.toml"
    assert main([*command, str(path)]) == 2
    assert capsys.readouterr().err == f"postcopyd: cannot read {path}: No such file or directory\n"


def test_the_files_of_tls_are_looked_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = Authority(tmp_path)
    server = authority.issue("server")
    path = tmp_path / "tls.toml"
    path.write_text("# TLS alone\n" + tls_settings(authority, server))
    assert main(["check-config", str(path)]) == 0
    server.key.chmod(0o644)
    replaced = authority.issue("server", days=(-9, -1))
    capsys.readouterr()
    assert main(["check-config", str(path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"{path}:3: tls.certificate: {replaced.certificate} has expired",
        f"{path}:4: tls.key: every user can read or replace {server.key}: chmod o= {server.key}",
    ]
    server.key.unlink()
    assert main(["check-config", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"{path}:4: tls.key: cannot read {server.key}: No such file or directory\n"
    )


@pytest.mark.parametrize("words", [[], ["nonsense"], ["serve", "extra"], ["check-config"]])
def test_wrong_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: postcopyd")
