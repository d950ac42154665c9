"""Locking memory. What is locked as a whole is a process of its own, not that of the tests."""

from __future__ import annotations

import mmap
import os

import pytest

from postcopyd.kernel import memory_lock
from postcopyd.kernel.memory import Mapping, advise
from tests.kernel.watched import PAGE
from tests.support import run_python


def test_a_locked_range_cannot_be_emptied_until_it_is_unlocked() -> None:
    with Mapping.anonymous(4 * PAGE) as mapping:
        before = memory_lock.locked_bytes()
        memory_lock.lock(mapping.address, 4 * PAGE)
        assert memory_lock.locked_bytes() - before == 4 * PAGE
        assert memory_lock.locked_bytes(os.getpid()) - before == 4 * PAGE
        with pytest.raises(OSError, match="Invalid argument"):
            advise(mapping.address, PAGE, mmap.MADV_DONTNEED)
        memory_lock.unlock(mapping.address, 4 * PAGE)
        assert memory_lock.locked_bytes() == before
        advise(mapping.address, PAGE, mmap.MADV_DONTNEED)


def test_a_range_that_is_not_mapped_cannot_be_locked_or_unlocked() -> None:
    with pytest.raises(OSError, match=r"^\[Errno 12\] locking 0x1000\+0x1000: "):
        memory_lock.lock(PAGE, PAGE)
    with pytest.raises(OSError, match=r"unlocking 0x1000\+0x1000: "):
        memory_lock.unlock(PAGE, PAGE)


WHOLE_PROCESS = """
import sys
from postcopyd.kernel import memory_lock, procfs
from postcopyd.kernel.memory import Mapping
memory_lock.lock_all(on_fault=sys.argv[1] == "on fault")
first = memory_lock.locked_bytes()
resident = procfs.resident_bytes()
with Mapping.anonymous(64 << 20):
    print(memory_lock.locked_bytes() - first, procfs.resident_bytes() - resident)
memory_lock.unlock_all()
with Mapping.anonymous(64 << 20):
    print(first, memory_lock.locked_bytes())
"""


def test_all_memory_is_locked_that_of_the_future_too_and_unlocked() -> None:
    later, now = run_python(WHOLE_PROCESS, "at once").splitlines()
    locked, resident = map(int, later.split())
    assert locked == 64 << 20
    assert resident >= 63 << 20
    at_first, at_last = map(int, now.split())
    assert at_first > 0
    assert at_last == 0


def test_locked_on_fault_nothing_is_brought_into_memory() -> None:
    later, _ = run_python(WHOLE_PROCESS, "on fault").splitlines()
    locked, resident = map(int, later.split())
    assert locked == 64 << 20
    assert resident < 32 << 20


@pytest.mark.parametrize(("limit", "code"), [(65536, "12"), (0, "1")])
def test_without_the_right_to_it_the_limit_is_named(limit: int, code: str) -> None:
    told = run_python(
        """
import resource, sys
from postcopyd.kernel import memory_lock
from tests.kernel.rights import drop_rights
resource.setrlimit(resource.RLIMIT_MEMLOCK, (int(sys.argv[1]),) * 2)
drop_rights()
try:
    memory_lock.lock_all(on_fault=True)
except OSError as error:
    print(error.errno, error.strerror)
""",
        str(limit),
    )
    assert told.startswith(f"{code} locking all memory: ")
    assert "CAP_IPC_LOCK" in told
    assert "RLIMIT_MEMLOCK" in told
