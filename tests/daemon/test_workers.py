"""Several workers: each has its own migrations, and all of them are asked as one daemon."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from postcopyd.cli.control_client import ControlError
from postcopyd.vmm.client import MigrationFailed
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.hosted import PAGE, Vmm
from tests.daemon.several_workers import WORKERS, complete, daemon, running_guests, workers_of
from tests.daemon.whole_migration import LENGTHS, Image, assert_sent, running_guest
from tests.support import LIMIT, wait_until
from tests.vmm.firecracker_stand_in import FirecrackerStandIn

__all__ = ["daemon"]  # a fixture


# -- whose a migration is ------------------------------------------------------------------------


def test_each_worker_gets_as_many_as_the_others(daemon: RunningDaemon) -> None:
    for name in "abc":
        daemon.client.create(name)
    for name in "def":
        vmm = Vmm(daemon.handoff, name)
        asyncio.run(vmm.leave())
    workers = workers_of(daemon)
    assert sorted(workers) == list("abcdef")
    assert sorted(workers[name] for name in "abc") == [0, 1, 2]
    daemon.client.cancel("b")
    assert daemon.client.create("g")["worker"] == workers["b"]


def test_migrations_of_the_configuration_are_shared_out(tmp_path: Path) -> None:
    more = "".join(f'[[migration]]\nname = "vm{number}"\n' for number in range(4))
    with running_daemon(tmp_path, f"workers = 2\n{more}") as daemon:
        assert workers_of(daemon) == {"vm0": 0, "vm2": 0, "vm1": 1, "vm3": 1}
        os.kill(daemon.nth_worker(1), signal.SIGKILL)
        assert daemon.client.cancel("vm1")["state"] == "failed"
        assert workers_of(daemon) == {"vm0": 0, "vm2": 0, "vm1": 1, "vm3": 1}


def test_everything_can_be_asked_of_each_workers_migrations(daemon: RunningDaemon) -> None:
    for number in range(WORKERS):
        name = f"vm{number}"
        created = daemon.client.create(name, handoff=f"{daemon.directory}/own-{number}")
        assert created["worker"] == number
        assert daemon.client.show(name) == created
        assert daemon.client.wait(name, 0.05) == created
        del created["missing"]  # the list tells no ranges
        assert created in daemon.client.list()
        with pytest.raises(ControlError, match="already, in state none") as taken:
            daemon.client.create(name)
        assert taken.value.code == "name-taken"
        with pytest.raises(ControlError, match="needs no other VMM"):
            daemon.client.retry(name, "/no/such/socket")
        with pytest.raises(ControlError, match="this socket belongs") as refused:
            raise_refusal(Path(created["handoff"]), "another")
        assert refused.value.code == "refused"
    daemon.wait_for_status(lambda status: status == "3 migrations under way: 3 none")
    for number in range(WORKERS):
        name = f"vm{number}"
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(daemon.client.wait, name, LIMIT)
            assert daemon.client.cancel(name)["failure"] == "cancelled by an operator"
            assert waiting.result()["state"] == "failed"
        daemon.client.cancel(name)
        with pytest.raises(ControlError) as gone:
            daemon.client.show(name)
        assert gone.value.code == "no-such-migration"
    assert daemon.client.list() == []
    assert daemon.client.check()["can_postcopy"] is True


def raise_refusal(handoff: Path, name: str) -> None:
    try:
        Vmm(handoff, name)
    except MigrationFailed as error:
        raise ControlError("refused", str(error)) from error


def test_names_are_unique_however_many_want_one_at_once(daemon: RunningDaemon) -> None:
    def create(name: str) -> str:
        try:
            daemon.client.create(name)
        except ControlError as error:
            return error.code
        return "created"

    with ThreadPoolExecutor(8) as threads:
        for attempt in range(5):
            done = list(threads.map(create, [f"vm{attempt}"] * 8))
            assert sorted(done) == ["created"] + ["name-taken"] * 7
    assert sorted(workers_of(daemon)) == [f"vm{attempt}" for attempt in range(5)]


def test_limits_count_over_all(tmp_path: Path) -> None:
    limits = "workers = 2\n[limits]\nmigrations = 3\nended = 2\n"
    with running_daemon(tmp_path, limits) as daemon:
        for name in "abc":
            daemon.client.create(name)
        with pytest.raises(ControlError) as refused:
            daemon.client.create("d")
        assert refused.value.code == "too-many-migrations"
        for name in "abc":
            daemon.client.cancel(name)
        wait_until(lambda: sorted(workers_of(daemon)) == ["b", "c"])
        # One that has ended makes room for one of its name, whoever gets that.
        daemon.client.create("x")
        daemon.client.create("b")
        wait_until(lambda: sorted(workers_of(daemon)) == ["b", "c", "x"])
        assert daemon.client.show("b")["state"] == "none"


def test_who_would_take_the_last_descriptors_is_refused(tmp_path: Path) -> None:
    settings = "workers = 2\nmemory_lock = false\n[limits]\ndescriptors = 256\nmigrations = 256\n"
    limited = ("prlimit", "--nofile=256:256")
    with running_daemon(tmp_path, settings, wrapper=limited) as daemon:
        created = []
        with pytest.raises(ControlError) as refused:
            for number in range(256):
                created.append(daemon.client.create(f"vm{number}")["name"])
        assert refused.value.code == "out-of-resources"
        assert sorted(workers_of(daemon)) == sorted(created)
        assert "has died" not in daemon.log and "Traceback" not in daemon.log
        for name in created:
            daemon.client.cancel(name)
        wait_until(lambda: daemon.client.create("another"))


# -- VMMs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[4 * PAGE], [PAGE] * 3000])  # more than a socket takes
def test_firecracker_gets_the_only_migration_that_waits(
    daemon: RunningDaemon, lengths: list[int]
) -> None:
    for name in "abc":
        daemon.client.create(name)
    vmms = [Vmm(daemon.handoff, name) for name in "ac"]
    with FirecrackerStandIn(lengths) as firecracker:
        firecracker.hand_over(daemon.handoff).close()
        wait_until(lambda: daemon.client.show("b")["vmm"])
        assert daemon.client.show("b")["vmm"].startswith("Firecracker, pid ")
        daemon.client.cancel("b")
    for vmm in vmms:
        asyncio.run(vmm.leave())


def test_firecracker_is_refused_where_it_could_be_for_several(daemon: RunningDaemon) -> None:
    for name in "ab":
        daemon.client.create(name)
    with (
        FirecrackerStandIn([4 * PAGE]) as firecracker,
        firecracker.hand_over(daemon.handoff) as connection,
    ):
        connection.settimeout(LIMIT)
        assert connection.recv(1) == b""
    assert "2 migrations wait for a VMM (a, b)" in daemon.log


def test_a_vmm_that_another_worker_refuses_is_told_why(daemon: RunningDaemon) -> None:
    vmms = [Vmm(daemon.handoff, name) for name in "abc"]
    for name in "abc":
        with pytest.raises(MigrationFailed, match=f"migration '{name}' already has a VMM"):
            Vmm(daemon.handoff, name)
    for vmm in vmms:
        asyncio.run(vmm.leave())


# -- whole migrations, stopping --------------------------------------------------------------------


def test_whole_migrations_of_all_workers_do_not_mix(daemon: RunningDaemon, tmp_path: Path) -> None:
    names = "abcd"
    images = {name: Image(tmp_path / f"image-{name}", seed) for seed, name in enumerate(names)}
    with ExitStack() as guests:
        running = {
            name: guests.enter_context(running_guest(daemon, name, "anonymous")) for name in names
        }
        listen = {name: guest.says()["listen"][0] for name, guest in running.items()}
        sources = [images[name].start_sending(listen[name]) for name in names]
        for source in sources:
            assert_sent(source)
        for name, guest in running.items():
            assert guest.says() == {"complete": True, "changed": 0}
            assert guest.process.wait(LIMIT) == 0
            assert guest.memory() == images[name].memory
    reports: list[dict[str, Any]] = [daemon.client.wait(name, LIMIT) for name in names]
    assert {report["state"] for report in reports} == {"end"}
    assert {report["received"] for report in reports} == {sum(LENGTHS.values())}
    assert {report["worker"] for report in reports} == {0, 1, 2}


def test_the_front_answers_until_the_last_guest_is_here(daemon: RunningDaemon) -> None:
    with running_guests(daemon, "ab") as guests:
        workers = workers_of(daemon)
        (name,) = (name for name in workers if workers[name] != 0)
        (first,) = (name for name in workers if workers[name] == 0)
        complete(guests[first])
        daemon.terminate()
        daemon.wait_for_status(lambda status: f"these have ended: {name} " in status)
        with pytest.raises(ControlError, match="is being stopped"):
            daemon.client.create("another")
        assert daemon.client.show(name)["state"] == "running"
        assert daemon.process.poll() is None
        os.kill(daemon.nth_worker(workers[name]), signal.SIGKILL)
        wait_until(lambda: daemon.client.show(name)["state"] == "paused")
        assert daemon.client.cancel(name, force=True)["state"] == "failed"
        assert daemon.ended() == 0
        assert not daemon.control.exists()


def test_all_read_anew_before_the_service_manager_is_told(daemon: RunningDaemon) -> None:
    daemon.process.send_signal(signal.SIGHUP)
    while "RELOADING" not in daemon.notification():
        pass
    assert daemon.notification()["READY"] == "1"


def test_log_events_name_the_worker(tmp_path: Path) -> None:
    log = 'workers = 2\n[log]\nformat = "json"\nlevel = "debug"\n'
    with running_daemon(tmp_path, log) as daemon:
        vmms = [Vmm(daemon.handoff, name) for name in "ab"]
        events = [json.loads(line) for line in daemon.log.splitlines()]
        told = {
            event["migration"]: event["worker"]
            for event in events
            if event["event"] == "a VMM has handed over its memory"
        }
        assert told == workers_of(daemon) == {"a": 0, "b": 1}
        (ready,) = (event for event in events if event["event"] == "ready")
        assert ready["workers"] == 2
        for vmm in vmms:
            asyncio.run(vmm.leave())
