"""`postcopyctl` as a program: usage, the daemon that is not there, a quick start."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopyd.cli.postcopyctl import main
from tests.support import LIMIT, ROOT, run_python


@pytest.mark.parametrize(
    "words", [[], ["nonsense"], ["show"], ["list", "extra"], ["wait", "a", "--timeout", "x"]]
)
def test_wrong_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: postcopyctl")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    for command in ("check", "list", "show", "create", "wait", "cancel", "send"):
        assert f"\n    {command} " in output
    assert "4 the daemon cannot be reached" in output.replace("\n", " ")


def test_a_daemon_that_is_not_there_is_4_and_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--control", str(tmp_path / "absent"), "list"]) == 4
    message, hint = capsys.readouterr().err.splitlines()
    assert message == (
        f"postcopyctl: postcopyd at {tmp_path}/absent cannot be reached: No such file or directory"
    )
    assert hint.startswith("  is it running (systemctl start postcopyd)?")


def test_the_environment_says_where_the_daemon_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POSTCOPYD_CONTROL", str(tmp_path / "of-environment"))
    assert main(["list"]) == 4
    assert "of-environment cannot be reached" in capsys.readouterr().err
    assert main(["--control", str(tmp_path / "of-option"), "list"]) == 4
    assert "of-option cannot be reached" in capsys.readouterr().err


@contextlib.contextmanager
def answering(path: Path, answer: bytes) -> Iterator[None]:
    """Something at `path` that says `answer` on every connection."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(LIMIT)

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    if not connection.recv(4096):
                        return
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(path))
        thread.join(LIMIT)


def test_who_hangs_up_before_the_answer_is_asked_again_a_while_and_then_it_is_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(tmp_path / "socket", b""):
        assert main(["--control", str(tmp_path / "socket"), "list"]) == 4
    error = capsys.readouterr().err
    assert f"postcopyd at {tmp_path}/socket has hung up before it answered" in error


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nno JSON",
        b'HTTP/1.1 404 Not Found\r\n\r\n{"message": "page not found"}',
        b'HTTP/1.1 404 Not Found\r\n\r\n{"error": "page not found"}',
        b'HTTP/1.1 404 Not Found\r\n\r\n["page not found"]',
    ],
)
def test_what_is_no_postcopyd_is_4(
    answer: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(tmp_path / "socket", answer):
        assert main(["--control", str(tmp_path / "socket"), "list"]) == 4
    error = capsys.readouterr().err
    assert error.startswith(f"postcopyctl: what listens at {tmp_path}/socket does not speak as")
    assert "--control PATH" in error


def test_a_reader_that_has_enough_is_no_error_to_shout_about(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "postcopyd.cli.postcopyctl", "check", "--json"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=LIMIT,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


_HEAVY = ("aiohttp", "asyncio", "rich", "uvloop", "msgspec", "structlog", "bitarray")


def test_asking_the_daemon_imports_nothing_heavy(tmp_path: Path) -> None:
    loaded = run_python(
        "import sys; from postcopyd.cli.postcopyctl import main\n"
        f"main(['--control', '{tmp_path}/absent', 'list'])\n"
        "print(*sys.modules)"
    )
    assert not set(_HEAVY) & set(loaded.split())
