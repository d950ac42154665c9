"""The machine's pool of 2 MiB pages: enough of them while a case runs, and as it was afterwards."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_TOTAL = _POOL / "nr_hugepages"


@contextmanager
def huge_pages(count: int) -> Iterator[bool]:
    """Have `count` free 2 MiB pages while the block lasts; say whether they are there.

    The pool is the machine's, so whoever else wants it (the tests do, by the same lock) waits.
    """
    if not count:
        yield True
        return
    if not _TOTAL.exists():
        yield False
        return
    with _TOTAL.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = _TOTAL.read_text()
        try:
            if (missing := count - _free()) > 0:
                _TOTAL.write_text(str(int(before) + missing))
            there = _free() >= count
        except PermissionError:
            there = False
        try:
            yield there
        finally:
            if _TOTAL.read_text() != before:
                _TOTAL.write_text(before)


def _free() -> int:
    """Return how many pages of the pool nobody has or was promised."""
    free, promised = (
        int((_POOL / name).read_text()) for name in ("free_hugepages", "resv_hugepages")
    )
    return free - promised
