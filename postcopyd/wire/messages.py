"""The messages of a migration stream, source to destination, as flat values.

All sizes, lengths and offsets are bytes; an offset counts from the start of its RAM block. What a
message holds has been checked against the stream itself: blocks are in the block list, offsets are
inside their block and aligned. What it means in the migration's state is the engine's to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import msgspec


class Configuration(msgspec.Struct, frozen=True):
    """The source's machine: the first message of a new migration."""

    machine: str
    """The versioned machine type, for example pc-q35-7.2."""
    capabilities: tuple[str, ...]
    """Validated capabilities that the source has on, of those that are understood here. There are
    none so far: any other is refused by name."""
    uuid: bytes | None
    """The guest's UUID, 16 bytes, when the source validates it."""
    raw: bytes
    """Stream header and configuration exactly as they were received."""


class OpenReturnPath(msgspec.Struct, frozen=True):
    """The source reads the other direction of the connection from now on."""


class Ping(msgspec.Struct, frozen=True):
    """To be answered with a PONG."""

    value: int
    """Unsigned, 32 bits."""


class Advise(msgspec.Struct, frozen=True):
    """The migration may become a post-copy one."""

    page_sizes: int
    """The host page sizes of all migrated blocks of the source, or-ed together."""
    target_page_size: int
    """Size of a page on the wire, a power of two."""


class BlockEntry(msgspec.Struct, frozen=True):
    """One RAM block of the source."""

    name: str
    length: int
    """The used length, a multiple of `page_size`, more than 0."""
    page_size: int
    """Host page size that backs the block at the source."""


class BlockList(msgspec.Struct, frozen=True):
    """All RAM blocks of the source."""

    total: int
    """Sum of the lengths."""
    blocks: tuple[BlockEntry, ...]
    """In the source's order, which means nothing; no two have the same name."""


class Pages(msgspec.Struct, frozen=True):
    """Page contents, in the order in which they came, all of one block.

    The payloads lie in the reader's memory: `address` and `data` are valid until the reader's
    next `buffers`, `received` or `feed`.
    """

    block: str
    offsets: Sequence[int]
    """Where page i belongs, each a multiple of the target page size. A `range` when the pages are
    neighbours in the block. A page may be there twice: the last one counts."""
    address: int
    """Where the payload of page 0 lies in this process."""
    stride: int
    """Page i lies at `address + i * stride`. Equal to the target page size when the payloads lie
    side by side, so that neighbours can be placed in one go."""
    data: memoryview
    """The memory at `address`, from the first byte of page 0 to the last byte of the last page."""

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def page_size(self) -> int:
        """The target page size."""
        return len(self.data) - (len(self.offsets) - 1) * self.stride

    def payload(self, place: int) -> memoryview:
        """Return the content of page number `place` of this message, from 0."""
        start = place * self.stride
        return self.data[start : start + self.page_size]

    def parts(self, most: int) -> Iterator[Pages]:
        """Give the same pages as messages of `most` pages or fewer, in order."""
        size = self.page_size
        for first in range(0, len(self.offsets), most):
            offsets = self.offsets[first : first + most]
            start = first * self.stride
            data = self.data[start : start + (len(offsets) - 1) * self.stride + size]
            yield Pages(self.block, offsets, self.address + start, self.stride, data)


class ZeroPages(msgspec.Struct, frozen=True):
    """Pages that are all zero, in the order in which they came, all of one block."""

    block: str
    offsets: Sequence[int]
    """As in `Pages`."""

    def __len__(self) -> int:
        return len(self.offsets)


class RamSectionEnd(msgspec.Struct, frozen=True):
    """A section of the RAM is complete, its footer checked."""

    kind: Literal["start", "part", "end"]
    """After "end" no page follows."""


class SwitchoverStart(msgspec.Struct, frozen=True):
    """The source begins the switchover. For information: nothing depends on it."""


class Discard(msgspec.Struct, frozen=True):
    """What came for these ranges is stale: forget it."""

    block: str
    ranges: tuple[tuple[int, int], ...]
    """(start, length), whole host pages of the source, inside the block, at least one."""


class Package(msgspec.Struct, frozen=True):
    """The device package. `postcopyd.wire.package` takes it apart."""

    data: bytes
    """As it was received; it has the shape that `parse_package` asks for."""


class PreemptEnd(msgspec.Struct, frozen=True):
    """No page follows on the preempt channel."""


class PostcopyResume(msgspec.Struct, frozen=True):
    """Recovery: the source has all bitmaps and waits for RESUME_ACK."""


class ReceivedBitmapRequest(msgspec.Struct, frozen=True):
    """Recovery: the source wants to know which pages of a block have been received."""

    block: str


class EndOfStream(msgspec.Struct, frozen=True):
    """The source has sent everything."""


class VmDescription(msgspec.Struct, frozen=True):
    """The description of the device state that may follow the end; it has been dropped."""

    length: int


class DeviceState(msgspec.Struct, frozen=True):
    """A section that is not RAM began outside a package: a pre-copy that converged.

    Only the VMM can read what follows, so everything from the section's first byte on comes as
    `Opaque`, without an end.
    """

    position: int
    """Number of the section's first byte on this connection."""


class Opaque(msgspec.Struct, frozen=True):
    """Bytes behind `DeviceState`, in order."""

    data: memoryview
    """Valid until the reader's next `buffers`, `received` or `feed`."""


Message: TypeAlias = (
    Configuration
    | OpenReturnPath
    | Ping
    | Advise
    | BlockList
    | Pages
    | ZeroPages
    | RamSectionEnd
    | SwitchoverStart
    | Discard
    | Package
    | PreemptEnd
    | PostcopyResume
    | ReceivedBitmapRequest
    | EndOfStream
    | VmDescription
    | DeviceState
    | Opaque
)
