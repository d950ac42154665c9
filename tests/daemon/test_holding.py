"""What the supervisor holds, and in which order it tells the service manager."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from postcopyd.daemon.holding import Holding
from postcopyd.daemon.notify import ServiceManager
from postcopyd.kernel import memory_file, open_files
from tests.support import belongings


class Recorder(ServiceManager):
    """Writes down what it is told to keep and to drop."""

    def __init__(self) -> None:
        super().__init__({})
        self.changes: list[str] = []

    def store(self, name: str, descriptor: int, instead_of: Sequence[str] = ()) -> None:
        self.changes += [*(f"-{other}" for other in instead_of), f"+{name}"]

    def unstore(self, name: str) -> None:
        self.changes.append(f"-{name}")


@pytest.fixture
def manager() -> Recorder:
    return Recorder()


@pytest.fixture
def holding(manager: Recorder, assert_nothing_left: None) -> Iterator[Holding]:
    holding = Holding(manager)
    yield holding
    holding.close()


def a_descriptor() -> int:
    return os.open("/dev/null", os.O_RDONLY)


def test_what_takes_anothers_place_is_kept_before_that_is_dropped(
    holding: Holding, manager: Recorder
) -> None:
    for _ in range(3):
        holding.hold("vm0", "listener", a_descriptor())
    holding.release("vm0", "listener")
    assert manager.changes == [
        *("+vm0/listener", "+vm0/listener#2", "-vm0/listener"),
        *("+vm0/listener#3", "-vm0/listener#2", "-vm0/listener#3"),
    ]


def test_the_same_again_stays_as_it_is_kept(holding: Holding, manager: Recorder) -> None:
    first = memory_file.create("ram", 4096)
    again = os.dup(first)
    holding.hold("vm0", "memory-file-0", first)
    holding.hold("vm0", "memory-file-0", again)
    assert list(holding) == [("vm0", "memory-file-0", first)]
    assert manager.changes == ["+vm0/memory-file-0"]


def test_one_file_by_two_names_is_not_the_same_to_the_manager(holding: Holding) -> None:
    file = memory_file.create("ram", 4096)
    copy = os.dup(file)
    holding.hold("vm0", "memory-file-0", file)
    holding.hold("vm0", "memory-file-1", copy)
    one, other = (descriptor for _, _, descriptor in holding)
    assert not open_files.is_same(one, other)
    assert os.path.samestat(os.fstat(one), os.fstat(other))


@contextmanager
def forbidden(file: int) -> Iterator[None]:
    """Nobody may open it again: its owner has taken the right away."""
    os.fchmod(file, 0)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def leased(file: int) -> Iterator[None]:
    """Who opens it for writing waits for whoever has the lease, 45 s by default."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    try:
        yield
    finally:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        signal.signal(signal.SIGIO, before)


not_to_be_opened_again = pytest.mark.parametrize("obstacle", [forbidden, leased])
Obstacle = Callable[[int], AbstractContextManager[None]]


@not_to_be_opened_again
@pytest.mark.timeout(10)
def test_a_file_that_may_not_be_opened_again_is_kept_by_its_newest_name_and_its_migration_is_named(
    holding: Holding, manager: Recorder, capsys: pytest.CaptureFixture[str], obstacle: Obstacle
) -> None:
    file = memory_file.create("ram", 4096)
    copy = os.dup(file)
    holding.hold("vm0", "memory-file-0", file)
    with obstacle(file):
        holding.hold("vm0", "vmm-1-memory-file-0", copy)
    assert [descriptor for _, _, descriptor in holding] == [file, copy]
    assert "keeps a memory file by its newest name only" in "".join(capsys.readouterr())
    assert manager.changes == [
        "+vm0/memory-file-0",
        "-vm0/memory-file-0",
        "+vm0/vmm-1-memory-file-0",
    ]


