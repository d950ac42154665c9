"""Fixtures that every room uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


@pytest.fixture
def huge_pages() -> Iterator[Callable[[int], None]]:
    """Make sure that at least `count` 2 MiB pages are in the pool; put it back afterwards."""
    before = _HUGE_PAGES.read_text()

    def reserve(count: int) -> None:
        if int(_HUGE_PAGES.read_text()) < count:
            _HUGE_PAGES.write_text(str(count))
        assert int(_HUGE_PAGES.read_text()) >= count, "the machine has no memory for huge pages"

    yield reserve
    _HUGE_PAGES.write_text(before)
