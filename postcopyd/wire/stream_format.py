"""The numbers of QEMU's migration stream and of its return path, as tables.

Everything is unsigned and big-endian. The facts are in docs/qemu-wire.md; its section numbers are
quoted here and wherever a rule is enforced.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

MAGIC: Final = b"QEVM"
VERSION: Final = 3
HEADER_LENGTH: Final = 8
NAME_LIMIT: Final = 255
"""Longest name of a section, a block or a capability: its length is one byte."""
MULTIFD_MAGIC: Final = b"\x11\x22\x33\x44"
TLS_HANDSHAKE: Final = b"\x16\x03"


class Section(IntEnum):
    """Type bytes (section 1)."""

    END_OF_FILE = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    VM_DESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


# -- configuration (1.1) ----------------------------------------------------------------------

SUBSECTION_VERSION: Final = 1
TARGET_PAGE_BITS: Final = "configuration/target-page-bits"
CAPABILITIES: Final = "configuration/capabilities"
UUID: Final = "configuration/uuid"
UUID_LENGTH: Final = 16


# -- commands (2) -----------------------------------------------------------------------------


class Command(IntEnum):
    """Command numbers; 0 and everything above the last are invalid."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


COMMAND_LENGTHS: Final[dict[Command, int | None]] = {
    Command.OPEN_RETURN_PATH: 0,
    Command.PING: 4,
    Command.POSTCOPY_ADVISE: 16,
    Command.POSTCOPY_LISTEN: 0,
    Command.POSTCOPY_RUN: 0,
    Command.POSTCOPY_RAM_DISCARD: None,
    Command.PACKAGED: 4,
    Command.ENABLE_COLO: 0,
    Command.POSTCOPY_RESUME: 0,
    Command.RECV_BITMAP: None,
    Command.SWITCHOVER_START: 0,
}
"""Payload bytes of each command; None where they vary."""

DISCARD_VERSION: Final = 0
DISCARD_RANGES: Final = 12
"""Most ranges that a source may put into one discard; as a reader QEMU takes any number."""


# -- the "ram" section (3) --------------------------------------------------------------------

RAM: Final = "ram"
RAM_INSTANCE: Final = 0
RAM_VERSION: Final = 4
TARGET_PAGE_SIZE: Final = 4096
"""Size of a page on the wire unless the stream says otherwise."""
TARGET_PAGE_SIZES: Final = tuple(1 << bits for bits in range(12, 17))
"""The sizes that are understood. The bits below the size hold the flags of a page word."""
SMALLEST_HOST_PAGE: Final = 4096
"""The host page size that the block list does not mention (3.1)."""

ZERO: Final = 0x002
MEM_SIZE: Final = 0x004
PAGE: Final = 0x008
EOS: Final = 0x010
CONTINUE: Final = 0x020

REFUSED_FLAGS: Final = {
    0x001: "an obsolete RAM record (FULL)",
    0x040: "XBZRLE pages are not supported: switch the capability xbzrle off at the source",
    0x080: "an RDMA hook: RDMA is not supported",
    0x100: "compressed pages are not supported: switch the capability compress off at the source",
    0x200: "a multifd sync: multifd is not supported, switch the capability off at the source",
}
"""Records that are known and refused, and how to say so."""


# -- return path (4) --------------------------------------------------------------------------


class ReturnType(IntEnum):
    """Message types of the return path; 0 and everything above the last are invalid."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


RETURN_LENGTHS: Final[dict[ReturnType, int | None]] = {
    ReturnType.SHUT: 4,
    ReturnType.PONG: 4,
    ReturnType.REQ_PAGES_ID: None,
    ReturnType.REQ_PAGES: 12,
    ReturnType.RECV_BITMAP: None,
    ReturnType.RESUME_ACK: 4,
    ReturnType.SWITCHOVER_ACK: 0,
}
"""Payload bytes of each message; None where a block name makes them vary."""

RETURN_LENGTH_LIMIT: Final = 512
RESUME_ACK_VALUE: Final = 1
BITMAP_END: Final = 0x0123456789ABCDEF
"""The word behind a received bitmap."""


def bitmap_size(block_length: int, target_page_size: int) -> int:
    """Return the bytes of a received bitmap: a bit a page, filled up to whole 8 bytes (4.2)."""
    return (block_length // target_page_size + 63) // 64 * 8
