"""The daemon as a process: it starts, reports, stays small, and stops as its guests need it."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from postcopyd.cli.control_client import ControlError
from postcopyd.daemon.sockets import open_unix_listener
from postcopyd.vmm.client import MigrationFailed
from tests.daemon.daemon_process import RunningDaemon, configuration, running_daemon
from tests.daemon.hosted import LENGTH, PAGE, Source, Vmm
from tests.support import LIMIT, ROOT

IDLE_LIMIT = 60 << 20
"""Resident bytes of a daemon without a migration."""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path) as daemon:
        yield daemon


@contextmanager
def guest_that_lives_here(daemon: RunningDaemon, name: str) -> Iterator[tuple[Vmm, Source]]:
    """A migration whose package has come: its source cannot take the guest back."""
    vmm = Vmm(daemon.handoff, name)
    source = Source(vmm.destination.listen[0])

    async def send() -> None:
        await source.begin()
        await source.send_package()

    try:
        asyncio.run(send())
        assert vmm.destination.wait_for_device_state(LIMIT) == b""
        vmm.destination.loaded()
        yield vmm, source
    finally:
        source.close()
        asyncio.run(vmm.leave())


# -- starting ----------------------------------------------------------------------------------


def test_an_idle_daemon_is_small_locked_and_has_one_thread(daemon: RunningDaemon) -> None:
    assert daemon.memory("VmRSS") <= IDLE_LIMIT
    assert daemon.memory("VmLck") > 0
    assert len(list(Path(f"/proc/{daemon.process.pid}/task").iterdir())) == 1


def test_a_daemon_that_may_not_lock_says_what_to_do(tmp_path: Path) -> None:
    wrapper = (sys.executable, "-c", _WITHOUT_RIGHT_TO_LOCK)
    with running_daemon(tmp_path, wrapper=wrapper) as daemon:
        assert daemon.memory("VmLck") == 0
        assert "our memory may be swapped out" in daemon.log
        assert "LimitMEMLOCK=infinity" in daemon.log


_WITHOUT_RIGHT_TO_LOCK = """
import ctypes, os, resource, sys
CAP_IPC_LOCK, PR_CAPBSET_DROP = 14, 24
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_memory_need_not_be_locked(tmp_path: Path) -> None:
    with running_daemon(tmp_path, "memory_lock = false\n") as daemon:
        assert daemon.memory("VmLck") == 0
        assert "swapped" not in daemon.log


def test_the_sockets_are_there_when_it_is_ready(tmp_path: Path) -> None:
    more = "control_mode = 0o600\nhandoff_mode = 0o666\n"
    with running_daemon(tmp_path, more) as daemon:
        assert stat.S_IMODE(daemon.control.stat().st_mode) == 0o600
        assert stat.S_IMODE(daemon.handoff.stat().st_mode) == 0o666
        daemon.terminate()
        assert daemon.ended() == 0
        assert not daemon.control.exists() and not daemon.handoff.exists()


def test_migrations_of_the_configuration_are_there_from_the_start(tmp_path: Path) -> None:
    more = (
        f'[[migration]]\nname = "vm0"\nlisten = "unix:{tmp_path}/stream"\n'
        f'[[migration]]\nname = "vm1"\nhandoff = "{tmp_path}/own"\n'
    )
    with running_daemon(tmp_path, more) as daemon:
        first, second = daemon.client.list()
        assert (first["name"], first["listen"]) == ("vm0", [f"unix:{tmp_path}/stream"])
        assert (second["name"], second["handoff"]) == ("vm1", f"{tmp_path}/own")
        daemon.terminate()
        assert daemon.ended() == 0
    assert not (tmp_path / "stream").exists() and not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ('[[migration]]\nname = "vm0"\nlisten = "unix:/no/such/s"', "migration 'vm0': cannot list"),
        (
            '[tls]\ncertificate = "/no/c"\nkey = "/no/k"\nca_certificates = "/no/a"',
            "tls.certificate: cannot read /no/c: No such file",
        ),
        ('[log]\nformat = "journal"', "no journald listens here"),
    ],
)
def test_what_cannot_be_ends_the_start_with_its_reason(
    tmp_path: Path, more: str, reason: str
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "postcopyd.cli.postcopyd", "serve"),
            *("--config", str(configuration(tmp_path, more))),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "control.sock").exists()


