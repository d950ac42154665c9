"""Mapping, advising, page sizes."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from postcopyd.kernel import memory, memory_file, memory_lock, procfs
from postcopyd.kernel.memory import Mapping, advise, page_size_of
from tests.kernel.watched import HUGE, PAGE


def test_private_memory_begins_as_zeros_and_can_be_written() -> None:
    with Mapping.anonymous(3 * PAGE) as mapping:
        assert len(mapping.view) == mapping.length == 3 * PAGE
        assert mapping.view[5] == 0
        mapping.view[PAGE : PAGE + 3] = b"abc"
        assert bytes(mapping.view[PAGE : PAGE + 4]) == b"abc\0"


def test_a_mapping_touches_no_memory_and_holds_no_descriptor() -> None:
    before = procfs.open_descriptors()
    resident = procfs.resident_bytes()
    with Mapping.anonymous(512 << 20):
        assert procfs.open_descriptors() == before
        assert procfs.resident_bytes() - resident < 64 << 20


def test_two_mappings_of_a_file_are_one_memory() -> None:
    descriptor = memory_file.create("ram", 4 * PAGE)
    with (
        Mapping.of_file(descriptor, 4 * PAGE) as whole,
        Mapping.of_file(descriptor, PAGE, 2 * PAGE) as part,
        Mapping.of_file(descriptor, PAGE, writable=False) as read_only,
    ):
        os.close(descriptor)
        whole.view[2 * PAGE] = 7
        assert part.view[0] == 7
        part.view[1] = 8
        assert whole.view[2 * PAGE + 1] == 8
        assert read_only.view.readonly
        whole.view[0] = 9
        assert read_only.view[0] == 9


def test_what_cannot_be_mapped_is_an_error_that_says_what() -> None:
    descriptor = memory_file.create("ram", PAGE)
    with pytest.raises(OSError, match="mapping 0x1000 bytes of memory: Invalid argument"):
        Mapping.of_file(descriptor, PAGE, 5)
    with pytest.raises(OSError, match="mapping 0x0 bytes of memory"):
        Mapping.anonymous(0)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        Mapping.anonymous(1 << 60)
    os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Mapping.of_file(descriptor, PAGE)


def test_more_huge_pages_than_there_are_is_an_error_that_says_so() -> None:
    with pytest.raises(OSError, match="not that many huge pages are free"):
        Mapping.anonymous(1 << 40, HUGE)


def test_closing_unmaps_and_twice_is_once() -> None:
    mapping = Mapping.anonymous(PAGE)
    address = mapping.address
    mapping.close()
    mapping.close()
    assert mapping.closed
    assert all(not mapped.start <= address < mapped.end for mapped in procfs.mappings())
    with pytest.raises(ValueError, match="released"):
        mapping.view[0]


def test_what_is_still_in_use_stays_mapped() -> None:
    mapping = Mapping.anonymous(PAGE)
    part = mapping.view[8:16]
    with pytest.raises(BufferError, match="still in use"):
        mapping.close()
    part[0] = 5
    assert mapping.view[8] == 5
    assert not mapping.closed
    part.release()
    mapping.close()
    assert mapping.closed


def test_memory_that_is_dropped_reads_as_zeros() -> None:
    with Mapping.anonymous(2 * PAGE) as mapping:
        mapping.view[:] = b"x" * 2 * PAGE
        advise(mapping.address, PAGE, mmap.MADV_DONTNEED)
        assert bytes(mapping.view[PAGE - 1 : PAGE + 1]) == b"\0x"


def test_shared_memory_that_is_removed_is_gone_from_the_file() -> None:
    descriptor = memory_file.create("ram", 2 * PAGE)
    with Mapping.of_file(descriptor, 2 * PAGE) as mapping:
        mapping.view[:] = b"x" * 2 * PAGE
        advise(mapping.address, PAGE, mmap.MADV_REMOVE)
        assert os.pread(descriptor, 2, PAGE - 1) == b"\0x"
        assert os.fstat(descriptor).st_blocks * 512 == PAGE
    os.close(descriptor)


def flags_of(address: int) -> list[str]:
    """VmFlags of proc(5) of the mapping at an address."""
    text = Path("/proc/self/smaps").read_text().split(f"{address:x}-", 1)[1]
    return text.split("VmFlags:")[1].splitlines()[0].split()


@pytest.mark.parametrize(
    ("advice", "flag"),
    [
        (mmap.MADV_HUGEPAGE, "hg"),
        (mmap.MADV_NOHUGEPAGE, "nh"),
        (mmap.MADV_DONTFORK, "dc"),
    ],
)
def test_advice_reaches_the_mapping(advice: int, flag: str) -> None:
    # Apart from its neighbours, with which the kernel would merge it.
    with Mapping.anonymous(4 * PAGE) as mapping:
        address = mapping.address + PAGE
        advise(address, PAGE, advice)
        assert flag in flags_of(address)


def test_advice_that_is_refused_names_itself_the_range_and_the_lock() -> None:
    with Mapping.anonymous(PAGE) as mapping:
        memory_lock.lock(mapping.address, PAGE)
        with pytest.raises(
            OSError,
            match=rf"madvise MADV_DONTNEED of {mapping.address:#x}\+0x1000: Invalid argument; "
            r"memory that is locked",
        ):
            advise(mapping.address, PAGE, mmap.MADV_DONTNEED)
    with pytest.raises(OSError, match=r"madvise MADV_NOHUGEPAGE of .*: Cannot allocate memory"):
        advise(PAGE, PAGE, mmap.MADV_NOHUGEPAGE)


def test_the_page_size_of_ordinary_memory_is_the_hosts() -> None:
    with Mapping.anonymous(PAGE) as mapping:
        assert page_size_of(mapping.address + 5) == memory.HOST_PAGE_SIZE == PAGE


@pytest.mark.parametrize("shared", [False, True], ids=["private", "memory file"])
def test_the_page_size_of_huge_pages_is_theirs(
    huge_pages: Callable[[int], None], shared: bool
) -> None:
    huge_pages(2)
    if shared:
        descriptor = memory_file.create("ram", 2 * HUGE, HUGE)
        mapping = Mapping.of_file(descriptor, 2 * HUGE)
        os.close(descriptor)
    else:
        mapping = Mapping.anonymous(2 * HUGE, HUGE)
    with mapping:
        assert page_size_of(mapping.address + HUGE + 5) == HUGE


def test_where_nothing_is_mapped_there_is_no_page_size() -> None:
    with pytest.raises(OSError, match=r"page size of memory at 0x1000: .*nothing is mapped"):
        page_size_of(PAGE)
