"""Records of the section "ram" (docs/qemu-wire.md, 3): pages and zero pages, parsed where they lie.

Records come by the hundred thousand a second, so runs of the same kind are unpacked in bulk and
handed on as one message.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NoReturn

from postcopyd.wire.commands import printable
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import BlockEntry, Message, Pages, ZeroPages
from postcopyd.wire.receive_buffer import ReceiveBuffer
from postcopyd.wire.stream_format import CONTINUE, EOS, MEM_SIZE, PAGE, REFUSED_FLAGS, ZERO

WORD_LENGTH = 8
ZERO_LENGTH = WORD_LENGTH + 1
PAGE_CONTINUE = PAGE | CONTINUE
_ZERO_CONTINUE = ZERO | CONTINUE
_BATCH = 256
"""Most records in one message, so that faults need not wait for long behind it."""
_PREDICTING_RUN = 2
"""After so many pages in a row the next record is taken for a page too."""

_word_at = struct.Struct(">Q").unpack_from


class RamReader:
    """Parses the records of one connection; CONTINUE refers to the block of the one before.

    It keeps no bytes: incomplete records stay in the buffer.
    """

    def __init__(self, blocks: Mapping[bytes, BlockEntry], target_page_size: int) -> None:
        """Read records for `blocks`, by name; they may be added later."""
        self._blocks = blocks
        self._page_size = target_page_size
        self._mask = target_page_size - 1
        self._page_length = WORD_LENGTH + target_page_size
        # Bulk layouts for 1, 2, 4, ... records: (flags and fill byte are checked by the caller)
        self._page_layouts = _layouts(f"Q{target_page_size}x")
        self._run = 0
        self.block: BlockEntry | None = None
        """The block that CONTINUE refers to."""
        self.zeros_predicted = False
        """True when the last record was a zero page."""

    @property
    def pages_predicted(self) -> bool:
        """True when the last records were pages."""
        return self._run >= _PREDICTING_RUN

    def continues(self, word: int) -> bool:
        """Tell whether `word` begins a page of the current block without naming it."""
        return (
            word & self._mask == PAGE_CONTINUE
            and self.block is not None
            and word < self.block.length
        )

    def parse(self, buffer: ReceiveBuffer, messages: list[Message]) -> int | None:
        """Consume all complete records and append what they say to `messages`.

        :return: None when more bytes are needed; else the word of a record that is not about one
            page, EOS or MEM_SIZE: the word is consumed and its meaning is the caller's to handle.
        :raise ProtocolError: if a record is wrong.
        """
        view = buffer.view
        mask = self._mask
        while buffer.end - buffer.start >= WORD_LENGTH:
            word = _word_at(view, buffer.start)[0]
            flags = word & mask
            if flags == PAGE_CONTINUE:
                complete = self._pages(buffer, word, messages)
            elif flags == _ZERO_CONTINUE:
                complete = self._zeros(buffer, word, messages)
            elif flags in (PAGE, ZERO):
                complete = self._named(buffer, word, messages)
            elif word == EOS or flags == MEM_SIZE:
                buffer.start += WORD_LENGTH
                return int(word)
            else:
                self._refuse_flags(buffer, word)
            if not complete:
                break
        return None

    # -- one kind of record each; False when the record is not complete --------------------------

    def _pages(self, buffer: ReceiveBuffer, word: int, messages: list[Message]) -> bool:
        block = self._check(buffer, self.block, word)
        start = buffer.start
        length = self._page_length
        available = (buffer.end - start) // length
        if not available:
            return False
        words = self._collect(
            buffer.view, start, min(available, _BATCH), length, self._page_layouts, block, word
        )
        count = len(words)
        buffer.start = start + count * length
        self._run += count
        self.zeros_predicted = False
        messages.append(
            Pages(
                block.name,
                self._offsets(words, PAGE_CONTINUE),
                buffer.address + start + WORD_LENGTH,
                length,
                buffer.view[start + WORD_LENGTH : buffer.start],
            )
        )
        return True

    def _zeros(self, buffer: ReceiveBuffer, word: int, messages: list[Message]) -> bool:
        block = self._check(buffer, self.block, word)
        view = buffer.view
        start = buffer.start
        available = (buffer.end - start) // ZERO_LENGTH
        if not available:
            return False
        words = self._collect(
            view, start, min(available, _BATCH), ZERO_LENGTH, _ZERO_LAYOUTS, block, word
        )
        count = len(words)
        end = start + count * ZERO_LENGTH
        fills = bytes(view[start + WORD_LENGTH : end : ZERO_LENGTH])
        if fills.count(0) != count:
            count = next(place for place, fill in enumerate(fills) if fill)
            if not count:
                self._refuse(buffer, _wrong_fill(block, word - _ZERO_CONTINUE, fills[0]))
            del words[count:]
        buffer.start = start + count * ZERO_LENGTH
        self._run = 0
        self.zeros_predicted = True
        messages.append(ZeroPages(block.name, self._offsets(words, _ZERO_CONTINUE)))
        return True

    def _named(self, buffer: ReceiveBuffer, word: int, messages: list[Message]) -> bool:
        """Read a record that names its block."""
        view = buffer.view
        start = buffer.start
        name_start = start + WORD_LENGTH + 1
        if buffer.end < name_start:
            return False
        body = name_start + view[name_start - 1]
        if buffer.end < body:
            return False
        name = bytes(view[name_start:body])
        block = self._blocks.get(name)
        if block is None:
            self._refuse(buffer, f"a page of RAM block {printable(name)}, which is not listed")
        self._check(buffer, block, word)
        flags = word & self._mask
        offset = word - flags
        offsets = range(offset, offset + self._page_size, self._page_size)
        if flags == ZERO:
            if buffer.end == body:
                return False
            if view[body]:
                self._refuse(buffer, _wrong_fill(block, offset, view[body]))
            end = body + 1
            self._run = 0
            messages.append(ZeroPages(block.name, offsets))
        else:
            end = body + self._page_size
            if buffer.end < end:
                return False
            self._run += 1
            messages.append(
                Pages(
                    block.name,
                    offsets,
                    buffer.address + body,
                    self._page_size,
                    view[body:end],
                )
            )
        self.zeros_predicted = flags == ZERO
        self.block = block
        buffer.start = end
        return True

    # -- helpers -------------------------------------------------------------------------------

    def _check(self, buffer: ReceiveBuffer, block: BlockEntry | None, word: int) -> BlockEntry:
        if block is None:
            self._refuse(buffer, "a record with CONTINUE before any that names a block")
        if word >= block.length:
            self._refuse(
                buffer,
                f"a page at {word - (word & self._mask):#x} of block {block.name!r}, which has "
                f"{block.length:#x}",
            )
        return block

    def _collect(
        self,
        view: memoryview,
        start: int,
        limit: int,
        length: int,
        layouts: Sequence[struct.Struct],
        block: BlockEntry,
        first: int,
    ) -> list[int]:
        """Return the words of up to `limit` records like the first one, which are complete.

        The steps double, so a lone record costs little and a long run little each.
        """
        words = [first]
        if limit == 1 or _word_at(view, start + length)[0] & self._mask != first & self._mask:
            return words
        step = 0
        while (left := limit - len(words)) > 0:
            step = min(step, left.bit_length() - 1)
            more = layouts[step].unpack_from(view, start + len(words) * length)
            alike = self.alike(more, first & self._mask, block.length)
            if alike < len(more):
                words += more[:alike]
                break
            words += more
            step += 1
        return words

    def alike(self, words: tuple[int, ...], flags: int, block_length: int) -> int:
        """Return how many words from the first on have just these flags and are in the block."""
        mask = self._mask
        first = words[0]
        if (
            first & mask == flags
            and first < block_length
            and words[-1] < block_length
            and self.consecutive(words)
        ):
            return len(words)
        for place, word in enumerate(words):
            if word & mask != flags or word >= block_length:
                return place
        return len(words)

    def consecutive(self, words: Sequence[int]) -> bool:
        """Tell whether each word is one page behind the one before."""
        size = self._page_size
        first, last = words[0], words[-1]
        return last - first == (len(words) - 1) * size and tuple(words) == tuple(
            range(first, last + 1, size)
        )

    def _offsets(self, words: list[int], flags: int) -> Sequence[int]:
        if self.consecutive(words):
            return range(words[0] - flags, words[-1] - flags + self._page_size, self._page_size)
        return [word - flags for word in words]

    def _refuse_flags(self, buffer: ReceiveBuffer, word: int) -> NoReturn:
        flags = word & self._mask
        refused = REFUSED_FLAGS.get(flags & ~CONTINUE)
        self._refuse(
            buffer, refused or f"a RAM record with unknown or contradicting flags {flags:#05x}"
        )

    def _refuse(self, buffer: ReceiveBuffer, what: str) -> NoReturn:
        raise ProtocolError(what, buffer.position)


def _wrong_fill(block: BlockEntry, offset: int, fill: int) -> str:
    return f"a zero page at {offset:#x} of block {block.name!r} that is filled with {fill:#04x}"


def _layouts(record: str) -> tuple[struct.Struct, ...]:
    """Return layouts of 1, 2, 4, ... records, up to a batch of them."""
    return tuple(struct.Struct(">" + record * (1 << power)) for power in range(_BATCH.bit_length()))


_ZERO_LAYOUTS = _layouts("Qx")
