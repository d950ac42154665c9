"""The writer of a migration stream: what a QEMU source would send (docs/qemu-wire.md).

Functions make what stands for itself; a `StreamWriter` makes the RAM sections of one connection,
where a record may leave out the block that the one before it named. Every function raises
ValueError if a value does not fit its field.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from postcopyd.wire.messages import BlockEntry
from postcopyd.wire.names import encode_name
from postcopyd.wire.stream_format import (
    CAPABILITIES,
    CONTINUE,
    DISCARD_RANGES,
    DISCARD_VERSION,
    EOS,
    MAGIC,
    MEM_SIZE,
    PAGE,
    RAM,
    RAM_INSTANCE,
    RAM_VERSION,
    SMALLEST_HOST_PAGE,
    SUBSECTION_VERSION,
    TARGET_PAGE_BITS,
    TARGET_PAGE_SIZE,
    UUID,
    UUID_LENGTH,
    VERSION,
    ZERO,
    Command,
    Section,
)

_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_TWO_U32 = struct.Struct(">II")
_TWO_U64 = struct.Struct(">QQ")
_TYPE_AND_U32 = struct.Struct(">BI")
_COMMAND = struct.Struct(">BHH")
_LENGTH_LIMIT = 0xFFFF

END_OF_STREAM = bytes((Section.END_OF_FILE,))


def page_word(offset: int, flags: int) -> bytes:
    """Return the word that begins a RAM record: a page offset or byte count, and the flags."""
    return page_words((offset,), flags)


def page_words(offsets: Sequence[int], flags: int) -> bytes:
    """Return the words of many RAM records with the same flags, one behind the other."""
    if any(offset % TARGET_PAGE_SIZE for offset in offsets):
        raise ValueError(f"offsets that are not whole pages of {TARGET_PAGE_SIZE} bytes")
    return _numbers(struct.Struct(f">{len(offsets)}Q"), *[offset | flags for offset in offsets])


def configuration(
    machine: str,
    *,
    target_page_bits: int | None = None,
    capabilities: Sequence[str] | None = None,
    uuid: bytes | None = None,
) -> bytes:
    """Return the stream header and the configuration: the start of every new migration."""
    name = encode_name(machine)[1:]  # its length goes into 4 bytes
    parts = [
        MAGIC,
        _U32.pack(VERSION),
        _TYPE_AND_U32.pack(Section.CONFIGURATION, len(name)),
        name,
    ]
    if target_page_bits is not None:
        parts += (_subsection(TARGET_PAGE_BITS), _numbers(_U32, target_page_bits))
    if capabilities is not None:
        parts += (_subsection(CAPABILITIES), _U32.pack(len(capabilities)))
        parts += map(encode_name, capabilities)
    if uuid is not None:
        if len(uuid) != UUID_LENGTH:
            raise ValueError(f"a UUID has {UUID_LENGTH} bytes, not {len(uuid)}")
        parts += (_subsection(UUID), uuid)
    return b"".join(parts)


def _subsection(name: str) -> bytes:
    return bytes((Section.SUBSECTION,)) + encode_name(name) + _U32.pack(SUBSECTION_VERSION)


# -- commands ---------------------------------------------------------------------------------


def _command(number: Command, payload: bytes = b"") -> bytes:
    if len(payload) > _LENGTH_LIMIT:
        raise ValueError(f"{number.name} of {len(payload)} bytes is too long for a command")
    return _COMMAND.pack(Section.COMMAND, number, len(payload)) + payload


def open_return_path() -> bytes:
    """Announce that the source reads the other direction."""
    return _command(Command.OPEN_RETURN_PATH)


def ping(value: int) -> bytes:
    """Ask for a PONG with the same value."""
    return _command(Command.PING, _numbers(_U32, value))


def advise(page_sizes: int, target_page_size: int) -> bytes:
    """Announce post-copy.

    :param page_sizes: the host page sizes of all blocks, or-ed together.
    """
    return _command(Command.POSTCOPY_ADVISE, _numbers(_TWO_U64, page_sizes, target_page_size))


def discard(block: str, ranges: Sequence[tuple[int, int]]) -> bytes:
    """Have 1 to 12 ranges (start, length in bytes) of a block forgotten."""
    if not 0 < len(ranges) <= DISCARD_RANGES:
        raise ValueError(f"a discard has 1 to {DISCARD_RANGES} ranges, not {len(ranges)}")
    payload = [bytes((DISCARD_VERSION,)), encode_name(block), b"\0"]
    payload += (_numbers(_TWO_U64, start, length) for start, length in ranges)
    return _command(Command.POSTCOPY_RAM_DISCARD, b"".join(payload))


def package(device_state: bytes, pings: Iterable[int] = (3,)) -> bytes:
    """Return the device package: LISTEN, the device sections, PINGs, RUN."""
    inside = b"".join(
        (
            _command(Command.POSTCOPY_LISTEN),
            device_state,
            *map(ping, pings),
            _command(Command.POSTCOPY_RUN),
        )
    )
    return _command(Command.PACKAGED, _numbers(_U32, len(inside))) + inside


def switchover_start() -> bytes:
    """Announce the switchover. Fatal for a destination older than 8.1."""
    return _command(Command.SWITCHOVER_START)


def postcopy_resume() -> bytes:
    """Recovery: ask for RESUME_ACK, all bitmaps being here."""
    return _command(Command.POSTCOPY_RESUME)


def received_bitmap_request(block: str) -> bytes:
    """Recovery: ask which pages of a block have been received."""
    return _command(Command.RECV_BITMAP, encode_name(block))


# -- sections ---------------------------------------------------------------------------------


def device_section(
    section_id: int, name: str, payload: bytes, *, instance: int = 0, version: int = 1
) -> bytes:
    """Return a device state in one piece."""
    return (
        _open_named(Section.FULL, section_id, name, instance, version)
        + payload
        + _TYPE_AND_U32.pack(Section.FOOTER, section_id)
    )


def vm_description(description: bytes) -> bytes:
    """Return the description of the device state that follows the end of a pre-copy stream."""
    return _TYPE_AND_U32.pack(Section.VM_DESCRIPTION, len(description)) + description


def _open_named(kind: Section, section_id: int, name: str, instance: int, version: int) -> bytes:
    return (
        _numbers(_TYPE_AND_U32, kind, section_id)
        + encode_name(name)
        + _numbers(_TWO_U32, instance, version)
    )


class StreamWriter:
    """The RAM sections of one connection. What it makes must be sent in that order."""

    def __init__(self, section_id: int) -> None:
        """Write sections with this id, the same one on every connection of a migration."""
        self._section_id = section_id
        self._footer = page_word(0, EOS) + _numbers(_TYPE_AND_U32, Section.FOOTER, section_id)
        self._last_block: str | None = None

    def forget_block(self) -> None:
        """Name the block again in the next record, as a source does when post-copy starts."""
        self._last_block = None

    def ram_start(self, blocks: Sequence[BlockEntry]) -> bytes:
        """Return the whole first section: the block list."""
        parts = [
            _open_named(Section.START, self._section_id, RAM, RAM_INSTANCE, RAM_VERSION),
            page_word(sum(block.length for block in blocks), MEM_SIZE),
        ]
        for block in blocks:
            parts += (encode_name(block.name), _numbers(_U64, block.length))
            if block.page_size != SMALLEST_HOST_PAGE:
                parts.append(_numbers(_U64, block.page_size))
        parts.append(self._footer)
        return b"".join(parts)

    def ram_part(self) -> bytes:
        """Return the beginning of a section with pages, one of many."""
        return _TYPE_AND_U32.pack(Section.PART, self._section_id)

    def ram_end(self) -> bytes:
        """Return the beginning of the last section with pages."""
        return _TYPE_AND_U32.pack(Section.END, self._section_id)

    def ram_footer(self) -> bytes:
        """Return what closes a section with pages."""
        return self._footer

    def page(self, block: str, offset: int) -> bytes:
        """Return what goes in front of the content of a page."""
        return self._record(block, offset, PAGE)

    def page_headers(self, block: str, offsets: Sequence[int]) -> list[bytes]:
        """Return what goes in front of the content of each of these pages."""
        if not offsets:
            return []
        words = page_words(offsets[1:], PAGE | CONTINUE)
        return [
            self.page(block, offsets[0]),
            *[words[start : start + 8] for start in range(0, len(words), 8)],
        ]

    def zero_page(self, block: str, offset: int) -> bytes:
        """Return a page that is all zero."""
        return self._record(block, offset, ZERO) + b"\0"

    def zero_pages(self, block: str, offsets: Sequence[int]) -> bytes:
        """Return pages that are all zero."""
        if not offsets:
            return b""
        words = page_words(offsets[1:], ZERO | CONTINUE)
        return self.zero_page(block, offsets[0]) + b"".join(
            [words[start : start + 8] + b"\0" for start in range(0, len(words), 8)]
        )

    def _record(self, block: str, offset: int, flags: int) -> bytes:
        if block == self._last_block:
            return page_word(offset, flags | CONTINUE)
        record = page_word(offset, flags) + encode_name(block)
        self._last_block = block
        return record


def _numbers(layout: struct.Struct, *values: int) -> bytes:
    try:
        return layout.pack(*values)
    except struct.error as error:
        raise ValueError(f"{values} do not fit their fields: {error}") from None