def test_a_second_daemon_leaves_the_first_alone(daemon: RunningDaemon, tmp_path: Path) -> None:
    second = subprocess.run(
        [
            *(sys.executable, "-m", "postcopyd.cli.postcopyd", "serve"),
            *("--config", str(tmp_path / "postcopyd.toml")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert second.returncode == 1
    assert "a process listens there already" in second.stderr
    assert daemon.client.list() == []


def test_sockets_of_systemd_are_used_and_left(tmp_path: Path) -> None:
    control = open_unix_listener(str(tmp_path / "control.sock"), 0o600, "")
    handoff = open_unix_listener(str(tmp_path / "handoff.sock"), 0o600, "")
    descriptors = ",".join(str(listener.fileno()) for listener in (control, handoff))
    for listener in (control, handoff):
        listener.set_inheritable(True)
    wrapper = (sys.executable, "-c", _AS_SYSTEMD, descriptors)
    with control, handoff, running_daemon(tmp_path, wrapper=wrapper) as daemon:
        vmm = Vmm(daemon.handoff, "vm0")
        assert daemon.client.show("vm0")["vmm"] is not None
        asyncio.run(vmm.leave())
        daemon.terminate()
        assert daemon.ended() == 0
        assert daemon.control.is_socket() and daemon.handoff.is_socket()


_AS_SYSTEMD = """
import os, sys
descriptors = [os.dup(int(number)) for number in sys.argv[1].split(",")]
for number, descriptor in enumerate(descriptors):
    os.dup2(descriptor, 3 + number)
    os.set_inheritable(3 + number, True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(descriptors))}
os.execv(sys.argv[2], sys.argv[2:])
"""


# -- running -----------------------------------------------------------------------------------


def test_the_status_follows_the_migrations(daemon: RunningDaemon) -> None:
    daemon.client.create("vm0")
    assert daemon.notification() == {"STATUS": "1 migration under way: 1 none"}
    daemon.client.cancel("vm0")
    daemon.wait_for_status(lambda status: status == "no migration is under way")


def test_the_watchdog_is_fed(tmp_path: Path) -> None:
    with running_daemon(tmp_path, environment={"WATCHDOG_USEC": "200000"}) as daemon:
        assert [daemon.notification() for _ in range(3)] == [{"WATCHDOG": "1"}] * 3


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that every user can reach, as /run/postcopyd is."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_vmm_of_another_user_is_refused(public_directory: Path) -> None:
    with running_daemon(public_directory, "handoff_mode = 0o666\n") as daemon:
        with pytest.raises(MigrationFailed, match=r"user nobody \(65534\) is not allowed"):
            as_nobody(lambda: Vmm(daemon.handoff, "vm0"))
        assert daemon.client.list() == []


def test_a_client_of_another_user_is_refused(public_directory: Path) -> None:
    with (
        running_daemon(public_directory, "control_mode = 0o666\n") as daemon,
        pytest.raises(ControlError, match="user 65534 is not allowed to control postcopyd"),
    ):
        as_nobody(daemon.client.list)


# -- stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_daemon_well(daemon: RunningDaemon, number: signal.Signals) -> None:
    daemon.process.send_signal(number)
    assert daemon.notification()["STOPPING"] == "1"
    assert daemon.ended() == 0
    assert "Traceback" not in daemon.log


def test_a_guest_whose_source_can_go_on_is_told_at_once(daemon: RunningDaemon) -> None:
    vmm = Vmm(daemon.handoff, "vm0")
    daemon.terminate()
    assert daemon.ended() == 0
    with pytest.raises(MigrationFailed, match="postcopyd is being stopped"):
        vmm.destination.wait_for_device_state(LIMIT)
    asyncio.run(vmm.leave())


def test_a_guest_that_lives_here_is_waited_for_however_often_it_is_told(
    daemon: RunningDaemon,
) -> None:
    with guest_that_lives_here(daemon, "vm0") as (vmm, source):
        daemon.terminate()
        daemon.wait_for_status(lambda status: "these have ended: vm0" in status)
        daemon.terminate()
        with pytest.raises(ControlError, match="postcopyd is being stopped"):
            daemon.client.create("vm1")
        assert daemon.client.show("vm0")["state"] == "running"
        assert daemon.process.poll() is None
        asyncio.run(source.finish())
        vmm.destination.wait_for_completion(LIMIT)
        asyncio.run(source.hear_the_end())
    assert daemon.ended() == 0
    assert f"pages={LENGTH // PAGE}" in daemon.log


def test_a_guest_that_is_waited_for_can_be_given_up(daemon: RunningDaemon) -> None:
    with guest_that_lives_here(daemon, "vm0") as (vmm, _):
        daemon.terminate()
        daemon.wait_for_status(lambda status: "postcopyctl cancel --force NAME" in status)
        daemon.client.cancel("vm0", force=True)
        assert daemon.ended() == 0
        with pytest.raises(MigrationFailed, match="cancelled by an operator"):
            vmm.destination.wait_for_completion(LIMIT)


def test_a_daemon_that_need_not_wait_does_not(tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path, "wait_at_shutdown = false\n") as daemon,
        guest_that_lives_here(daemon, "vm0") as (vmm, _),
    ):
        daemon.terminate()
        assert daemon.ended() == 0
        with pytest.raises(MigrationFailed, match="postcopyd is being stopped"):
            vmm.destination.wait_for_completion(LIMIT)


def as_nobody(action: Callable[[], object]) -> None:
    """Call `action` with the effective user and group nobody."""
    os.setegid(65534)
    os.seteuid(65534)
    try:
        action()
    finally:
        os.seteuid(0)
        os.setegid(0)
