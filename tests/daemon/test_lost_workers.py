"""Workers that die or do nothing: what becomes of one touches not what the others have."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from postcopyd.cli.control_client import ControlError
from postcopyd.cli.postcopyd import TO_BE_STARTED_AGAIN
from postcopyd.daemon.event_log import WORKER_DIED_ID
from postcopyd.vmm.client import MigrationFailed
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.hosted import Vmm
from tests.daemon.several_workers import WORKERS, complete, daemon, running_guests, workers_of
from tests.support import LIMIT, wait_until

__all__ = ["daemon"]  # a fixture


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """A worker that does nothing, and has not died."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def spare_of(daemon: RunningDaemon) -> int:
    """The process that takes over from the next worker that dies."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [
            worker
            for worker in daemon.workers()
            if Path(f"/proc/{worker}/comm").read_text() == "postcopyd-spare\n"
        ]
        return len(found) == 1

    wait_until(look)
    return found[0]


def interrupted(daemon: RunningDaemon) -> set[str]:
    """The migrations that were ever paused, or handed to another process."""
    events = [json.loads(line) for line in daemon.log.splitlines()]
    told = ("paused", "goes on where another process was killed")
    return {event["migration"] for event in events if event["event"].startswith(told)}


# -- workers that die ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(WORKERS))
def test_a_worker_that_is_killed_touches_only_its_own(tmp_path: Path, number: int) -> None:
    log = '[log]\nformat = "json"\n'
    with (
        running_daemon(tmp_path, f"workers = {WORKERS}\n{log}") as daemon,
        running_guests(daemon, "abc") as guests,
    ):
        workers = workers_of(daemon)
        assert sorted(workers.values()) == list(range(WORKERS))
        processes = {other: daemon.nth_worker(other) for other in range(WORKERS)}
        (victim,) = (name for name in workers if workers[name] == number)
        os.kill(processes[number], signal.SIGKILL)
        # Whoever asks is answered by the successor.
        assert daemon.client.show(victim)["state"] in ("running", "paused")
        for name in set("abc") - {victim}:
            complete(guests[name])
        wait_until(lambda: daemon.client.show(victim)["state"] == "paused")
        assert workers_of(daemon) == workers
        assert interrupted(daemon) == {victim}
        for other in set(range(WORKERS)) - {number}:
            assert daemon.nth_worker(other) == processes[other]
        assert daemon.nth_worker(number) != processes[number]
        (died,) = (line for line in daemon.log.splitlines() if "has died" in line)
        assert json.loads(died)["worker"] == number
        assert len(WORKER_DIED_ID) == 32
        daemon.client.cancel(victim, force=True)


def test_all_workers_at_once_are_replaced(daemon: RunningDaemon) -> None:
    with running_guests(daemon, "abc"):
        workers = workers_of(daemon)
        for process in [daemon.nth_worker(number) for number in range(WORKERS)]:
            os.kill(process, signal.SIGKILL)
        for name in "abc":
            wait_until(lambda name=name: daemon.client.show(name)["state"] == "paused")  # type: ignore[misc]
        assert workers_of(daemon) == workers
        for name in "abc":
            daemon.client.cancel(name, force=True)


def kill_when_no_process_can_be_started(daemon: RunningDaemon, *workers: int) -> tuple[int, int]:
    """Kill the spare worker and those; return the limits that allowed a new one to start."""
    supervisor = daemon.process.pid
    limits = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
    spare = spare_of(daemon)
    resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (0, limits[1]))
    for process in (spare, *workers):
        os.kill(process, signal.SIGKILL)
    wait_until(lambda: "has died" in daemon.log and "no process can be started" in daemon.log)
    return limits


def test_a_worker_is_replaced_as_soon_as_a_process_can_be_started(daemon: RunningDaemon) -> None:
    name = next(name for name in "abc" if daemon.client.create(name)["worker"] == 0)
    worker, spare, supervisor = daemon.worker, spare_of(daemon), daemon.process.pid
    limits = kill_when_no_process_can_be_started(daemon, worker)
    resource.prlimit(supervisor, resource.RLIMIT_NOFILE, limits)
    assert daemon.worker != worker
    assert daemon.client.show(name)["state"] == "none"
    assert spare_of(daemon) != spare


@pytest.mark.parametrize("dead", [1, WORKERS])
def test_a_daemon_that_is_stopped_waits_for_no_process_that_nobody_needs(
    daemon: RunningDaemon, dead: int
) -> None:
    """Such as when its program has been removed."""
    kill_when_no_process_can_be_started(daemon, *map(daemon.nth_worker, range(dead)))
    daemon.process.terminate()
    assert daemon.process.wait(LIMIT) == 0


def test_a_daemon_that_is_stopped_waits_for_one_that_has_to_go_on_with_a_guest(
    daemon: RunningDaemon,
) -> None:
    with running_guests(daemon, "abc"):
        worker = daemon.nth_worker(daemon.client.show("a")["worker"])
        limits = kill_when_no_process_can_be_started(daemon, worker)
        daemon.process.terminate()
        wait_until(lambda: "stopping" in daemon.log)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, limits)
        for name in "abc":
            daemon.client.cancel(name, force=True)
        assert daemon.process.wait(LIMIT) == 0


def test_a_spare_worker_that_dies_is_replaced(daemon: RunningDaemon) -> None:
    spare = spare_of(daemon)
    os.kill(spare, signal.SIGKILL)
    wait_until(lambda: spare not in daemon.workers())
    assert spare_of(daemon) != spare


def is_kept(daemon: RunningDaemon, names: str) -> bool:
    """Tell whether the service manager has taken all that there is to keep of these migrations.

    They stand alike, so there is as much of each.
    """
    kept = [
        {
            rest
            for owner, _, rest in (stored.partition("/") for stored in list(daemon.manager.stored))
            if owner == name
        }
        for name in names
    ]
    return "vmm-userfaultfd" in kept[0] and all(of_one == kept[0] for of_one in kept)


def test_a_daemon_that_is_killed_shares_out_what_was_kept(tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path, "workers = 3\n") as daemon,
        running_guests(daemon, "abcd"),
    ):
        wait_until(lambda: is_kept(daemon, "abcd"))
        daemon.kill()
        daemon.start()
        assert sorted(workers_of(daemon).values()) == [0, 0, 1, 2]
        for name in "abcd":
            assert daemon.client.show(name)["state"] == "paused"
            daemon.client.cancel(name, force=True)


def test_all_leave_for_workers_that_go_on_with_everything(tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path, f"workers = {WORKERS}\n") as daemon,
        running_guests(daemon, "abcd") as guests,
    ):
        for _, source in guests.values():
            source.close()  # so little memory would not be left before all of it is here
        wait_until(lambda: daemon.log.count("paused") == len(guests))
        daemon.leave()
        assert daemon.ended() == TO_BE_STARTED_AGAIN
        daemon.start()
        assert sorted(workers_of(daemon).values()) == [0, 0, 1, 2]
        for name in "abcd":
            assert daemon.client.show(name)["state"] == "paused"
            assert daemon.client.abandon(name)["state"] == "abandoned"


def test_a_migration_can_be_created_while_a_worker_is_replaced(daemon: RunningDaemon) -> None:
    worker = daemon.nth_worker(1)
    with stopped(spare_of(daemon)):
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: worker not in daemon.workers())
        assert [daemon.client.create(name)["worker"] for name in "ab"] == [0, 2]
    assert daemon.client.create("c")["worker"] in range(WORKERS)


def test_what_has_ended_is_forgotten_with_its_worker(daemon: RunningDaemon) -> None:
    workers = {name: daemon.client.create(name)["worker"] for name in "abc"}
    for name in "abc":
        daemon.client.cancel(name)
    os.kill(daemon.nth_worker(workers["b"]), signal.SIGKILL)
    with pytest.raises(ControlError) as gone:
        daemon.client.show("b")
    assert gone.value.code == "no-such-migration"
    assert sorted(workers_of(daemon)) == ["a", "c"]


def test_who_waits_does_not_notice_that_the_worker_is_replaced(daemon: RunningDaemon) -> None:
    with running_guests(daemon, "ab"), ThreadPoolExecutor(1) as thread:
        (name,) = (name for name, worker in workers_of(daemon).items() if worker == 1)
        waiting = thread.submit(daemon.client.wait, name)
        os.kill(daemon.nth_worker(1), signal.SIGKILL)
        wait_until(lambda: daemon.client.show(name)["state"] == "paused")
        daemon.client.cancel(name, force=True)
        assert waiting.result(LIMIT)["state"] == "failed"


# -- workers that do nothing -----------------------------------------------------------------------


def test_a_worker_that_does_nothing_holds_up_nobody_elses(daemon: RunningDaemon) -> None:
    with running_guests(daemon, "abc") as guests, ThreadPoolExecutor(1) as thread:
        workers = workers_of(daemon)
        (slow,) = (name for name, worker in workers.items() if worker == 1)
        with stopped(daemon.nth_worker(1)):
            asked = thread.submit(daemon.client.show, slow)
            for name in set("abc") - {slow}:
                assert daemon.client.show(name)["state"] == "running"
                complete(guests[name])
                assert daemon.client.wait(name, LIMIT)["state"] == "end"
            # Their workers have nothing to do now; the one that does nothing has one.
            assert {daemon.client.create(name)["worker"] for name in "de"} == {0, 2}
            assert not asked.done()
        assert asked.result(LIMIT)["state"] == "running"
        daemon.client.cancel(slow, force=True)


@contextmanager
def no_descriptor_to_spare(process: int) -> Iterator[None]:
    """A process that can open nothing more, whatever it closes but its standard input."""
    soft, hard = resource.prlimit(process, resource.RLIMIT_NOFILE)
    resource.prlimit(process, resource.RLIMIT_NOFILE, (1, hard))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_NOFILE, (soft, hard))


def test_a_worker_that_can_take_nothing_more_goes_on_with_what_it_has(tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path, 'workers = 2\n[log]\nformat = "json"\n') as daemon,
        running_guests(daemon, "ab") as guests,
    ):
        (name,) = (name for name, worker in workers_of(daemon).items() if worker == 1)
        daemon.descriptors_at_rest()
        process = daemon.nth_worker(1)
        with no_descriptor_to_spare(process):
            with pytest.raises(MigrationFailed):
                Vmm(daemon.handoff, name)
            wait_until(lambda: "a VMM could not be taken" in daemon.log)
        assert daemon.client.show(name)["state"] == "running"
        assert daemon.nth_worker(1) == process
        assert interrupted(daemon) == set()
        for guest in guests.values():
            complete(guest)
