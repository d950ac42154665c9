"""`postcopyd`: usage, and what it says of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from postcopyd.cli.postcopyd import main
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


@pytest.mark.parametrize("words", [[], ["nonsense"], ["serve", "extra"], ["check-config"]])
def test_wrong_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: postcopyd")
