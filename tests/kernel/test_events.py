"""Events: what the kernel reports, how it is read, and what waits for the reading."""

from __future__ import annotations

import mmap
import os

import pytest

from postcopyd.kernel.memory import Mapping
from postcopyd.kernel.userfaultfd import (
    CHANGING,
    EVENT_FORK,
    EVENT_PAGEFAULT,
    EVENT_REMAP,
    EVENT_REMOVE,
    EVENT_UNMAP,
    PAGEFAULT_WRITE,
    Feature,
    Userfaultfd,
    is_userfaultfd,
)
from tests.kernel.guest_process import GuestProcess
from tests.kernel.watched import PAGE, Watched
from tests.support import (
    GuestRead,
    GuestThread,
    GuestWrite,
    libc,
    wait_readable,
    wait_until,
)

MAYMOVE_FIXED = 3


def test_without_events_reading_does_not_wait() -> None:
    with Watched.anonymous() as watched:
        assert list(watched.userfaultfd.read_events()) == []


def test_a_fault_tells_the_page_and_whether_it_was_a_write() -> None:
    with Watched.anonymous() as watched:
        reader = GuestRead(watched.page(1) + 0x123)
        assert watched.event() == (EVENT_PAGEFAULT, 0, watched.page(1), 0)
        writer = GuestWrite(watched.page(2) + 0x123, 7)
        assert watched.event() == (EVENT_PAGEFAULT, PAGEFAULT_WRITE, watched.page(2), 0)
        watched.copy(0, 8)
        reader.result()
        writer.result()


def test_a_fault_tells_byte_and_thread_where_that_was_asked_for() -> None:
    with Watched.anonymous(8, Feature.EXACT_ADDRESS | Feature.THREAD_ID) as watched:
        guest = GuestRead(watched.page(1) + 0x123)
        assert watched.event() == (EVENT_PAGEFAULT, 0, watched.page(1) + 0x123, guest.thread_id)
        watched.copy(1)
        guest.result()


def test_more_events_than_one_read_takes_come_with_the_next_and_each_once() -> None:
    count = 150
    with Watched.anonymous(count) as watched:
        guests = [GuestRead(watched.page(page)) for page in range(count)]
        seen: list[int] = []
        sizes: list[int] = []
        while len(seen) < count:
            events = watched.events()
            sizes.append(len(events))
            seen += [address for _, _, address, _ in events]
        assert sorted(seen) == [watched.page(page) for page in range(count)]
        assert max(sizes) <= 64
        assert list(watched.userfaultfd.read_events()) == []
        watched.copy(0, count)
        for page, guest in enumerate(guests):
            assert guest.data() == watched.content(page)[:8]


def test_many_waiting_events_are_read_64_at_a_time() -> None:
    count = 100
    with Watched.anonymous(count) as watched:
        guests = [GuestRead(watched.page(page)) for page in range(count)]
        fdinfo = f"/proc/self/fdinfo/{watched.userfaultfd.fileno()}"

        def all_wait() -> bool:
            with open(fdinfo) as file:
                return f"pending:\t{count}\n" in file.read()

        wait_until(all_wait)
        assert [len(watched.events()) for _ in range(2)] == [64, count - 64]
        watched.copy(0, count)
        for guest in guests:
            guest.result()


def test_two_threads_at_one_page_are_two_faults_and_one_copy_ends_both() -> None:
    with Watched.anonymous() as watched:
        guests = [GuestRead(watched.page(5)) for _ in range(2)]
        seen = 0
        while seen < 2:
            seen += len(watched.events())
        watched.copy(5)
        assert [guest.data() for guest in guests] == [watched.content(5)[:8]] * 2


