"""Telling open files apart, and opening a memory file again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from postcopyd.kernel import memory_file, open_files
from tests.kernel.watched import PAGE


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = memory_file.create("ram", PAGE)
    yield descriptor
    os.close(descriptor)


def test_a_copy_is_the_same_and_what_is_opened_again_is_not(file: int) -> None:
    copy, again = os.dup(file), memory_file.open_again(file)
    assert open_files.is_same(file, copy)
    assert not open_files.is_same(file, again)
    assert os.path.samestat(os.fstat(file), os.fstat(again))
    os.pwrite(again, b"content", 0)
    assert os.pread(file, 7, 0) == b"content"
    assert not os.get_inheritable(again)
    os.close(copy)
    os.close(again)


def test_what_is_only_for_reading_stays_so(file: int) -> None:
    reading = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    again = memory_file.open_again(reading)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(again, b"content")
    os.close(reading)
    os.close(again)


def test_where_the_kernel_does_not_tell_files_are_compared(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(open_files, "system_call", refuse)
    copy, (reading, writing) = os.dup(file), os.pipe()
    pipe_copy = os.dup(reading)
    assert open_files.is_same(file, copy)
    assert not open_files.is_same(file, reading)
    assert not open_files.is_same(reading, pipe_copy)
    for descriptor in (copy, reading, writing, pipe_copy):
        os.close(descriptor)


def test_what_is_not_open_is_an_error(file: int) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        open_files.is_same(file, 1 << 20)
