"""Other processes by descriptor, and what /proc tells of them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator

import pytest

from postcopyd.kernel import memory_file, procfs
from postcopyd.kernel.memory import Mapping
from postcopyd.kernel.processes import pidfd_getfd, pidfd_open, pidfd_send_signal
from tests.kernel.guest_process import GuestProcess
from tests.kernel.watched import PAGE
from tests.support import LIMIT, run_python, wait_readable

NO_SUCH_PROCESS = 1 << 22  # above every limit of process ids


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for its standard input to end."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture
def pidfd(process: subprocess.Popen[bytes]) -> Iterator[int]:
    descriptor = pidfd_open(process.pid)
    yield descriptor
    os.close(descriptor)


def readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def test_a_pidfd_becomes_readable_when_the_process_exits(
    process: subprocess.Popen[bytes], pidfd: int
) -> None:
    assert not os.get_inheritable(pidfd)
    assert not readable(pidfd)
    pidfd_send_signal(pidfd, 0)
    assert not readable(pidfd)
    pidfd_send_signal(pidfd, signal.SIGTERM)
    wait_readable(pidfd)
    assert process.wait(LIMIT) == -signal.SIGTERM
    with pytest.raises(ProcessLookupError, match="sending signal 15: No such process"):
        pidfd_send_signal(pidfd, signal.SIGTERM)


def test_a_process_that_is_not_there_is_named() -> None:
    with pytest.raises(ProcessLookupError, match=f"watching process {NO_SUCH_PROCESS}: "):
        pidfd_open(NO_SUCH_PROCESS)


def test_a_descriptor_taken_from_a_process_is_the_same_file(
    process: subprocess.Popen[bytes], pidfd: int
) -> None:
    assert process.stdin is not None
    theirs = pidfd_getfd(pidfd, 0)
    assert not os.get_inheritable(theirs)
    # A pipe has one inode, whichever end.
    assert os.fstat(theirs).st_ino == os.fstat(process.stdin.fileno()).st_ino
    os.close(theirs)


def test_a_descriptor_that_the_process_has_not_is_named(pidfd: int) -> None:
    with pytest.raises(OSError, match="taking a copy of its descriptor 99: Bad file descriptor"):
        pidfd_getfd(pidfd, 99)


def test_from_a_process_that_has_exited_nothing_can_be_taken(
    process: subprocess.Popen[bytes], pidfd: int
) -> None:
    process.kill()
    process.wait(LIMIT)
    with pytest.raises(ProcessLookupError):
        pidfd_getfd(pidfd, 0)


def test_from_a_process_of_another_user_nothing_can_be_taken(
    process: subprocess.Popen[bytes],
) -> None:
    told = run_python(
        """
import sys
from postcopyd.kernel import procfs
from postcopyd.kernel.processes import pidfd_getfd, pidfd_open, pidfd_send_signal
from tests.kernel.rights import drop_rights
pidfd = pidfd_open(int(sys.argv[1]))
drop_rights()
for attempt in (
    lambda: pidfd_getfd(pidfd, 0),
    lambda: pidfd_send_signal(pidfd, 15),
    lambda: procfs.open_descriptors(int(sys.argv[1])),
    lambda: list(procfs.mappings(int(sys.argv[1]))),
):
    try:
        attempt()
    except PermissionError:
        print("refused")
""",
        str(process.pid),
    )
    assert told.split() == ["refused"] * 4


# -- /proc ---------------------------------------------------------------------------------------


def test_resident_memory_counts_what_is_touched() -> None:
    with Mapping.anonymous(64 << 20) as mapping:
        before = procfs.resident_bytes()
        mapping.view[::PAGE] = b"x" * (mapping.length // PAGE)
        grown = procfs.resident_bytes() - before
    assert 60 << 20 < grown < 70 << 20


def test_mappings_tell_range_rights_and_file() -> None:
    descriptor = memory_file.create("my ram", 4 * PAGE)
    with Mapping.of_file(descriptor, 2 * PAGE, PAGE, writable=False) as mapping:
        (found,) = (mapped for mapped in procfs.mappings() if mapped.start == mapping.address)
        assert found.end == mapping.address + 2 * PAGE
        assert found.permissions == "r--s"
        assert found.offset == PAGE
        assert found.path == "/memfd:my ram (deleted)"
        assert found.inode == os.fstat(descriptor).st_ino
    os.close(descriptor)
    paths = {mapped.path for mapped in procfs.mappings(os.getpid())}
    assert {"[stack]", ""} <= paths


def test_open_descriptors_are_those_that_are_open() -> None:
    before = procfs.open_descriptors()
    with open("/dev/null") as null:
        (new,) = set(procfs.open_descriptors(os.getpid())) - set(before)
        assert (new.number, new.target) == (null.fileno(), "/dev/null")
    assert procfs.open_descriptors() == before


def test_open_descriptors_of_another_process(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    pipe = os.readlink(f"/proc/self/fd/{process.stdin.fileno()}")
    assert procfs.OpenDescriptor(0, pipe) in procfs.open_descriptors(process.pid)


def test_of_a_process_that_is_not_there_proc_tells_nothing() -> None:
    for question in (procfs.resident_bytes, procfs.open_descriptors):
        with pytest.raises(FileNotFoundError):
            question(NO_SUCH_PROCESS)
    with pytest.raises(FileNotFoundError):
        list(procfs.mappings(NO_SUCH_PROCESS))


def test_the_mappings_of_another_process_name_its_program() -> None:
    with GuestProcess(PAGE) as guest:
        program = os.path.realpath(f"/proc/{guest.pid}/exe")
        assert program in {mapped.path for mapped in procfs.mappings(guest.pid)}
        assert guest.address in {mapped.start for mapped in procfs.mappings(guest.pid)}
