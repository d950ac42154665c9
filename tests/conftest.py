"""Fixtures that every room uses."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import belongings

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_TOTAL = _POOL / "nr_hugepages"


@pytest.fixture
def huge_pages() -> Iterator[Callable[[int], None]]:
    """Make sure that at least `count` free 2 MiB pages are in the pool; put it back afterwards.

    The pool is the machine's, so another test run that wants it waits until this test is over.
    """
    with _TOTAL.open() as total:
        fcntl.flock(total, fcntl.LOCK_EX)
        before = _TOTAL.read_text()

        def free() -> int:
            in_pool, promised = (
                int((_POOL / name).read_text()) for name in ("free_hugepages", "resv_hugepages")
            )
            return in_pool - promised

        def reserve(count: int) -> None:
            if (missing := count - free()) > 0:
                _TOTAL.write_text(str(int(_TOTAL.read_text()) + missing))
            assert free() >= count, "the machine has no memory for huge pages"

        yield reserve
        _TOTAL.write_text(before)


@pytest.fixture
def assert_nothing_left() -> Iterator[None]:
    """Count what this process holds before and after the test: the test must leave nothing."""
    before = belongings()
    yield
    # Less than before is no fault of this test: a thread of an earlier one may just have ended.
    assert not belongings() - before
