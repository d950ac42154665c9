"""Memory files: making, sealing, punching, telling them apart."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from postcopyd.kernel import memory_file
from postcopyd.kernel.memory import Mapping
from tests.kernel.watched import HUGE, PAGE


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = memory_file.create("ram", 4 * PAGE)
    yield descriptor
    os.close(descriptor)


def test_a_new_file_is_empty_memory_and_close_on_exec(file: int) -> None:
    assert os.fstat(file).st_size == 4 * PAGE
    assert os.fstat(file).st_blocks == 0
    assert not os.get_inheritable(file)
    assert "/memfd:ram " in os.readlink(f"/proc/self/fd/{file}")
    assert memory_file.is_memory_file(file)
    assert memory_file.huge_page_size_of(file) is None


def test_a_file_of_huge_pages_tells_their_size(huge_pages: Callable[[int], None]) -> None:
    huge_pages(1)
    descriptor = memory_file.create("ram", HUGE, HUGE)
    assert memory_file.is_memory_file(descriptor)
    assert memory_file.huge_page_size_of(descriptor) == HUGE
    with Mapping.of_file(descriptor, HUGE) as mapping:
        mapping.view[HUGE - 1] = 1
    os.close(descriptor)


def test_huge_pages_of_a_size_that_there_is_not_are_an_error_that_names_it() -> None:
    with pytest.raises(OSError, match="no huge pages of 8192 bytes"):
        memory_file.create("ram", 8192, 8192)


def test_a_size_that_does_not_fit_is_an_error_and_leaves_no_descriptor() -> None:
    with pytest.raises(OSError, match=r"'ram' of 4096 bytes: .*huge pages are of 2097152 bytes"):
        memory_file.create("ram", 4096, HUGE)
    with pytest.raises(OSError, match="memory file 'ram' of -1 bytes: Invalid argument"):
        memory_file.create("ram", -1)


def test_a_sealed_file_can_be_changed_in_no_way(file: int) -> None:
    os.pwrite(file, b"state", 0)
    assert memory_file.seals(file) == 0
    memory_file.seal(file)
    assert memory_file.seals(file) & memory_file.ALL_SEALS == memory_file.ALL_SEALS
    for change in (
        lambda: os.pwrite(file, b"other", 0),
        lambda: os.ftruncate(file, PAGE),
        lambda: os.ftruncate(file, 8 * PAGE),
        lambda: memory_file.punch_hole(file, 0, PAGE),
        lambda: memory_file.seal(file),
        lambda: Mapping.of_file(file, PAGE),
    ):
        with pytest.raises(PermissionError):
            change()
    assert os.pread(file, 5, 0) == b"state"


def test_a_file_that_somebody_can_write_through_a_mapping_cannot_be_sealed(file: int) -> None:
    with (
        Mapping.of_file(file, PAGE),
        pytest.raises(OSError, match=r"sealing .*mapped for writing"),
    ):
        memory_file.seal(file)
    memory_file.seal(file)


def test_a_file_made_unsealable_cannot_be_sealed() -> None:
    descriptor = memory_file.create("ram", PAGE, sealable=False)
    assert memory_file.seals(descriptor) == fcntl.F_SEAL_SEAL
    with pytest.raises(PermissionError):
        memory_file.seal(descriptor)
    os.close(descriptor)


def test_a_punched_hole_reads_as_zeros_and_gives_its_memory_back(file: int) -> None:
    os.pwrite(file, b"x" * 4 * PAGE, 0)
    memory_file.punch_hole(file, PAGE, 2 * PAGE)
    assert os.fstat(file).st_size == 4 * PAGE
    assert os.fstat(file).st_blocks * 512 == 2 * PAGE
    assert os.pread(file, 4 * PAGE, 0) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE


@pytest.mark.parametrize("page_size", [PAGE, HUGE])
def test_part_of_a_page_is_zeroed_but_not_given_back(
    huge_pages: Callable[[int], None], page_size: int
) -> None:
    huge_pages(1)
    descriptor = memory_file.create("ram", page_size, page_size if page_size > PAGE else None)
    with Mapping.of_file(descriptor, page_size) as mapping:
        mapping.view[:32] = b"x" * 32
        memory_file.punch_hole(descriptor, 8, 16)
        assert bytes(mapping.view[:32]) == b"x" * 8 + bytes(16) + b"x" * 8
        assert os.fstat(descriptor).st_blocks * 512 == page_size
    os.close(descriptor)


def test_where_no_hole_can_be_is_an_error_that_says_where() -> None:
    reading, writing = os.pipe()
    with pytest.raises(OSError, match="punching a hole of 0x1000 bytes at 0x2000: "):
        memory_file.punch_hole(writing, 0x2000, PAGE)
    os.close(reading)
    os.close(writing)


def test_other_files_are_no_memory_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    for other in (path, Path("/dev/null")):
        with other.open() as opened:
            assert not memory_file.is_memory_file(opened.fileno())
            assert memory_file.huge_page_size_of(opened.fileno()) is None
            if other == path:
                with pytest.raises(OSError, match="reading the seals of a memory file"):
                    memory_file.seals(opened.fileno())


def test_a_closed_descriptor_is_an_error() -> None:
    descriptor = memory_file.create("ram", PAGE)
    os.close(descriptor)
    with pytest.raises(FileNotFoundError):
        memory_file.is_memory_file(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        memory_file.huge_page_size_of(descriptor)
