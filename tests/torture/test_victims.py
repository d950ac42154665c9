"""A kill takes whom it names: the matrices of kills are worth nothing otherwise."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.support import wait_until
from tests.torture import victims

_TWO = "workers = 2\n"


def test_the_worker_is_the_one_that_has_the_migration_now_and_no_older_bystander(
    tmp_path: Path,
) -> None:
    with running_daemon(tmp_path, _TWO) as daemon:
        daemon.kill_worker()
        (found,) = victims.worker(daemon.process.pid)
        assert (found.process, found.role) == (daemon.worker, "worker")
        assert found.process != min(daemon.workers())


def test_while_its_place_is_empty_the_worker_is_the_one_that_is_to_have_it(tmp_path: Path) -> None:
    with running_daemon(tmp_path, _TWO) as daemon:
        wait_until(lambda: _spares(daemon))
        (spare,) = _spares(daemon)
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            (before,) = victims.worker(daemon.process.pid)
            os.kill(before.process, signal.SIGKILL)
            wait_until(lambda: not before.lives())
            (found,) = victims.worker(daemon.process.pid)
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        assert (before.role, found.role, found.process) == ("worker", "successor", spare)


def test_of_a_daemon_that_is_dead_there_is_nobody_to_kill(tmp_path: Path) -> None:
    with running_daemon(tmp_path, _TWO) as daemon:
        killed = victims.from_outside(daemon.process.pid, "both")
        assert [victim.role for victim in killed.victims] == ["supervisor", "worker"]
        for victim in killed.victims:
            wait_until(lambda victim=victim: not victim.lives())  # type: ignore[misc]
        assert victims.from_outside(daemon.process.pid, "both").victims == ()


def _spares(daemon: RunningDaemon) -> list[int]:
    return [
        worker
        for worker in daemon.workers()
        if Path(f"/proc/{worker}/comm").read_text() == "postcopyd-spare\n"
    ]
