"""The buffer that a connection is received into and parsed in, without a copy in between."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Generator


class ReceiveBuffer:
    """Bytes `start` to `end` of `view` have been received and not been consumed.

    Nothing is moved but by `space`, so views stay valid until then. The generator methods are for
    parsers that are generators themselves (`yield from buffer.take(4)`): they yield when they need
    more bytes, and are resumed when some have come.
    """

    __slots__ = ("_capacity", "_memory", "address", "base", "end", "start", "view")

    def __init__(self, capacity: int) -> None:
        """Allocate `capacity` bytes; the memory is only used as far as bytes come."""
        self._memory = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._capacity = capacity
        self.view = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        """Where `view` lies in this process."""
        self.start = 0
        self.end = 0
        self.base = 0
        """How many bytes of the connection came before byte 0 of `view`."""

    @property
    def position(self) -> int:
        """Number of the next byte to be consumed, counted from the start of the connection."""
        return self.base + self.start

    @property
    def pending(self) -> int:
        """How many bytes wait to be consumed."""
        return self.end - self.start

    def space(self, wanted: int) -> memoryview:
        """Return where the next bytes must be written: `wanted` of them, pending ones aside."""
        if self.start == self.end:
            self.base += self.start
            self.start = self.end = 0
        elif self._capacity - self.end < wanted:
            pending = self.pending
            self.view[:pending] = self.view[self.start : self.end]
            self.base += self.start
            self.start, self.end = 0, pending
        return self.view[self.end : self.end + wanted]

    def load(self, data: bytes) -> None:
        """Take bytes that were received elsewhere. Only while nothing is pending."""
        self.base += self.start
        self.start, self.end = 0, len(data)
        self.view[: self.end] = data

    def need(self, count: int) -> Generator[None, None, None]:
        """Wait until `count` bytes are pending. It must be much less than the capacity."""
        while self.end - self.start < count:
            yield

    def take(self, count: int) -> Generator[None, None, bytes]:
        """Wait for `count` bytes and consume them. As `need`."""
        while self.end - self.start < count:
            yield
        start = self.start
        self.start = start + count
        return bytes(self.view[start : self.start])

    def take_number(self, size: int) -> Generator[None, None, int]:
        """Wait for a number of `size` bytes and consume it."""
        return int.from_bytes((yield from self.take(size)), "big")

    def take_counted(self) -> Generator[None, None, bytes]:
        """Wait for a name behind its length byte and consume both; return the name."""
        length = yield from self.take_number(1)
        return (yield from self.take(length))
