"""Several workers: each has its own migrations, and what becomes of the others touches it not."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from postcopyd.cli.control_client import ControlError
from postcopyd.cli.postcopyd import TO_BE_STARTED_AGAIN
from postcopyd.daemon.event_log import WORKER_DIED_ID
from postcopyd.vmm.client import MigrationFailed
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.hosted import PAGE, Source, Vmm
from tests.daemon.whole_migration import LENGTHS, Image, assert_sent, running_guest
from tests.support import LIMIT, wait_until
from tests.vmm.firecracker_stand_in import FirecrackerStandIn

WORKERS = 3


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path, f"workers = {WORKERS}\n") as daemon:
        yield daemon
        assert "Traceback" not in daemon.log


def workers_of(daemon: RunningDaemon) -> dict[str, int]:
    """Name of each migration -> number of its worker."""
    return {migration["name"]: migration["worker"] for migration in daemon.client.list()}


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


# -- workers that die ------------------------------------------------------------------------------


def begin(source: Source) -> None:
    async def send() -> None:
        await source.begin()
        await source.send_package()

    asyncio.run(send())


@contextmanager
def running_guests(daemon: RunningDaemon, names: str) -> Iterator[dict[str, tuple[Vmm, Source]]]:
    """Migrations that run, with most of their memory still to come."""
    guests: dict[str, tuple[Vmm, Source]] = {}
    try:
        for name in names:
            vmm = Vmm(daemon.handoff, name)
            guests[name] = vmm, Source(vmm.destination.listen[0])
            begin(guests[name][1])
            assert vmm.destination.wait_for_device_state(LIMIT) == b""
            vmm.destination.loaded()
            wait_until(lambda name=name: daemon.client.show(name)["state"] == "running")  # type: ignore[misc]
        yield guests
    finally:
        for vmm, source in guests.values():
            source.close()
            asyncio.run(vmm.leave())


def complete(guest: tuple[Vmm, Source]) -> None:
    async def finish() -> None:
        await source.finish()
        await source.hear_the_end()

    vmm, source = guest
    asyncio.run(finish())
    vmm.destination.wait_for_completion(LIMIT)
    source.close()


def interrupted(daemon: RunningDaemon) -> set[str]:
    """The migrations that were ever paused, or handed to another process."""
    events = [json.loads(line) for line in daemon.log.splitlines()]
    told = ("paused", "goes on where another process was killed")
    return {event["migration"] for event in events if event["event"].startswith(told)}


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
    """A process that can open nothing more."""
    taken = {int(entry.name) for entry in Path(f"/proc/{process}/fd").iterdir()}
    first_free = min(set(range(len(taken) + 1)) - taken)
    soft, hard = resource.prlimit(process, resource.RLIMIT_NOFILE)
    resource.prlimit(process, resource.RLIMIT_NOFILE, (first_free, hard))
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
