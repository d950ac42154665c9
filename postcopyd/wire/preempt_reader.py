"""The reader of the preempt channel: requested pages and nothing else (docs/qemu-wire.md, 5.4).

The channel has neither header nor sections, only RAM records. A QEMU 7.2 ends it with EOS, a 10.0
just closes it. Used like `StreamReader`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from postcopyd.wire.errors import ProtocolError, messages_then_error
from postcopyd.wire.messages import BlockEntry, Message, PreemptEnd
from postcopyd.wire.ram_reader import RamReader
from postcopyd.wire.receive_buffer import ReceiveBuffer
from postcopyd.wire.stream_format import EOS

FIRST_BYTE: Final = 0
"""What tells a preempt channel from any other connection of a source: it begins with the word of a
record, and no offset reaches the word's first byte."""

_READ: Final = 64 << 10
"""Most bytes received at once."""
_CAPACITY: Final = 2 * _READ


class PreemptReader:
    """Reads one preempt channel. What it allocates is 128 KiB, used as far as bytes come."""

    def __init__(self, blocks: Sequence[BlockEntry], target_page_size: int) -> None:
        """Read pages of `blocks`."""
        self.read_ahead_pages = 0  # nothing is read ahead: whatever comes here is waited for
        self._buffer = ReceiveBuffer(_CAPACITY)
        self._ram = RamReader({block.name.encode(): block for block in blocks}, target_page_size)
        self._failure: ProtocolError | None = None
        self.ended = False
        """True once the source has said that no page follows."""

    @property
    def position(self) -> int:
        """How many bytes of the channel have been consumed."""
        return self._buffer.position

    def buffers(self) -> list[memoryview]:
        """As `StreamReader.buffers`."""
        return [self._buffer.space(_READ)]

    def received(self, count: int) -> Iterable[Message]:
        """As `StreamReader.received`.

        :raise ProtocolError: if nothing but a mistake follows.
        """
        if self._failure is not None:
            raise self._failure
        buffer = self._buffer
        buffer.end += count
        messages: list[Message] = []
        try:
            self._parse(messages)
        except ProtocolError as error:
            self._failure = error
            if not messages:
                raise
            return messages_then_error(messages, error)
        return messages

    def _parse(self, messages: list[Message]) -> None:
        buffer = self._buffer
        if not self.ended:
            word = self._ram.parse(buffer, messages)
            if word is None:
                return
            if word != EOS:
                raise ProtocolError(
                    "a list of RAM blocks on the preempt channel", buffer.position - 8
                )
            self.ended = True
            messages.append(PreemptEnd())
        if buffer.pending:
            raise ProtocolError("bytes behind the end of the preempt channel", buffer.position)

    def connection_lost(self) -> None:
        """Say that no byte follows.

        :raise ProtocolError: if the channel stops in the middle of a record.
        """
        if self._failure is not None:
            raise self._failure
        if self._buffer.pending:
            raise ProtocolError("the preempt channel stops in the middle of a page", self.position)
