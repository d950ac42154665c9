"""The pools of huge pages, as /sys/kernel/mm/hugepages tells them."""

from __future__ import annotations

from pathlib import Path


def free_huge_pages(page_size: int) -> int:
    """Return how many huge pages of `page_size` bytes are free and promised to nobody.

    0 for a size that the kernel does not have.
    """
    pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB")
    try:
        free = int((pool / "free_hugepages").read_text())
        promised = int((pool / "resv_hugepages").read_text())
    except FileNotFoundError:
        return 0
    return max(0, free - promised)
