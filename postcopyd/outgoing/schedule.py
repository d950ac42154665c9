"""Which host page goes next: the ones asked for first, then a scan that follows the requests.

Sans-IO. Whoever sends asks for the next run and sends it whole before asking again: the target
pages of one host page must go back to back (qemu-wire, 3.2).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from bitarray import bitarray


class Run(NamedTuple):
    """Neighbouring host pages of one block, to be sent in ascending order."""

    block: int
    """Number of the block."""
    first: int
    """Number of the first host page in the block."""
    pages: int
    """Host pages, at least 1."""


class SendSchedule:
    """The host pages that are still to be sent. A page that was handed out is not handed out again.

    The scan goes on behind the page that was asked for last: a guest that touched a page is likely
    to touch its neighbours. It wraps around at the end of the last block.
    """

    def __init__(self, dirty: Sequence[bitarray], page_sizes: Sequence[int]) -> None:
        """Send the pages whose bits are 1.

        :param dirty: one bitarray a block, one bit a host page; they are taken over.
        :param page_sizes: bytes of a host page, for each block.
        """
        self._dirty = list(dirty)
        self._page_sizes = list(page_sizes)
        self._asked = [bitarray(len(pages)) for pages in dirty]
        self._requests: deque[Run] = deque()
        self._scan_block = 0
        self._scan_page = 0
        self.remaining = sum(
            pages.count() * size for pages, size in zip(dirty, page_sizes, strict=True)
        )
        """Bytes of the host pages that have not been handed out."""

    def unsent(self) -> list[bitarray]:
        """Return for each block which pages have not been handed out; still the schedule's own."""
        return self._dirty

    def request(self, block: int, first: int, count: int = 1) -> bool:
        """Hand out these host pages before all others, behind those that were requested before.

        What was handed out, or requested, already is not affected.

        :return: False if that leaves nothing of the request.
        :raise ValueError: if the pages are not all in the block.
        """
        dirty, asked = self._dirty[block], self._asked[block]
        end = first + count
        if not 0 <= first < end <= len(dirty):
            raise ValueError(f"block {block} of {len(dirty)} pages has no pages {first} to {end}")
        # One entry a request, and none that brings nothing new: a peer that asks for ever, and
        # takes nothing, cannot make the queue longer than the block has pages.
        if not (dirty[first:end] & ~asked[first:end]).any():
            return False
        asked[first:end] = 1
        self._requests.append(Run(block, first, count))
        return True

    def take_requested(self) -> Run | None:
        """Hand out the next host page that was requested, None if there is none."""
        while self._requests:
            request = self._requests[0]
            end = request.first + request.pages
            page = self._dirty[request.block].find(1, request.first, end)
            if page >= 0:
                return self._take(request.block, page, 1)
            self._requests.popleft()
        return None

    def take_scanned(self, size: int) -> Run | None:
        """Hand out the next host pages of the scan, None when none remains.

        :param size: take one host page, and its neighbours up to so many bytes.
        """
        if not self.remaining:
            return None
        block, page = self._scan_block, self._scan_page
        while (first := self._dirty[block].find(1, page)) < 0:
            block = (block + 1) % len(self._dirty)
            page = 0
        dirty = self._dirty[block]
        end = min(first + max(size // self._page_sizes[block], 1), len(dirty))
        clean = dirty.find(0, first, end)
        return self._take(block, first, (clean if clean >= 0 else end) - first)

    def _take(self, block: int, first: int, count: int) -> Run:
        self._dirty[block][first : first + count] = 0
        self._scan_block, self._scan_page = block, first + count
        self.remaining -= count * self._page_sizes[block]
        return Run(block, first, count)
