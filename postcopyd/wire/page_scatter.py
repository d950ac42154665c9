"""Receiving pages in a predicted layout, so that their contents land side by side.

On the wire each page has a word in front. While pages are expected, the connection is received
into a scatter list (word 0, page 0, word 1, page 1, ...) whose pages are neighbours in memory:
a run of neighbours in the guest can then be placed with one call, without a copy in between.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from itertools import pairwise

from postcopyd.wire.messages import BlockEntry, Message, Pages
from postcopyd.wire.ram_reader import PAGE_CONTINUE, WORD_LENGTH, RamReader

_LAYOUT = 512 << 10
"""Bytes of page content in the layout."""
_WORTHWHILE_RUN = 4
"""Pages in a run, on average, from which on runs are handed out one by one."""

_word = struct.Struct(">Q").unpack_from


class PageScatter:
    """The layout. A unit is a page with its word; unit 0 is the next one to be consumed."""

    def __init__(self, ram: RamReader, target_page_size: int) -> None:
        """Allocate the layout; the memory is only used as far as pages come."""
        self._ram = ram
        self._page_size = target_page_size
        self._unit = WORD_LENGTH + target_page_size
        self.units = units = _LAYOUT // target_page_size
        """Most units that can be received at once."""
        self._words = memoryview(bytearray(WORD_LENGTH * units))
        self._memory = mmap.mmap(-1, _LAYOUT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pages = memoryview(self._memory)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._slices: list[memoryview] = []
        for unit in range(units):
            word, page = unit * WORD_LENGTH, unit * target_page_size
            self._slices.append(self._words[word : word + WORD_LENGTH])
            self._slices.append(self._pages[page : page + target_page_size])
        self._layouts = [struct.Struct(f">{count}Q") for count in range(units + 1)]
        self._whole_list: list[memoryview] = []
        self._filled = 0
        self._consumed = 0

    def begin(self, received: memoryview) -> None:
        """Start with the first bytes of a unit, which were received elsewhere."""
        self._words[: len(received)][:WORD_LENGTH] = received[:WORD_LENGTH]
        content = received[WORD_LENGTH:]
        self._pages[: len(content)] = content
        self._filled = len(received)
        self._consumed = 0

    def buffers(self, units: int) -> list[memoryview]:
        """Return where the next `units` units must be written, what is here of them aside."""
        if self._consumed:
            self._move_to_front()
        filled = self._filled
        if not filled:
            if len(self._whole_list) != 2 * units:
                self._whole_list = self._slices[: 2 * units]
            return self._whole_list
        if filled < WORD_LENGTH:
            return [self._words[filled:WORD_LENGTH], *self._slices[1 : 2 * units]]
        first = self._pages[filled - WORD_LENGTH : self._page_size]
        return [first, *self._slices[2 : 2 * units]]

    def _move_to_front(self) -> None:
        """Make the unit that is not complete unit 0."""
        word = self._consumed * WORD_LENGTH
        page = self._consumed * self._page_size
        self._filled -= self._consumed * self._unit
        self._consumed = 0
        if self._filled:
            self._words[:WORD_LENGTH] = self._words[word : word + WORD_LENGTH]
            content = self._filled - WORD_LENGTH
            if content > 0:
                self._pages[:content] = self._pages[page : page + content]

    def received(self, count: int, block: BlockEntry, messages: list[Message]) -> tuple[int, bool]:
        """Take `count` bytes and append the pages that they complete to `messages`.

        :return: how many pages those are, and whether the guess still holds. If not, what is left
            (`rest`) begins with another record.
        """
        self._filled += count
        whole, partial = divmod(self._filled, self._unit)
        seen = whole + (partial >= WORD_LENGTH)
        if not seen:
            return 0, True
        if whole == seen == 1:
            word = _word(self._words)[0]
            if self._ram.continues(word):  # one page, as a fault brings it
                size = self._page_size
                offset = word - PAGE_CONTINUE
                self._consumed = 1
                messages.append(
                    Pages(
                        block.name,
                        range(offset, offset + size, size),
                        self._address,
                        size,
                        self._slices[1],
                    )
                )
                return 1, True
        words = self._layouts[seen].unpack_from(self._words)
        alike = self._ram.alike(words, PAGE_CONTINUE, block.length)
        whole = min(whole, alike)
        if whole:
            self._append(words[:whole], block.name, messages)
            self._consumed = whole
        return whole, alike == seen

    def rest(self) -> bytes:
        """Return the bytes that are not consumed, as they came, and forget them."""
        first = 2 * self._consumed
        last = 2 * (self._filled // self._unit + 1)
        pending = self._filled - self._consumed * self._unit
        self._filled = self._consumed = 0
        return b"".join(self._slices[first:last])[:pending]

    def _append(self, words: tuple[int, ...], block: str, messages: list[Message]) -> None:
        """Append one message for each run of neighbours, or one for all if runs are short."""
        count = len(words)
        size = self._page_size
        if self._ram.consecutive(words):
            messages.append(self._run(words, block, 0, count))
            return
        borders = [
            place
            for place, (word, following) in enumerate(pairwise(words), 1)
            if following - word != size
        ]
        if (len(borders) + 1) * _WORTHWHILE_RUN > count:
            offsets = [word - PAGE_CONTINUE for word in words]
            messages.append(Pages(block, offsets, self._address, size, self._pages[: count * size]))
            return
        for first, end in zip([0, *borders], [*borders, count], strict=True):
            messages.append(self._run(words, block, first, end))

    def _run(self, words: tuple[int, ...], block: str, first: int, end: int) -> Pages:
        size = self._page_size
        offset = words[first] - PAGE_CONTINUE
        return Pages(
            block,
            range(offset, offset + (end - first) * size, size),
            self._address + first * size,
            size,
            self._pages[first * size : end * size],
        )
