"""The payloads of commands that have one (docs/qemu-wire.md, 2), checked against the stream."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import Advise, BlockEntry, Discard, ReceivedBitmapRequest
from postcopyd.wire.stream_format import (
    COMMAND_LENGTHS,
    DISCARD_VERSION,
    TARGET_PAGE_SIZES,
    Command,
)

_TWO_U64 = struct.Struct(">QQ")


def check_command(number: int, length: int, position: int) -> Command:
    """Return which command it is.

    :raise ProtocolError: if there is none of this number, or it has another length.
    """
    try:
        command = Command(number)
    except ValueError:
        raise ProtocolError(f"unknown command {number}", position) from None
    fixed = COMMAND_LENGTHS[command]
    if command is Command.POSTCOPY_ADVISE and not length:
        raise ProtocolError(
            "ADVISE of post-copy for dirty bitmaps only: switch the capability postcopy-ram on "
            "at the source",
            position,
        )
    if fixed is not None and length != fixed:
        raise ProtocolError(
            f"command {command.name} has {length} bytes, it must have {fixed}", position
        )
    return command


def decode_advise(payload: bytes, position: int) -> Advise:
    """Take ADVISE apart.

    :raise ProtocolError: if a size cannot be one.
    """
    page_sizes, target_page_size = _TWO_U64.unpack(payload)
    check_target_page_size(target_page_size, position)
    if not page_sizes or page_sizes % target_page_size:
        raise ProtocolError(
            f"ADVISE says host page sizes {page_sizes:#x} with target pages of "
            f"{target_page_size:#x}: a host page is at least one target page",
            position,
        )
    return Advise(page_sizes, target_page_size)


def check_target_page_size(size: int, position: int) -> None:
    """Refuse a target page size that is not understood.

    :raise ProtocolError: naming the size and those that are.
    """
    if size not in TARGET_PAGE_SIZES:
        known = ", ".join(map(str, TARGET_PAGE_SIZES))
        raise ProtocolError(f"target pages of {size} bytes; {known} are supported", position)


def decode_discard(payload: bytes, blocks: Mapping[bytes, BlockEntry], position: int) -> Discard:
    """Take a discard apart.

    :raise ProtocolError: if it is malformed, or a range is outside its block or not aligned.
    """
    if len(payload) < 2:
        raise ProtocolError(f"a discard of {len(payload)} bytes", position)
    if payload[0] != DISCARD_VERSION:
        raise ProtocolError(
            f"a discard of version {payload[0]}; only {DISCARD_VERSION} is known", position
        )
    ranges_start = payload[1] + 3
    if payload[ranges_start - 1 : ranges_start] != b"\0":
        raise ProtocolError("a discard without NUL behind the block name", position)
    block = _block("a discard", payload[2 : ranges_start - 1], blocks, position)
    encoded = payload[ranges_start:]
    if not encoded or len(encoded) % _TWO_U64.size:
        raise ProtocolError(
            f"a discard for block {block.name!r} with {len(encoded)} bytes of ranges; they are "
            f"{_TWO_U64.size} bytes each, at least one",
            position,
        )
    ranges = tuple(_TWO_U64.iter_unpack(encoded))
    size = block.page_size
    for start, length in ranges:
        if start % size or length % size or not length:
            raise ProtocolError(
                f"a discard of {start:#x}+{length:#x} in block {block.name!r} is not whole pages "
                f"of {size:#x}",
                position,
            )
        if start + length > block.length:
            raise ProtocolError(
                f"a discard of {start:#x}+{length:#x} is beyond block {block.name!r}, which has "
                f"{block.length:#x}",
                position,
            )
    return Discard(block.name, ranges)


def decode_bitmap_request(
    payload: bytes, blocks: Mapping[bytes, BlockEntry], position: int
) -> ReceivedBitmapRequest:
    """Take a request for a bitmap apart.

    :raise ProtocolError: if it does not name a block, or one that is not known.
    """
    if not payload or payload[0] != len(payload) - 1:
        raise ProtocolError("a bitmap request whose block name does not fill it", position)
    return ReceivedBitmapRequest(_block("a bitmap request", payload[1:], blocks, position).name)


def _block(what: str, name: bytes, blocks: Mapping[bytes, BlockEntry], position: int) -> BlockEntry:
    block = blocks.get(name)
    if block is None:
        raise ProtocolError(
            f"{what} for RAM block {printable(name)}, which is not listed", position
        )
    return block


def printable(name: bytes) -> str:
    """Return a name for an error text, whatever its bytes are."""
    return repr(name.decode(errors="backslashreplace"))
