"""postcopyctl receive-qemu and retry: what they show, and what they say when nothing comes."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from postcopyd.cli import receive_qemu
from postcopyd.cli.receive_progress import ReceiveProgress, describe
from postcopyd.daemon.left_behind import HeldMigration
from postcopyd.incoming.estate import Estate
from postcopyd.incoming.report import Report
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.support import LIMIT, ROOT
from tests.vmm.test_qemu import qemu

MIGRATION: dict[str, Any] = {
    "name": "vm0",
    "state": "advise",
    "failure": None,
    "received": 1 << 29,
    "length": 1 << 30,
    "counters": {"faults": 0},
    "waits_for_vmm": False,
    "guest_may_have_run": False,
    "refused": None,
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with running_daemon(
        tmp_path_factory.mktemp("daemon"), 'listen = "tcp:127.0.0.1:0"\n'
    ) as daemon:
        yield daemon


def postcopyctl(daemon: RunningDaemon, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "postcopyd.cli.postcopyctl",
            "--control",
            str(daemon.control),
            *words,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], status: int) -> str:
    """What the command has printed, once it has ended with this status."""
    printed, told = process.communicate(timeout=LIMIT)
    assert process.returncode == status, printed + told
    assert "Traceback" not in told
    return printed + told


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"state": "none"}, "waiting for the source"),
        ({}, "pre-copy: 512 MiB of 1.00 GiB"),
        ({"state": "discard"}, "switchover"),
        (
            {"state": "running", "counters": {"faults": 7}},
            "memory comes: 512 MiB of 1.00 GiB, 7 faults",
        ),
        ({"state": "paused", "failure": "the stream broke"}, "paused: the stream broke"),
        ({"state": "end", "received": 1 << 30}, "all memory is here: 1.00 GiB of 1.00 GiB"),
    ],
)
def test_how_it_stands_is_one_line(changes: dict[str, Any], line: str) -> None:
    assert describe(MIGRATION | changes).endswith(line)


def test_without_a_terminal_there_is_a_line_for_each_step_and_none_twice() -> None:
    output = io.StringIO()
    with ReceiveProgress(output) as progress:
        for received in range(0, 1 << 30, 1 << 26):
            progress.show(MIGRATION | {"received": received})
        progress.show(MIGRATION | {"state": "end", "received": 1 << 30})
    lines = output.getvalue().splitlines()
    assert len(lines) == 5
    assert len(set(lines)) == 5


def test_what_to_do_about_a_vmm_that_did_not_load_is_said_once() -> None:
    output = io.StringIO()
    waits = MIGRATION | {"state": "paused", "failure": "it rejects", "waits_for_vmm": True}
    with ReceiveProgress(output) as progress:
        progress.show(waits)
        progress.show(waits)
    assert output.getvalue().count("postcopyctl retry vm0 --qmp OTHER\n") == 1
    assert "Nothing is lost" in output.getvalue()


def test_where_the_guest_may_have_run_its_operator_is_told_to_look_first() -> None:
    output = io.StringIO()
    waits = MIGRATION | {"state": "paused", "failure": "it has exited", "waits_for_vmm": True}
    with ReceiveProgress(output) as progress:
        progress.show(waits | {"guest_may_have_run": True})
    assert output.getvalue().count("postcopyctl retry vm0 --qmp OTHER --force\n") == 1
    assert "Nothing is lost" not in output.getvalue()


def test_who_was_refused_is_told_once() -> None:
    output = io.StringIO()
    refused = MIGRATION | {"refused": "192.0.2.9:5: it shows no certificate"}
    with ReceiveProgress(output) as progress:
        for migration in (MIGRATION, refused, refused):
            progress.show(migration)
    lines = output.getvalue().splitlines()
    assert lines.count("refused: 192.0.2.9:5: it shows no certificate") == 1


class Told:
    """A daemon that tells how a migration stands, as one that was killed in the middle may."""

    def __init__(self, **known: Any) -> None:
        report = Report("vm0", failure=None, vmm="QEMU", peer="127.0.0.1:1", machine=None, **known)
        self.migration: dict[str, Any] = msgspec.to_builtins(report) | {"refused": None}

    def wait(self, name: str, within: float) -> dict[str, Any]:
        return self.migration


def see_through(told: Told) -> int:
    running = Told(state="running").migration
    return receive_qemu._see_it_through(told, running, False)  # type: ignore[arg-type]


def test_one_that_had_ended_when_its_daemon_was_killed_is_here_all_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert see_through(Told(state="end")) == 0
    printed = capsys.readouterr().out
    assert "vm0 runs here" in printed
    assert "downtime" not in printed


async def test_one_that_cannot_be_gone_on_with_waits_and_that_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = Told(state="running")
    told.migration = HeldMigration("vm0", Estate(), "its journal is too new").view()
    assert see_through(told) == 1
    error = capsys.readouterr().err
    assert "vm0 cannot be gone on with: its journal is too new" in error
    assert "its guest waits, and nothing of it is lost" in error


def test_interrupting_it_leaves_the_migration_alone(daemon: RunningDaemon, tmp_path: Path) -> None:
    with qemu(tmp_path, "-m", "64M", "-incoming", "defer") as waiting:
        process = postcopyctl(daemon, "receive-qemu", "--qmp", str(waiting.monitor), "--name", "a")
        assert process.stderr is not None
        assert "a waits for its source at tcp:127.0.0.1:" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        ended(process, 130)
        assert daemon.client.show("a")["state"] == "none"


def test_it_ends_when_somebody_cancels_the_migration(daemon: RunningDaemon, tmp_path: Path) -> None:
    with qemu(tmp_path, "-m", "64M", "-incoming", "defer") as waiting:
        process = postcopyctl(daemon, "receive-qemu", "--qmp", str(waiting.monitor), "--name", "b")
        assert process.stderr is not None
        process.stderr.readline()
        daemon.client.cancel("b")
        assert "the guest has not left its source" in ended(process, 1)


def test_a_name_that_is_taken_leaves_the_qemu_as_it_was(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    with qemu(tmp_path, "-m", "64M", "-incoming", "defer") as waiting:
        before = waiting.state()
        daemon.client.create("taken")
        process = postcopyctl(
            daemon, "receive-qemu", "--qmp", str(waiting.monitor), "--name", "taken"
        )
        assert "taken" in ended(process, 3)
        waiting.wait_for_state(before)


def test_there_is_nothing_to_retry(daemon: RunningDaemon) -> None:
    daemon.client.create("waiting")
    process = postcopyctl(daemon, "retry", "waiting", "--qmp", "/no/monitor")
    assert "needs no other VMM" in ended(process, 3)
    process = postcopyctl(daemon, "retry", "nobody", "--qmp", "/no/monitor")
    assert "nobody" in ended(process, 3)


def test_no_monitor_is_told_with_its_path(daemon: RunningDaemon) -> None:
    process = postcopyctl(daemon, "receive-qemu", "--qmp", "/no/monitor")
    assert "/no/monitor: No such file or directory" in ended(process, 3)
