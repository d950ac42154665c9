"""What placing does, and each of the kernel's odd answers provoked on real memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
from collections.abc import Callable

import pytest

from postcopyd.kernel import memory_file
from postcopyd.kernel.huge_pages import free_huge_pages
from postcopyd.kernel.memory import Mapping
from postcopyd.kernel.memory_file import punch_hole
from postcopyd.kernel.userfaultfd import (
    CHANGING,
    EVENT_PAGEFAULT,
    EVENT_REMOVE,
    GONE,
    MODE_ALLOW_HOLES,
    MODE_DONT_WAKE,
    MODE_WRITE_PROTECT,
    NO_MEMORY,
    PAGEFAULT_MINOR,
    PAGEFAULT_WRITE,
    PAGEFAULT_WRITE_PROTECT,
    PRESENT,
    Feature,
    Operation,
    RegisterMode,
    Userfaultfd,
)
from tests.kernel.guest_process import GuestProcess
from tests.kernel.small_tmpfs import file_on_small_tmpfs
from tests.kernel.watched import HUGE, PAGE, Watched
from tests.support import GuestRead, GuestThread, GuestWrite, libc, wait_readable

NOT_REGISTERED, EXITED = GONE


# -- what it is for ------------------------------------------------------------------------------


def test_a_copied_page_is_there_and_ends_the_wait() -> None:
    with Watched.anonymous() as watched:
        guest = GuestRead(watched.page(3), PAGE)
        assert watched.event()[0] == EVENT_PAGEFAULT
        assert guest.waits
        assert watched.copy(3) == PAGE
        assert guest.data() == watched.content(3)


def test_a_run_is_copied_whole_from_a_source_that_is_not_aligned() -> None:
    with Watched.anonymous(8) as watched:
        placed = watched.userfaultfd.copy(watched.address, watched.source.address + 24, 7 * PAGE)
        assert placed == 7 * PAGE
        expected = watched.source.view[24 : 24 + 7 * PAGE].tobytes()
        assert GuestRead(watched.address, 7 * PAGE).data() == expected


def test_zero_pages_read_as_zeros_and_end_the_wait() -> None:
    with Watched.anonymous() as watched:
        guest = GuestRead(watched.page(1), PAGE)
        watched.event()
        assert watched.userfaultfd.zeropage(watched.address, 4 * PAGE) == 4 * PAGE
        assert guest.data() == bytes(PAGE)


def test_a_page_copied_without_waking_lets_go_only_when_woken() -> None:
    with Watched.anonymous() as watched:
        guest = GuestRead(watched.page(0))
        watched.event()
        userfaultfd = watched.userfaultfd
        userfaultfd.copy(watched.address, watched.source.address, PAGE, MODE_DONT_WAKE)
        assert guest.waits
        userfaultfd.wake(watched.address, PAGE)
        assert guest.data() == watched.content(0)[:8]


def test_a_wake_without_a_page_makes_the_thread_fault_again() -> None:
    with Watched.anonymous() as watched:
        guest = GuestRead(watched.page(2))
        first = watched.event()
        watched.userfaultfd.wake(watched.page(2), PAGE)
        assert watched.event() == first
        assert guest.waits
        watched.copy(2)
        assert guest.data() == watched.content(2)[:8]


def test_a_wake_where_nobody_waits_does_nothing() -> None:
    with Watched.anonymous() as watched:
        watched.userfaultfd.wake(watched.address, watched.length)
        assert list(watched.userfaultfd.read_events()) == []


def test_shared_memory_takes_pages_and_zeros() -> None:
    descriptor = memory_file.create("ram", 4 * PAGE)
    with Watched(Mapping.of_file(descriptor, 4 * PAGE), Feature.MISSING_SHMEM) as watched:
        guest = GuestRead(watched.page(1), PAGE)
        watched.event()
        assert watched.copy(1) == PAGE
        assert guest.data() == watched.content(1)
        assert watched.userfaultfd.zeropage(watched.page(2), PAGE) == PAGE
        assert os.pread(descriptor, PAGE, PAGE) == watched.content(1)
    os.close(descriptor)


@pytest.mark.parametrize("shared", [False, True], ids=["private", "memory file"])
def test_huge_pages_are_copied_whole_and_take_no_zero_pages(
    huge_pages: Callable[[int], None], shared: bool
) -> None:
    huge_pages(2)
    if shared:
        descriptor = memory_file.create("ram", 2 * HUGE, HUGE)
        mapping = Mapping.of_file(descriptor, 2 * HUGE)
        os.close(descriptor)
    else:
        mapping = Mapping.anonymous(2 * HUGE, HUGE)
    with Watched(mapping, Feature.MISSING_HUGETLBFS, page_size=HUGE) as watched:
        assert Operation.ZEROPAGE not in watched.operations
        guest = GuestRead(watched.page(1) + HUGE - 8)
        watched.event()
        assert watched.copy(1) == HUGE
        assert guest.data() == watched.content(1)[:8]
        with pytest.raises(OSError, match="Invalid argument"):
            watched.userfaultfd.zeropage(watched.address, HUGE)
        with pytest.raises(OSError, match="Invalid argument"):
            watched.userfaultfd.copy(watched.address, watched.source.address, PAGE)


# -- the odd answers -----------------------------------------------------------------------------


def test_eexist_a_page_that_is_there_stays_as_it_is() -> None:
    with Watched.anonymous() as watched:
        watched.copy(0)
        userfaultfd = watched.userfaultfd
        assert userfaultfd.copy(watched.address, watched.source.address + PAGE, PAGE) == PRESENT
        assert userfaultfd.zeropage(watched.address, PAGE) == PRESENT
        assert GuestRead(watched.address).data() == watched.content(0)[:8]


def test_eexist_wakes_nobody() -> None:
    with Watched.anonymous() as watched:
        guest = GuestRead(watched.address)
        watched.event()
        userfaultfd = watched.userfaultfd
        userfaultfd.copy(watched.address, watched.source.address, PAGE, MODE_DONT_WAKE)
        assert watched.copy(0) == PRESENT
        assert guest.waits
        userfaultfd.wake(watched.address, PAGE)
        assert guest.data() == watched.content(0)[:8]


@pytest.mark.parametrize("zeros", [False, True], ids=["copy", "zeropage"])
def test_a_run_stops_at_a_page_that_is_there_and_tells_how_far_it_came(zeros: bool) -> None:
    with Watched.anonymous(8) as watched:
        userfaultfd = watched.userfaultfd

        def place(first: int, count: int) -> int:
            if zeros:
                return userfaultfd.zeropage(watched.page(first), count * PAGE)
            return watched.copy(first, count)

        assert place(2, 1) == PAGE
        assert place(0, 8) == 2 * PAGE
        assert place(2, 6) == PRESENT
        assert place(3, 5) == 5 * PAGE
        expected = b"".join(bytes(PAGE) if zeros else watched.content(page) for page in range(8))
        assert GuestRead(watched.address, 8 * PAGE).data() == expected


def test_eagain_while_a_removal_is_unread_and_not_once_it_is_read() -> None:
    with Watched.anonymous(8, Feature.EVENT_REMOVE) as watched:
        watched.copy(0, 2)
        guest = GuestThread(libc.madvise, watched.address, PAGE, mmap.MADV_DONTNEED)
        # Readable means that the event is there, so the kernel has noted the change before.
        wait_readable(watched.userfaultfd.fileno())
        assert watched.copy(4) == CHANGING
        assert watched.copy(4) == CHANGING
        assert watched.userfaultfd.zeropage(watched.page(4), PAGE) == CHANGING
        assert guest.waits
        assert watched.events() == [(EVENT_REMOVE, watched.address, watched.address + PAGE, 0)]
        assert guest.result() == 0
        assert watched.copy(4) == PAGE


def test_enoent_what_is_not_registered_or_not_mapped() -> None:
    with Watched.anonymous(8) as watched:
        userfaultfd = watched.userfaultfd
        userfaultfd.unregister(watched.page(4), 4 * PAGE)
        assert watched.copy(4) == NOT_REGISTERED
        assert userfaultfd.zeropage(watched.page(4), PAGE) == NOT_REGISTERED
        libc.munmap(ctypes.c_void_p(watched.page(2)), ctypes.c_size_t(PAGE))
        assert watched.copy(2) == NOT_REGISTERED
        # A run is refused as a whole when it does not lie in one mapping.
        assert watched.copy(0, 4) == NOT_REGISTERED
        assert watched.copy(0, 2) == 2 * PAGE


def test_esrch_when_the_process_has_exited() -> None:
    with GuestProcess(8 * PAGE) as guest, Mapping.anonymous(4 * PAGE) as source:
        userfaultfd = guest.userfaultfd
        pages = [guest.address + page * PAGE for page in range(8)]
        # A part placed leaves a count behind that must not be taken for an answer afterwards.
        for present in (2, 6):
            assert userfaultfd.copy(pages[present], source.address, PAGE) == PAGE
        assert userfaultfd.copy(pages[0], source.address, 4 * PAGE) == 2 * PAGE
        assert userfaultfd.zeropage(pages[4], 4 * PAGE) == 2 * PAGE
        guest.kill()
        assert userfaultfd.copy(pages[3], source.address, PAGE) == EXITED
        assert userfaultfd.zeropage(pages[3], PAGE) == EXITED
        userfaultfd.wake(guest.address, PAGE)  # finds nobody
        with pytest.raises(OSError, match="UFFDIO_WRITEPROTECT"):
            userfaultfd.writeprotect(guest.address, PAGE, True)
        with pytest.raises(OSError, match="UFFDIO_UNREGISTER"):
            userfaultfd.unregister(guest.address, PAGE)
        with pytest.raises(OSError, match="UFFDIO_REGISTER"):
            userfaultfd.register(guest.address, PAGE, RegisterMode.MISSING, Operation.COPY)


def test_esrch_also_by_a_descriptor_that_came_in_a_message() -> None:
    ours, theirs = socket.socketpair()
    with GuestProcess(PAGE) as guest:
        socket.send_fds(theirs, [b"!"], [guest.userfaultfd.fileno()])
        _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
        with Userfaultfd(descriptor) as received:
            assert received.zeropage(guest.address, PAGE) == PAGE
            guest.kill()
            assert received.zeropage(guest.address, PAGE) == EXITED
    ours.close()
    theirs.close()


def test_enomem_when_the_files_memory_is_used_up() -> None:
    with file_on_small_tmpfs(pages=4, length=8 * PAGE) as descriptor:
        mapping = Mapping.of_file(descriptor, 8 * PAGE)
        with Watched(mapping, Feature.MISSING_SHMEM) as watched:
            placed = watched.copy(0, 8)
            assert 0 < placed < 8 * PAGE
            first_missing = placed // PAGE
            assert watched.copy(first_missing) in NO_MEMORY
            punch_hole(descriptor, 0, PAGE)
            assert watched.copy(first_missing) == PAGE


def test_no_huge_page_to_be_had_is_said_as_if_the_page_were_there(
    huge_pages: Callable[[int], None],
) -> None:
    """Linux 6.18 says EEXIST; other versions say ENOMEM."""
    huge_pages(1)
    with Watched(
        Mapping.anonymous(HUGE, HUGE, reserve=False), Feature.MISSING_HUGETLBFS, page_size=HUGE
    ) as watched:
        hungry = Mapping.anonymous(free_huge_pages(HUGE) * HUGE, HUGE)  # all are promised to it
        assert watched.copy(0) in (PRESENT, *NO_MEMORY)
        hungry.close()
        assert watched.copy(0) == HUGE
        assert GuestRead(watched.address).data() == watched.content(0)[:8]


def test_a_mistake_of_the_callers_is_an_exception() -> None:
    with Watched.anonymous() as watched:
        userfaultfd = watched.userfaultfd
        for destination, source, length in (
            (watched.address + 1, watched.source.address, PAGE),
            (watched.address, watched.source.address, PAGE + 1),
            (watched.address, watched.source.address, 0),
        ):
            with pytest.raises(OSError, match="Invalid argument"):
                userfaultfd.copy(destination, source, length)
            with pytest.raises(OSError, match="Invalid argument"):
                userfaultfd.zeropage(destination, length) if length != PAGE else (
                    userfaultfd.zeropage(watched.address + 1, PAGE)
                )
        with pytest.raises(OSError, match="Bad address"):
            userfaultfd.copy(watched.address, PAGE, PAGE)


# -- write protection, minor faults, poison, move ------------------------------------------------


def test_a_write_to_a_protected_page_waits_until_that_is_lifted() -> None:
    mode = RegisterMode.MISSING | RegisterMode.WRITE_PROTECT
    with Watched(Mapping.anonymous(4 * PAGE), Feature.PAGEFAULT_FLAG_WP, mode) as watched:
        assert Operation.WRITEPROTECT in watched.operations
        watched.copy(0)
        watched.userfaultfd.writeprotect(watched.address, PAGE, True)
        assert GuestRead(watched.address).data() == watched.content(0)[:8]
        guest = GuestWrite(watched.address, 0x5A)
        event, flags, address, _ = watched.event()
        assert (event, address) == (EVENT_PAGEFAULT, watched.address)
        assert flags == PAGEFAULT_WRITE | PAGEFAULT_WRITE_PROTECT
        assert guest.waits
        watched.userfaultfd.writeprotect(watched.address, PAGE, False)
        guest.result()
        assert GuestRead(watched.address).data() == b"\x5a" * 8


def test_a_page_can_be_copied_write_protected() -> None:
    mode = RegisterMode.MISSING | RegisterMode.WRITE_PROTECT
    with Watched(Mapping.anonymous(4 * PAGE), Feature.PAGEFAULT_FLAG_WP, mode) as watched:
        userfaultfd = watched.userfaultfd
        userfaultfd.copy(watched.address, watched.source.address, PAGE, MODE_WRITE_PROTECT)
        guest = GuestWrite(watched.address, 0x5A)
        assert watched.event()[1] & PAGEFAULT_WRITE_PROTECT
        userfaultfd.writeprotect(watched.address, PAGE, False)
        guest.result()


def test_what_is_not_registered_for_it_cannot_be_write_protected() -> None:
    with Watched.anonymous() as watched, pytest.raises(OSError, match="UFFDIO_WRITEPROTECT of 0x"):
        watched.userfaultfd.writeprotect(watched.address, PAGE, True)


def test_a_page_that_is_in_the_file_is_a_minor_fault_and_continued() -> None:
    descriptor = memory_file.create("ram", 4 * PAGE)
    os.pwrite(descriptor, b"in the file", PAGE)
    mapping = Mapping.of_file(descriptor, 4 * PAGE)
    with Watched(mapping, Feature.MINOR_SHMEM, RegisterMode.MINOR) as watched:
        guest = GuestRead(watched.page(1), 11)
        assert watched.event()[:2] == (EVENT_PAGEFAULT, PAGEFAULT_MINOR)
        assert watched.userfaultfd.continue_range(watched.page(1), PAGE) == PAGE
        assert guest.data() == b"in the file"
        assert watched.userfaultfd.continue_range(watched.page(1), PAGE) == PRESENT
        with pytest.raises(OSError, match="Bad address"):
            watched.userfaultfd.continue_range(watched.page(2), PAGE)
    os.close(descriptor)


def test_a_poisoned_page_is_a_memory_error() -> None:
    with Watched(Mapping.anonymous(4 * PAGE), Feature.POISON) as watched:
        assert Operation.POISON in watched.operations
        assert watched.userfaultfd.poison(watched.page(1), PAGE) == PAGE
        assert watched.userfaultfd.poison(watched.page(1), PAGE) == PRESENT
        reading, writing = os.pipe()
        # By a system call: a plain access would end this process with SIGBUS.
        with pytest.raises(OSError, match="Bad address"):
            os.write(writing, watched.mapping.view[PAGE : PAGE + 1])
        os.close(reading)
        os.close(writing)


def test_a_moved_page_has_left_where_it_came_from() -> None:
    with Watched(Mapping.anonymous(4 * PAGE), Feature.MOVE) as watched:
        assert Operation.MOVE in watched.operations
        userfaultfd = watched.userfaultfd
        guest = GuestRead(watched.page(2), PAGE)
        watched.event()
        assert userfaultfd.move(watched.page(2), watched.source.address, PAGE) == PAGE
        assert guest.data() == watched.content(0)
        assert watched.source.view[:PAGE].tobytes() == bytes(PAGE)
        libc.madvise(
            ctypes.c_void_p(watched.source.address + PAGE),
            ctypes.c_size_t(PAGE),
            mmap.MADV_DONTNEED,
        )
        # A hole in the source is like a page that is not there, unless holes are allowed.
        assert userfaultfd.move(watched.page(3), watched.source.address + PAGE, PAGE) == GONE[0]
        assert (
            userfaultfd.move(watched.page(3), watched.source.address + PAGE, PAGE, MODE_ALLOW_HOLES)
            == PAGE
        )
