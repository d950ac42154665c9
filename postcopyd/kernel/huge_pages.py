"""The pools of huge pages, as /sys/kernel/mm/hugepages tells them."""

from __future__ import annotations

import re
from pathlib import Path

_POOLS = Path("/sys/kernel/mm/hugepages")


def huge_page_sizes() -> list[int]:
    """Return the sizes that the kernel has huge pages of, in bytes, the smallest first."""
    if not _POOLS.is_dir():  # a kernel without CONFIG_HUGETLBFS
        return []
    names = [re.fullmatch(r"hugepages-(\d+)kB", pool.name) for pool in _POOLS.iterdir()]
    return sorted(int(name[1]) << 10 for name in names if name)


def free_huge_pages(page_size: int) -> int:
    """Return how many huge pages of `page_size` bytes are free and promised to nobody.

    0 for a size that the kernel does not have.
    """
    pool = _POOLS / f"hugepages-{page_size >> 10}kB"
    try:
        free = int((pool / "free_hugepages").read_text())
        promised = int((pool / "resv_hugepages").read_text())
    except FileNotFoundError:
        return 0
    return max(0, free - promised)
