"""Adopting processes that know nothing of us."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import signal
from collections.abc import Iterator

import pytest

from postcopyd.kernel import injection
from postcopyd.kernel.userfaultfd import (
    EVENT_PAGEFAULT,
    EVENT_REMOVE,
    Feature,
    Operation,
    RegisterMode,
    features_of,
)
from postcopyd.vmm.adoption import AdoptedProcess, adopt
from tests.kernel.target import Target
from tests.support import belongings, wait_readable

PAGE = mmap.PAGESIZE
PAGES = 16
WANTED = Feature.THREAD_ID | Feature.EVENT_REMOVE | Feature.MISSING_SHMEM


@pytest.fixture(autouse=True)
def nothing_left(assert_nothing_left: None) -> None:
    """Every test here."""


class Adopted:
    """A process with 16 pages of memory that hold 1, 2, ...; it reads them when asked."""

    def __init__(self, target: Target, process: AdoptedProcess) -> None:
        self.target = target
        self.process = process
        self.address = int(target.line())

    def watch(self) -> None:
        self.process.userfaultfd.register(
            self.address, PAGES * PAGE, RegisterMode.MISSING, Operation.COPY
        )

    def ask(self, page: int) -> None:
        assert self.target.process.stdin is not None
        self.target.process.stdin.write(f"{page}\n".encode())

    def read(self, page: int) -> int:
        self.ask(page)
        return int(self.target.line())

    def event(self) -> tuple[int, int, int, int]:
        wait_readable(self.process.userfaultfd.fileno())
        (event,) = self.process.userfaultfd.read_events()
        return event

    def place(self, page: int, value: int) -> None:
        content = ctypes.create_string_buffer(bytes([value]) * PAGE, PAGE)
        placed = self.process.userfaultfd.copy(
            self.address + page * PAGE, ctypes.addressof(content), PAGE
        )
        assert placed == PAGE


@pytest.fixture
def adopted() -> Iterator[Adopted]:
    with Target("memory") as target:
        process = adopt(target.pid, Feature.THREAD_ID)
        yield Adopted(target, process)
        process.close()


# -- what an adopted process is good for ---------------------------------------------------------


def test_both_have_the_userfaultfd_and_its_handshake_is_done() -> None:
    with Target("read") as target:
        fields, before = target.fields(), target.descriptors()
        process = adopt(target.pid, WANTED | Feature(1 << 40))
        target.wait_for_fields(fields)
        assert process.pid == target.pid
        assert process.descriptor == len(before)
        assert target.descriptors() == [*before, "anon_inode:[userfaultfd]"]
        assert features_of(process.descriptor, target.pid) == WANTED
        for descriptor in (process.pidfd, process.userfaultfd.fileno()):
            assert not os.get_inheritable(descriptor)
        assert not os.get_blocking(process.userfaultfd.fileno())
        process.close()
        process.close()
        assert process.pidfd == -1
        assert target.descriptors() == [*before, "anon_inode:[userfaultfd]"]
        assert target.end().startswith("0 -")


def test_a_fault_is_served(adopted: Adopted) -> None:
    assert adopted.read(3) == 4
    adopted.watch()
    adopted.process.advise([(adopted.address, PAGES * PAGE)], mmap.MADV_DONTNEED)
    adopted.ask(3)
    event, _, address, thread = adopted.event()
    assert (event, address, thread) == (
        EVENT_PAGEFAULT,
        adopted.address + 3 * PAGE,
        adopted.target.pid,
    )
    adopted.place(3, 77)
    assert int(adopted.target.line()) == 77


def test_a_thread_that_waits_for_a_page_can_be_stopped_and_waits_on(adopted: Adopted) -> None:
    adopted.watch()
    adopted.process.advise([(adopted.address, 8 * PAGE)], mmap.MADV_DONTNEED)
    adopted.ask(3)
    adopted.event()
    adopted.process.advise([(adopted.address + 8 * PAGE, PAGE)], mmap.MADV_DONTNEED)
    adopted.event()
    adopted.place(3, 77)
    assert int(adopted.target.line()) == 77


def test_its_own_copy_keeps_threads_waiting_when_ours_is_closed(adopted: Adopted) -> None:
    adopted.watch()
    adopted.process.advise([(adopted.address, PAGES * PAGE)], mmap.MADV_DONTNEED)
    adopted.ask(3)
    adopted.event()
    adopted.process.close()
    assert adopted.target.process.stdout is not None
    assert select.select([adopted.target.process.stdout], [], [], 0.2)[0] == []


def test_advice_is_followed_range_by_range(adopted: Adopted) -> None:
    ranges = [(adopted.address, 2 * PAGE), (adopted.address + 5 * PAGE, PAGE)]
    adopted.process.advise(ranges, mmap.MADV_DONTNEED)
    assert [adopted.read(page) for page in range(8)] == [0, 0, 3, 4, 5, 0, 7, 8]
    adopted.process.advise([], mmap.MADV_DONTNEED)


def test_advice_that_is_refused_names_its_range(adopted: Adopted) -> None:
    ranges = [(adopted.address, PAGE), (PAGE, PAGE), (adopted.address + PAGE, PAGE)]
    with pytest.raises(OSError, match=r"madvise of 0x1000\+0x1000 in process \d+: ") as refused:
        adopted.process.advise(ranges, mmap.MADV_DONTNEED)
    assert refused.value.errno == errno.ENOMEM
    assert [adopted.read(page) for page in range(2)] == [0, 2]


def test_advice_that_waits_for_its_event_is_given_up_and_ends_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(injection, "CALL_LIMIT", 0.1)
    with Target("memory") as target:
        process = adopt(target.pid, WANTED)
        adopted = Adopted(target, process)
        adopted.watch()
        with pytest.raises(TimeoutError, match=r"has not stopped in 0\.1 s"):
            process.advise([(adopted.address, PAGE)], mmap.MADV_DONTNEED)
        assert adopted.event() == (EVENT_REMOVE, adopted.address, adopted.address + PAGE, 0)
        assert adopted.read(5) == 6
        process.close()


def test_a_release_closes_the_copy_there(adopted: Adopted) -> None:
    before = adopted.target.descriptors()
    adopted.process.release()
    assert adopted.target.descriptors() == before[:-1]
    assert adopted.read(5) == 6


def test_a_release_closes_nothing_that_has_got_the_number_since(adopted: Adopted) -> None:
    process, ours = adopted.process, adopted.process.userfaultfd
    adopt_again = adopt(process.pid, Feature.THREAD_ID)
    # As one whose own copy was closed for a predecessor, and whose number is another's by now.
    mistaken = AdoptedProcess(process.pid, process.pidfd, ours, adopt_again.descriptor)
    before = adopted.target.descriptors()
    mistaken.release()
    assert adopted.target.descriptors() == before
    process.release()
    assert len(adopted.target.descriptors()) == len(before) - 1
    process.release()
    assert len(adopted.target.descriptors()) == len(before) - 1
    adopt_again.close()


def test_an_exit_is_seen_and_told(adopted: Adopted) -> None:
    assert select.select([adopted.process.pidfd], [], [], 0)[0] == []
    os.kill(adopted.target.pid, signal.SIGKILL)
    wait_readable(adopted.process.pidfd)
    with pytest.raises(ProcessLookupError):
        adopted.process.advise([(adopted.address, PAGE)], mmap.MADV_DONTNEED)
    adopted.process.release()


def test_many_adoptions_leave_nothing_behind() -> None:
    with Target("ppoll") as target:
        fields, there = target.fields(), target.descriptors()
        here = belongings()
        for _ in range(100):
            process = adopt(target.pid, WANTED)
            process.release()
            process.close()
        target.wait_for_fields(fields)
        assert target.descriptors() == there
        assert belongings() == here
        assert target.end().startswith("1 -")


def test_where_the_system_call_is_refused_the_device_is_used() -> None:
    with Target("filtered, error") as target:
        before = target.descriptors()
        adopt(target.pid, WANTED).close()
        assert target.descriptors() == [*before, "anon_inode:[userfaultfd]"]
        assert target.end() == "back"
