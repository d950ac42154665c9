"""What the supervisor holds, and in which order it tells the service manager."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from postcopyd.daemon.holding import Holding
from postcopyd.daemon.notify import ServiceManager
from postcopyd.kernel import memory_file, open_files
from tests.support import belongings


class Recorder(ServiceManager):
    """Writes down what it is told to keep and to drop, and keeps it as systemd does."""

    def __init__(self) -> None:
        super().__init__({})
        self.changes: list[str] = []
        self.kept: dict[str, int] = {}

    def store(self, name: str, descriptor: int, instead_of: Sequence[str] = ()) -> None:
        for other in instead_of:
            self.unstore(other)
        self.changes.append(f"+{name}")
        if any(open_files.is_same(descriptor, other) for other in self.kept.values()):
            os.close(descriptor)
        else:
            self.kept[name] = descriptor

    def unstore(self, name: str) -> None:
        self.changes.append(f"-{name}")
        descriptor = self.kept.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def has(self, name: str, descriptor: int) -> bool:
        """Tell whether that is what it would hand over by that name."""
        return name in self.kept and open_files.is_same(self.kept[name], descriptor)

    def close(self) -> None:
        while self.kept:
            os.close(self.kept.popitem()[1])


@pytest.fixture
def manager(assert_nothing_left: None) -> Iterator[Recorder]:
    manager = Recorder()
    yield manager
    manager.close()


@pytest.fixture
def holding(manager: Recorder) -> Iterator[Holding]:
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
    os.seteuid(0)
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
    own = os.dup(file)
    fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    try:
        yield
    finally:
        fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(own)
        signal.signal(signal.SIGIO, before)


@contextmanager
def executed(file: int) -> Iterator[None]:
    """Nobody may write to what is a running program."""
    os.pwrite(file, Path("/bin/sleep").read_bytes(), 0)
    program = f"/proc/self/fd/{file}"
    with subprocess.Popen(["sleep", "60"], executable=program, pass_fds=[file]) as running:
        try:
            yield
        finally:
            running.kill()


@contextmanager
def no_obstacle(file: int) -> Iterator[None]:
    yield


def a_memory_file() -> int:
    return memory_file.create("ram", 4096)


def no_memory_file() -> int:
    """Return a descriptor of something that can be opened but once, as a userfaultfd."""
    return os.eventfd(0, os.EFD_CLOEXEC)


Obstacle = Callable[[int], AbstractContextManager[None]]
not_to_be_opened_again = pytest.mark.parametrize("obstacle", [forbidden, leased, executed])
of_any_kind = pytest.mark.parametrize(
    ("make", "obstacle"),
    [
        (a_memory_file, no_obstacle),
        (a_memory_file, forbidden),
        (a_memory_file, leased),
        (a_memory_file, executed),
        (no_memory_file, no_obstacle),
    ],
    ids=["memory file", "forbidden", "leased", "executed", "no memory file"],
)


@not_to_be_opened_again
@pytest.mark.timeout(10)
def test_a_file_that_may_not_be_opened_again_is_kept_by_one_name_and_its_migration_is_named(
    holding: Holding, manager: Recorder, capsys: pytest.CaptureFixture[str], obstacle: Obstacle
) -> None:
    file = a_memory_file()
    copy = os.dup(file)
    holding.hold("vm0", "vmm-memory-file-0", file)
    with obstacle(file):
        holding.hold("vm0", "vmm-1-memory-file-0", copy)
    assert [descriptor for _, _, descriptor in holding] == [file, copy]
    assert "keeps a memory file by one of its names only" in "".join(capsys.readouterr())
    assert manager.changes == ["+vm0/vmm-memory-file-0"]
    holding.release("vm0", "vmm-memory-file-0")
    assert manager.has("vm0/vmm-1-memory-file-0", copy)


@of_any_kind
@pytest.mark.timeout(10)
def test_a_vmm_that_takes_anothers_place_is_kept_at_every_step(
    holding: Holding, manager: Recorder, make: Callable[[], int], obstacle: Obstacle
) -> None:
    before, after = make(), make()
    holding.hold("vm0", "vmm-x", before)
    with obstacle(after):
        holding.hold("vm0", "vmm-1-x", after)
        assert manager.has("vm0/vmm-x", before) and manager.has("vm0/vmm-1-x", after)
        holding.hold("vm0", "vmm-x", os.dup(after))
        (its,) = [descriptor for _, name, descriptor in holding if name == "vmm-x"]
        assert manager.has("vm0/vmm-x#2", its)
        holding.release("vm0", "vmm-1-x")
    assert set(manager.kept) == {"vm0/vmm-x#2"}
    assert manager.has("vm0/vmm-x#2", its)
    holding.forget("vm0")
    assert not manager.kept


@of_any_kind
@pytest.mark.parametrize("given_up", [False, True], ids=["it takes its place", "it is given up"])
@pytest.mark.timeout(10)
def test_a_vmm_is_kept_when_one_with_the_same_is_to_take_its_place(
    holding: Holding,
    manager: Recorder,
    make: Callable[[], int],
    obstacle: Obstacle,
    given_up: bool,
) -> None:
    descriptor = make()
    holding.hold("vm0", "vmm-x", descriptor)
    with obstacle(descriptor):
        holding.hold("vm0", "vmm-1-x", os.dup(descriptor))
        assert manager.has("vm0/vmm-x", descriptor)
        if not given_up:
            holding.hold("vm0", "vmm-x", os.dup(descriptor))
            assert manager.has("vm0/vmm-x", descriptor)
        holding.release("vm0", "vmm-1-x")
    assert set(manager.kept) == {"vm0/vmm-x"}
    assert manager.has("vm0/vmm-x", descriptor)
    holding.forget("vm0")
    assert not manager.kept


@of_any_kind
@pytest.mark.timeout(10)
def test_a_vmm_that_has_the_same_in_another_order_is_kept(
    holding: Holding, manager: Recorder, make: Callable[[], int], obstacle: Obstacle
) -> None:
    one, other = make(), make()
    again = [os.dup(descriptor) for descriptor in (other, one, other, one)]
    holding.hold("vm0", "vmm-0", one)
    holding.hold("vm0", "vmm-1", other)
    with obstacle(one), obstacle(other):
        for name, descriptor in zip(["vmm-1-0", "vmm-1-1", "vmm-0", "vmm-1"], again, strict=True):
            holding.hold("vm0", name, descriptor)
        holding.release("vm0", "vmm-1-0")
        holding.release("vm0", "vmm-1-1")
    for _, name, descriptor in holding:
        (kept_as,) = [kept for kept in manager.kept if kept.partition("#")[0] == f"vm0/{name}"]
        assert manager.has(kept_as, descriptor)
    assert len(manager.kept) == 2
    holding.forget("vm0")
    assert not manager.kept


def test_what_is_forgotten_is_not_kept_by_another_name_first(
    holding: Holding, manager: Recorder
) -> None:
    first = no_memory_file()
    holding.hold("vm0", "vmm-x", first)
    holding.hold("vm0", "vmm-1-x", os.dup(first))
    holding.forget("vm0")
    assert manager.changes == ["+vm0/vmm-x", "-vm0/vmm-x"]


def test_what_cannot_be_kept_is_closed_and_the_old_one_stays(
    holding: Holding, manager: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = a_descriptor(), a_descriptor()
    holding.hold("vm0", "listener", first)
    with no_more_descriptors(), pytest.raises(OSError, match="Too many open files"):
        holding.hold("vm0", "listener", second)
    assert list(holding) == [("vm0", "listener", first)]
    assert manager.has("vm0/listener", first)


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_there_is_no_descriptor_what_is_let_go_is_kept_by_its_other_name_all_the_same(
    holding: Holding, manager: Recorder
) -> None:
    first = no_memory_file()
    copy = os.dup(first)
    holding.hold("vm0", "vmm-x", first)
    holding.hold("vm0", "vmm-1-x", copy)
    with no_more_descriptors():
        holding.release("vm0", "vmm-x")
    assert manager.has("vm0/vmm-1-x", copy)


async def test_what_cannot_be_kept_has_no_other_name_of_it_dropped(tmp_path: Path) -> None:
    belonged = belongings()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.setblocking(False)
        manager = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        holding = Holding(manager)
        before, after = no_memory_file(), no_memory_file()
        copy = os.dup(after)
        holding.hold("vm0", "vmm-userfaultfd", before)
        assert b"FDNAME=vm0/vmm-userfaultfd" in heard.recv(4096)
        holding.hold("vm0", "vmm-1-userfaultfd", after)
        assert b"FDNAME=vm0/vmm-1-userfaultfd" in heard.recv(4096)
        with no_more_descriptors(), pytest.raises(OSError, match="Too many open files"):
            holding.hold("vm0", "vmm-userfaultfd", copy)
        with pytest.raises(BlockingIOError):
            heard.recv(4096)
        # And it is still known by which name to drop it.
        holding.release("vm0", "vmm-1-userfaultfd")
        assert heard.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=vm0/vmm-1-userfaultfd"
        holding.close()
        manager.close()
    assert belongings() == belonged


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
