"""Assembly of host pages that are larger than the pages on the wire.

A 2 MiB page comes as 512 records, in ascending order and back to back on one connection
(qemu-wire, 3.2); it is placed when the last one has come, because a host page is atomic.
"""

from __future__ import annotations

import msgspec

from postcopyd.kernel.memory import Mapping


class HostPageInterrupted(Exception):
    """A record did not continue the host page that is being assembled."""


class _Progress(msgspec.Struct):
    start: int
    filled: int
    zero: bool


class HostPageAssembly:
    """The host page that one connection is in the middle of.

    One assembly serves all blocks of one page size. Offsets are bytes in the block; the caller
    splits runs at host page borders.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._memory = Mapping.anonymous(page_size)
        self.view = self._memory.view
        """The page while it is assembled, and until the next one is begun."""
        self.address = self._memory.address
        """Where the assembled page lies in this process."""
        self._block = ""
        self._progress: _Progress | None = None

    @property
    def unfinished(self) -> bool:
        """True in the middle of a host page."""
        return self._progress is not None

    @property
    def filled(self) -> int:
        """How many bytes of an unfinished host page are here."""
        return self._progress.filled if self._progress is not None else 0

    def add(self, block: str, offset: int, length: int, payload: memoryview | None) -> bool | None:
        """Add `length` bytes at `offset` of `block`: `payload`, or zeros if it is None.

        :return: None while records are missing; when the page is whole, True if it is all zero
            and False if it is not. The page stays at `address` until the next call.
        :raise HostPageInterrupted: if the record does not continue the page.
        """
        progress = self._progress
        within = offset & (self.page_size - 1)
        if progress is None:
            if within:
                raise HostPageInterrupted(
                    f"host page {offset - within:#x} of block {block!r} begins at {offset:#x}"
                )
            progress = self._progress = _Progress(offset, 0, True)
            self._block = block
        elif block != self._block or offset != progress.start + progress.filled:
            raise HostPageInterrupted(
                f"host page {progress.start:#x} of block {self._block!r} has {progress.filled} of "
                f"{self.page_size} bytes and is interrupted by {offset:#x} of block {block!r}"
            )
        if payload is None:
            if not progress.zero:
                self.view[within : within + length] = bytes(length)
        else:
            if progress.zero:
                # The zeros so far were only counted: write them now that the page has content.
                self.view[:within] = bytes(within)
                progress.zero = False
            self.view[within : within + length] = payload
        progress.filled += length
        if progress.filled < self.page_size:
            return None
        self._progress = None
        return progress.zero

    def drop(self) -> None:
        """Forget an unfinished host page: after a break the source sends it whole again."""
        self._progress = None

    def close(self) -> None:
        """Release the buffer. Idempotent."""
        self._memory.close()
