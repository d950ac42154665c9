"""The return path, destination to source (docs/qemu-wire.md, section 4): writer and reader.

A message is u16 type, u16 length, payload; a received bitmap follows its message uncounted.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import msgspec

from postcopyd.wire.errors import ProtocolError, messages_then_error
from postcopyd.wire.messages import BlockEntry
from postcopyd.wire.names import decode_name, encode_name
from postcopyd.wire.stream_format import (
    BITMAP_END,
    RESUME_ACK_VALUE,
    RETURN_LENGTH_LIMIT,
    RETURN_LENGTHS,
    TARGET_PAGE_SIZE,
    ReturnType,
    bitmap_size,
)

_HEADER = struct.Struct(">HH")
_VALUE = struct.Struct(">HHI")
_REQUEST = struct.Struct(">HHQI")
_REQUEST_BODY = struct.Struct(">QI")
_SIZE = struct.Struct(">Q")


# -- writer -----------------------------------------------------------------------------------


class ReturnPathWriter:
    """Makes the messages of one return path. They must be sent in the order they were made in.

    :raise ValueError: from every method, if a value does not fit its field.
    """

    def __init__(self) -> None:
        self._last_block: str | None = None

    def new_connection(self) -> None:
        """Name the block again in the next request: the source has forgotten it."""
        self._last_block = None

    def request_pages(self, block: str, offset: int, length: int) -> bytes:
        """Ask for the host pages in `length` bytes from `offset`; they are sent in order.

        A 10.0 source with preempt aborts on a length that is no multiple of the host page size,
        so never ask for anything but whole host pages.
        """
        if block == self._last_block:
            return _pack(_REQUEST, ReturnType.REQ_PAGES, 12, offset, length)
        name = encode_name(block)
        message = _pack(_REQUEST, ReturnType.REQ_PAGES_ID, 12 + len(name), offset, length) + name
        self._last_block = block
        return message

    def pong(self, value: int) -> bytes:
        """Answer a PING."""
        return _pack(_VALUE, ReturnType.PONG, 4, value)

    def shut(self, status: int) -> bytes:
        """Say that this side has ended: 0 means that all is well."""
        return _pack(_VALUE, ReturnType.SHUT, 4, status)

    def received_bitmap(self, block: str, bitmap: bytes) -> bytes:
        """Tell which pages have been received and placed.

        :param bitmap: bit i % 8 of byte i // 8 is page i of the target page size; whole 8 bytes,
            bits behind the block 0 (4.2).
        """
        if len(bitmap) % 8:
            raise ValueError(f"a received bitmap has whole 8 bytes, not {len(bitmap)}")
        name = encode_name(block)
        return b"".join(
            (
                _HEADER.pack(ReturnType.RECV_BITMAP, len(name)),
                name,
                _SIZE.pack(len(bitmap)),
                bitmap,
                _SIZE.pack(BITMAP_END),
            )
        )

    def resume_ack(self) -> bytes:
        """Say that the resumed connection is understood: pages may come."""
        return _VALUE.pack(ReturnType.RESUME_ACK, 4, RESUME_ACK_VALUE)

    def switchover_ack(self) -> bytes:
        """Allow the switchover, for a source with that capability (not known before 8.1)."""
        return _HEADER.pack(ReturnType.SWITCHOVER_ACK, 0)


def _pack(layout: struct.Struct, *values: int) -> bytes:
    try:
        return layout.pack(*values)
    except struct.error as error:
        raise ValueError(f"{values[2:]} do not fit a return path message: {error}") from None


# -- messages ---------------------------------------------------------------------------------


class Shut(msgspec.Struct, frozen=True):
    """The destination has ended."""

    status: int
    """0 when all is well."""


class Pong(msgspec.Struct, frozen=True):
    """The answer to a PING."""

    value: int


class PageRequest(msgspec.Struct, frozen=True):
    """The destination needs these host pages first."""

    block: str
    offset: int
    """Bytes in the block, a multiple of its host page size."""
    length: int
    """Bytes, a multiple of the host page size, inside the block, more than 0."""


class ReceivedBitmap(msgspec.Struct, frozen=True):
    """Which pages of a block have been received and placed."""

    block: str
    bitmap: bytes
    """As `ReturnPathWriter.received_bitmap` takes it."""


class ResumeAck(msgspec.Struct, frozen=True):
    """The destination is ready to go on after a break."""


class SwitchoverAck(msgspec.Struct, frozen=True):
    """The destination allows the switchover."""


ReturnMessage: TypeAlias = Shut | Pong | PageRequest | ReceivedBitmap | ResumeAck | SwitchoverAck


# -- reader -----------------------------------------------------------------------------------


class ReturnPathReader:
    """Reads one return path; whatever the source of the migration must refuse, it refuses.

    It holds at most the bytes of one `feed` and one message: twice the bitmap of the largest
    block, and only as far as the bytes have come.
    """

    def __init__(
        self, blocks: Sequence[BlockEntry], target_page_size: int = TARGET_PAGE_SIZE
    ) -> None:
        """Read requests for `blocks`, the ones in the block list that was sent."""
        self._blocks = {block.name: block for block in blocks}
        self._target_page_size = target_page_size
        self._pending = bytearray()
        self._position = 0
        self._last_block: BlockEntry | None = None
        self._failure: ProtocolError | None = None

    def new_connection(self) -> None:
        """Begin again on a new connection: half a message and the last block are forgotten."""
        self._pending.clear()
        self._position = 0
        self._last_block = None
        self._failure = None

    def feed(self, data: bytes | bytearray | memoryview) -> Iterable[ReturnMessage]:
        """Take the next bytes; return the messages that they complete.

        :raise ProtocolError: if something is wrong. Iterating gives the messages in front of the
            mistake first, then raises. No other call is of use then but `new_connection`.
        """
        if self._failure is not None:
            raise self._failure
        self._pending += data
        messages: list[ReturnMessage] = []
        try:
            self._parse(messages)
        except ProtocolError as error:
            self._failure = error
            if not messages:
                raise
            return messages_then_error(messages, error)
        return messages

    def connection_lost(self) -> None:
        """Say that no byte follows.

        :raise ProtocolError: if that is in the middle of a message.
        """
        if self._pending:
            raise ProtocolError(
                f"the return path stops in the middle of a message, "
                f"{len(self._pending)} bytes into it",
                self._position,
            )

    def _parse(self, messages: list[ReturnMessage]) -> None:
        pending = self._pending
        start = 0
        try:
            while len(pending) - start >= _HEADER.size:
                kind, length = self._check_header(start)
                end = start + _HEADER.size + length
                if len(pending) < end:
                    return
                body = bytes(pending[start + _HEADER.size : end])
                if kind is ReturnType.RECV_BITMAP:
                    block = self._block(body)
                    end = self._bitmap_end(block, end)
                    if not end:
                        return
                    messages.append(self._bitmap(block, end))
                else:
                    messages.append(self._message(kind, body))
                self._position += end - start
                start = end
        finally:
            del pending[:start]

    def _refuse(self, what: str) -> ProtocolError:
        return ProtocolError(what, self._position)

    def _check_header(self, start: int) -> tuple[ReturnType, int]:
        number, length = _HEADER.unpack_from(self._pending, start)
        try:
            kind = ReturnType(number)
        except ValueError:
            raise self._refuse(f"unknown return path message {number}") from None
        fixed = RETURN_LENGTHS[kind]
        if fixed is not None and length != fixed:
            raise self._refuse(f"{kind.name} has {length} bytes, it must have {fixed}")
        if length > RETURN_LENGTH_LIMIT:
            raise self._refuse(f"{kind.name} has {length} bytes, more than {RETURN_LENGTH_LIMIT}")
        return kind, length

    def _message(self, kind: ReturnType, body: bytes) -> ReturnMessage:
        if kind is ReturnType.REQ_PAGES_ID:
            self._last_block = self._block(body[_REQUEST_BODY.size :])
            return self._request(body)
        if kind is ReturnType.REQ_PAGES:
            return self._request(body)
        if kind is ReturnType.SWITCHOVER_ACK:
            return SwitchoverAck()
        value = int.from_bytes(body, "big")
        if kind is ReturnType.SHUT:
            return Shut(value)
        if kind is ReturnType.PONG:
            return Pong(value)
        if value != RESUME_ACK_VALUE:
            raise self._refuse(f"RESUME_ACK says {value}, it must say {RESUME_ACK_VALUE}")
        return ResumeAck()

    def _block(self, counted_name: bytes) -> BlockEntry:
        if not counted_name or counted_name[0] != len(counted_name) - 1:
            raise self._refuse("a block name that does not fill its message")
        name = decode_name(counted_name[1:], "block", self._position)
        block = self._blocks.get(name)
        if block is None:
            raise self._refuse(f"a message about RAM block {name!r}, which is not being migrated")
        return block

    def _request(self, body: bytes) -> PageRequest:
        offset, length = _REQUEST_BODY.unpack_from(body)
        block = self._last_block
        if block is None:
            raise self._refuse("REQ_PAGES came before a REQ_PAGES_ID that names a block")
        where = f"a request for {offset:#x}+{length:#x} in block {block.name!r}"
        if offset % block.page_size or length % block.page_size or not length:
            raise self._refuse(f"{where} is not whole host pages of {block.page_size:#x}")
        if offset + length > block.length:
            raise self._refuse(f"{where} is beyond its length {block.length:#x}")
        return PageRequest(block.name, offset, length)

    def _bitmap_end(self, block: BlockEntry, start: int) -> int:
        """Return where the bitmap that begins at `start` ends, 0 while it is not all here."""
        size = bitmap_size(block.length, self._target_page_size)
        if len(self._pending) < start + _SIZE.size:
            return 0
        said = _SIZE.unpack_from(self._pending, start)[0]
        if said != size:
            raise self._refuse(
                f"the received bitmap of block {block.name!r} has {said} bytes, not {size}"
            )
        end = start + _SIZE.size + size + _SIZE.size
        return end if len(self._pending) >= end else 0

    def _bitmap(self, block: BlockEntry, end: int) -> ReceivedBitmap:
        size = bitmap_size(block.length, self._target_page_size)
        marker = end - _SIZE.size
        if _SIZE.unpack_from(self._pending, marker)[0] != BITMAP_END:
            raise self._refuse(
                f"the received bitmap of block {block.name!r} does not end with its marker"
            )
        bitmap = bytes(self._pending[marker - size : marker])
        pages = block.length // self._target_page_size
        # Only the last 8 bytes can have bits that stand for no page.
        if int.from_bytes(bitmap[-8:], "little") >> (pages - (size - 8) * 8):
            raise self._refuse(
                f"the received bitmap of block {block.name!r} has bits behind the block's end"
            )
        return ReceivedBitmap(block.name, bitmap)
