"""Another process's memory, read and written."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import pytest

from postcopyd.kernel import process_memory
from postcopyd.kernel.memory import Mapping

Buffer = ctypes.Array[ctypes.c_char]
NOWHERE = mmap.PAGESIZE


@pytest.fixture
def buffer() -> Buffer:
    return ctypes.create_string_buffer(b"what is there", 64)


def test_what_is_there_is_read(buffer: Buffer) -> None:
    assert process_memory.read(os.getpid(), ctypes.addressof(buffer), 13) == b"what is there"


def test_what_is_written_is_there(buffer: Buffer) -> None:
    process_memory.write(os.getpid(), ctypes.addressof(buffer) + 5, b"was")
    assert buffer.value == b"what wasthere"


def test_what_can_be_read_is_read() -> None:
    with Mapping.anonymous(2 * mmap.PAGESIZE) as mapping:
        nothing_allowed = 0
        beyond = ctypes.c_void_p(mapping.address + mmap.PAGESIZE)
        assert ctypes.CDLL(None).mprotect(beyond, mmap.PAGESIZE, nothing_allowed) == 0
        read = process_memory.read(os.getpid(), mapping.address, 2 * mmap.PAGESIZE)
        assert read == bytes(mmap.PAGESIZE)
        with pytest.raises(OSError, match="memory of process") as failure:
            process_memory.write(os.getpid(), mapping.address, bytes(2 * mmap.PAGESIZE))
        assert failure.value.errno == errno.EFAULT


def test_what_is_not_there_is_an_error() -> None:
    with pytest.raises(OSError, match=f"memory of process {os.getpid()} at 0x1000") as failure:
        process_memory.read(os.getpid(), NOWHERE, 8)
    assert failure.value.errno == errno.EFAULT
    with pytest.raises(OSError, match="at 0x1000"):
        process_memory.write(os.getpid(), NOWHERE, b"x")


def test_a_process_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ProcessLookupError):
        process_memory.read(2**22 + 1, NOWHERE, 8)