@not_to_be_opened_again
@pytest.mark.timeout(10)
def test_a_file_that_may_not_be_opened_again_is_kept_when_its_vmm_has_taken_anothers_place(
    holding: Holding, manager: Recorder, obstacle: Obstacle
) -> None:
    before, after = (memory_file.create("ram", 4096) for _ in range(2))
    holding.hold("vm0", "vmm-memory-file-0", before)
    holding.hold("vm0", "vmm-1-memory-file-0", after)
    with obstacle(after):
        holding.hold("vm0", "vmm-memory-file-0", os.dup(after))
    holding.release("vm0", "vmm-1-memory-file-0")
    assert manager.changes == [
        *("+vm0/vmm-memory-file-0", "+vm0/vmm-1-memory-file-0"),
        *("-vm0/vmm-1-memory-file-0", "+vm0/vmm-memory-file-0#2", "-vm0/vmm-memory-file-0"),
    ]
    holding.forget("vm0")
    assert manager.changes[5:] == ["-vm0/vmm-memory-file-0#2"]


def test_what_can_be_opened_but_once_is_kept_by_its_last_name(
    holding: Holding, manager: Recorder
) -> None:
    before, after = os.eventfd(0, os.EFD_CLOEXEC), os.eventfd(0, os.EFD_CLOEXEC)
    holding.hold("vm0", "vmm-userfaultfd", before)
    holding.hold("vm0", "vmm-1-userfaultfd", after)
    holding.hold("vm0", "vmm-userfaultfd", os.dup(after))
    holding.release("vm0", "vmm-1-userfaultfd")
    assert manager.changes == [
        *("+vm0/vmm-userfaultfd", "+vm0/vmm-1-userfaultfd"),
        *("-vm0/vmm-1-userfaultfd", "+vm0/vmm-userfaultfd#2", "-vm0/vmm-userfaultfd"),
    ]
    holding.release("vm0", "vmm-userfaultfd")
    assert manager.changes[-1] == "-vm0/vmm-userfaultfd#2"


def test_what_cannot_be_kept_is_closed_and_the_old_one_stays(
    holding: Holding, manager: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = a_descriptor()
    holding.hold("vm0", "listener", first)

    def refuse(name: str, descriptor: int, instead_of: Sequence[str] = ()) -> None:
        raise OSError(errno.EMFILE, "no")

    monkeypatch.setattr(manager, "store", refuse)
    with pytest.raises(OSError, match="no"):
        holding.hold("vm0", "listener", a_descriptor())
    assert list(holding) == [("vm0", "listener", first)]


async def test_what_cannot_be_kept_has_no_other_name_of_it_dropped(tmp_path: Path) -> None:
    before = belongings()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.setblocking(False)
        manager = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        holding = Holding(manager)
        userfaultfd = os.eventfd(0, os.EFD_CLOEXEC)
        holding.hold("vm0", "vmm-1-userfaultfd", userfaultfd)
        assert b"FDNAME=vm0/vmm-1-userfaultfd" in heard.recv(4096)
        copy = os.dup(userfaultfd)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                holding.hold("vm0", "vmm-userfaultfd", copy)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with pytest.raises(BlockingIOError):
            heard.recv(4096)
        # And it is still known by which name to drop it.
        holding.release("vm0", "vmm-1-userfaultfd")
        assert heard.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=vm0/vmm-1-userfaultfd"
        holding.close()
        manager.close()
    assert belongings() == before


@pytest.mark.parametrize("names", [("vm0/a", "vm0/a#2"), ("vm0/a#2", "vm0/a")])
def test_of_two_that_a_killed_predecessor_has_left_the_newer_one_counts(
    holding: Holding, manager: Recorder, names: tuple[str, str]
) -> None:
    stored = {name: a_descriptor() for name in names}
    holding.take_over(dict(stored))
    assert list(holding) == [("vm0", "a", stored["vm0/a#2"])]
    holding.forget("vm0")
    assert manager.changes == ["-vm0/a", "-vm0/a#2"]


def test_what_the_manager_hands_over_at_every_start_it_need_not_drop(
    holding: Holding, manager: Recorder
) -> None:
    holding.hold_until_the_end("", "control", a_descriptor())
    holding.release("", "control")
    assert manager.changes == []
