"""The reader of a migration stream, source to destination (docs/qemu-wire.md).

Sans-IO: ask `buffers` where the next bytes of the connection belong, write them there (with
`recvmsg_into`, so that nothing is copied), say how many there were with `received`, and act on the
messages that it returns. When the connection has ended, say so with `connection_lost`.

```python
while True:
    count = connection.recvmsg_into(reader.buffers())[0]
    if not count:
        reader.connection_lost()
        break
    for message in reader.received(count):
        ...
```

What the bytes mean is known by `stream_parser`; pages are parsed by `ram_reader` where they lie,
and received by `page_scatter` while only pages come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from postcopyd.wire.errors import ProtocolError, messages_then_error
from postcopyd.wire.messages import Message
from postcopyd.wire.page_scatter import PageScatter
from postcopyd.wire.ram_reader import WORD_LENGTH, ZERO_LENGTH
from postcopyd.wire.receive_buffer import ReceiveBuffer
from postcopyd.wire.stream_parser import ResumeState, StreamLimits, StreamParser

__all__ = ["READ_AHEAD_PAGES", "ResumeState", "StreamLimits", "StreamReader"]

READ_AHEAD_PAGES: Final = 128
"""What `StreamReader.read_ahead_pages` begins with."""
_CAPACITY: Final = 644 << 10
"""Bytes of the buffer: a whole scatter layout with its words, and the longest record or command
that may be pending beside what is received next."""
_LINEAR_READ: Final = 64 << 10
"""Most bytes received at once while not only pages come: 9 bytes can be a zero page."""
_ZEROS_A_PAGE: Final = 4
"""Zero pages that are placed in the time of one page."""
_SMALLEST_GUESS: Final = 4
"""Pages that are expected in a row at least, once pages are expected at all."""


class StreamReader:
    """Reads one connection, of a new migration or of a resumed one.

    What it allocates is bounded, whatever comes: 644 KiB and 513 KiB of buffers, used as far as
    bytes come; the device package, twice while it is completed, and only as far as it has come;
    the block list; and the messages of one `received`, 12 MiB at the very most (if a source fills
    what is received at once with the shortest records there are).
    """

    def __init__(
        self, limits: StreamLimits | None = None, resume: ResumeState | None = None
    ) -> None:
        """Read a new migration, or one that goes on with `resume` after a break."""
        self.read_ahead_pages = READ_AHEAD_PAGES
        """How many pages `buffers` offers room for, at most; may be set at any time. Less means
        that what was received is acted on sooner."""
        self._buffer = ReceiveBuffer(_CAPACITY)
        self._parser = StreamParser(self._buffer, limits or StreamLimits(), resume)
        self._scatter: PageScatter | None = None
        self._scattering = False
        self._guess = READ_AHEAD_PAGES
        self._failure: ProtocolError | None = None
        self._parser.advance()

    @property
    def position(self) -> int:
        """How many bytes of the connection have been consumed."""
        return self._buffer.position

    @property
    def package_begun(self) -> bool:
        """True once a device package has begun: its source cannot take the guest back."""
        return self._parser.package_begun

    @property
    def reading(self) -> str | None:
        """What the stream is in the middle of; None between two messages."""
        return self._parser.reading

    @property
    def ended(self) -> bool:
        """True once the source has said that it has sent everything."""
        return self._parser.ended

    def buffers(self) -> list[memoryview]:
        """Return where the next bytes of the connection must be written, in this order.

        Never empty, and the reader's own: not to be changed. Ends the life of all views that were
        handed out before.
        """
        if not self._scattering and not (self._parser.at_record and self._begin_scatter()):
            return [self._buffer.space(self._linear_read())]
        scatter = self._scatter
        assert scatter is not None
        return scatter.buffers(min(max(self.read_ahead_pages, 1), self._guess, scatter.units))

    def received(self, count: int) -> Iterable[Message]:
        """Take `count` bytes, written to where `buffers` said.

        :return: the messages that they complete, in order. Iterating over them raises
            `ProtocolError` behind the last one if a mistake follows it.
        :raise ProtocolError: if nothing but a mistake follows. The reader is of no use after one.
        """
        if self._failure is not None:
            raise self._failure
        messages = self._parser.messages = []
        try:
            if self._scattering:
                if self._received_scattered(count):
                    return messages
            else:
                self._buffer.end += count
            self._parser.advance()
        except ProtocolError as error:
            self._failure = error
            if not messages:
                raise
            return messages_then_error(messages, error)
        return messages

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Message]:
        """Take bytes that are elsewhere, copying them; give each message when it is complete.

        Nothing happens but by iterating; the views of a message are valid until the next step.

        :raise ProtocolError: as `received`.
        """
        rest = memoryview(data)
        while rest:
            count = 0
            for place in self.buffers():
                length = min(len(place), len(rest))
                place[:length] = rest[:length]
                rest = rest[length:]
                count += length
            yield from self.received(count)

    def connection_lost(self) -> None:
        """Say that no byte follows.

        :raise ProtocolError: unless the stream had ended; names what it was in the middle of.
        """
        if self._failure is not None:
            raise self._failure
        reading = self._parser.reading
        if reading is not None:
            raise ProtocolError(f"the stream stops in the middle of {reading}", self.position)
        if not self.ended:
            raise ProtocolError("the stream stops without having ended", self.position)

    def resume_state(self) -> ResumeState:
        """Return what a reader of a resumed connection must be told.

        :raise ValueError: if the list of RAM blocks has not come yet.
        """
        parser = self._parser
        if parser.section_id is None or not parser.blocks:
            raise ValueError("a migration whose RAM blocks are not known cannot be resumed")
        return ResumeState(
            tuple(parser.blocks.values()), parser.section_id, parser.target_page_size
        )

    # -- where bytes go ------------------------------------------------------------------------

    def _linear_read(self) -> int:
        parser = self._parser
        pages = max(self.read_ahead_pages, 1)
        page_length = WORD_LENGTH + parser.target_page_size
        if parser.at_record and parser.ram is not None and parser.ram.zeros_predicted:
            wanted = page_length + pages * _ZEROS_A_PAGE * ZERO_LENGTH
        else:
            wanted = pages * page_length
        return min(wanted, _LINEAR_READ)

    def _begin_scatter(self) -> bool:
        """Go over to the scatter layout if the next records are most likely pages."""
        ram = self._parser.ram
        if ram is None or not ram.pages_predicted:
            return False
        buffer = self._buffer
        tail = buffer.view[buffer.start : buffer.end]
        if len(tail) >= WORD_LENGTH and not ram.continues(
            int.from_bytes(tail[:WORD_LENGTH], "big")
        ):
            return False
        if self._scatter is None:
            self._scatter = PageScatter(ram, self._parser.target_page_size)
        self._scatter.begin(tail)
        buffer.end = buffer.start
        self._scattering = True
        return True

    def _received_scattered(self, count: int) -> bool:
        """Take pages; False if something else follows, which then is in the buffer."""
        parser, scatter = self._parser, self._scatter
        assert parser.ram is not None and parser.ram.block is not None and scatter is not None
        pages, holds = scatter.received(count, parser.ram.block, parser.messages)
        self._buffer.base += pages * (WORD_LENGTH + parser.target_page_size)
        if holds:
            # A list that is longer than what comes costs time: each entry is looked at. So it
            # grows with a burst, and shrinks to next to nothing for pages that come one by one.
            self._guess = min(max(2 * pages, self._guess // 2, _SMALLEST_GUESS), READ_AHEAD_PAGES)
        else:
            # What follows the mistake is copied, so the next guess is no longer than this run was.
            self._guess = max(pages, _SMALLEST_GUESS)
            self._buffer.load(scatter.rest())
            self._scattering = False
        return holds