def test_faults_are_handed_out_before_a_removal_that_came_first() -> None:
    with Watched.anonymous(8, Feature.EVENT_REMOVE) as watched:
        watched.copy(0)
        remover = GuestThread(libc.madvise, watched.address, PAGE, mmap.MADV_DONTNEED)
        wait_readable(watched.userfaultfd.fileno())
        guest = GuestRead(watched.page(3))
        fdinfo = f"/proc/self/fdinfo/{watched.userfaultfd.fileno()}"

        def fault_waits() -> bool:
            with open(fdinfo) as file:
                return "pending:\t1\n" in file.read()

        wait_until(fault_waits)
        assert [event[0] for event in watched.events()] == [EVENT_PAGEFAULT, EVENT_REMOVE]
        assert remover.result() == 0
        watched.copy(3)
        guest.result()


def test_memory_that_is_unmapped_is_reported_and_who_did_it_waits_for_the_reading() -> None:
    with Watched.anonymous(8, Feature.EVENT_UNMAP) as watched:
        guest = GuestThread(libc.munmap, watched.page(2), 3 * PAGE)
        wait_readable(watched.userfaultfd.fileno())
        assert guest.waits
        assert watched.copy(0) == CHANGING
        assert watched.event() == (EVENT_UNMAP, watched.page(2), watched.page(5), 0)
        assert guest.result() == 0
        assert watched.copy(0) == PAGE


def test_memory_that_is_moved_is_reported_and_served_where_it_is_now() -> None:
    with (
        Watched.anonymous(8, Feature.EVENT_REMAP) as watched,
        Mapping.anonymous(2 * PAGE) as target,
    ):
        guest = GuestThread(
            libc.mremap, watched.page(6), 2 * PAGE, 2 * PAGE, MAYMOVE_FIXED, target.address
        )
        assert watched.event() == (EVENT_REMAP, watched.page(6), target.address, 2 * PAGE)
        assert guest.result() == target.address
        reader = GuestRead(target.address)
        assert watched.event()[:3] == (EVENT_PAGEFAULT, 0, target.address)
        userfaultfd = watched.userfaultfd
        assert userfaultfd.copy(target.address, watched.source.address, PAGE) == PAGE
        assert reader.data() == watched.content(0)[:8]


def test_a_forked_childs_userfaultfd_comes_with_the_event() -> None:
    with (
        GuestProcess(4 * PAGE, Feature.EVENT_FORK) as guest,
        Mapping.anonymous(PAGE) as source,
    ):
        source.view[:] = b"\x07" * PAGE
        # The child reads its memory, says what it found there, and ends.
        guest.ask("os.fork() or (print(mapping.view[5]), sys.stdout.flush(), os._exit(0))")
        wait_readable(guest.userfaultfd.fileno())
        assert guest.userfaultfd.zeropage(guest.address, PAGE) == CHANGING
        ((event, descriptor, *rest),) = guest.userfaultfd.read_events()
        assert (event, rest) == (EVENT_FORK, [0, 0])
        assert is_userfaultfd(descriptor)
        assert int(guest.answer()) > 0  # the parent goes on
        with Userfaultfd(descriptor) as childs:
            wait_readable(descriptor)
            assert [event[:3] for event in childs.read_events()] == [
                (EVENT_PAGEFAULT, 0, guest.address)
            ]
            assert childs.copy(guest.address, source.address, PAGE) == PAGE
            assert guest.answer() == "7"
        guest.ask("os.wait()[1]")
        assert guest.answer() == "0"


def test_without_the_events_a_change_waits_for_nobody() -> None:
    with Watched.anonymous() as watched:
        watched.copy(0, 2)
        assert GuestThread(libc.madvise, watched.address, PAGE, mmap.MADV_DONTNEED).result() == 0
        assert GuestThread(libc.munmap, watched.page(1), PAGE).result() == 0
        assert list(watched.userfaultfd.read_events()) == []
        assert watched.copy(0) == PAGE


def test_a_descriptor_that_was_closed_under_us_is_an_error() -> None:
    with Watched.anonymous() as watched:
        os.close(watched.userfaultfd.fileno())
        with pytest.raises(OSError, match="Bad file descriptor"):
            watched.userfaultfd.read_events()
        with pytest.raises(OSError, match="Bad file descriptor"):
            watched.copy(0)
        watched.userfaultfd._descriptor = -1
