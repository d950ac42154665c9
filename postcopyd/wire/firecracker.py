"""Firecracker's handoff: one JSON array, an object for each region of guest memory.

It comes as one `sendmsg` without length, newline or NUL, so only the text itself tells where it
ends. Three generations are in use (Firecracker 1.1 to 1.6, 1.7 to 1.11, 1.12 and later); they
differ in how the page size is given. Facts: Firecracker's `docs/snapshotting/
handling-page-faults-on-snapshot-resume.md` and `src/vmm/src/persist.rs`
(`GuestRegionUffdMapping`).
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.handoff import BLOCK_LIMIT, FIRST_MESSAGE_LIMIT, REASON_LIMIT

PAGE_SIZES = (4096, 2 << 20)
"""Page sizes with which Firecracker backs guest memory, bytes."""

_Unsigned = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Region(msgspec.Struct, frozen=True):
    """One region of guest memory. Unknown fields are ignored: new versions add some."""

    address: _Unsigned = msgspec.field(name="base_host_virt_addr")
    """Where the region is mapped in the VMM, bytes; a multiple of the page size."""
    length: _Unsigned = msgspec.field(name="size")
    """Bytes; a multiple of the page size."""
    offset: _Unsigned
    """Where the region begins in the snapshot's memory file, bytes; a multiple of the page size."""
    page_size_given: _Unsigned | None = msgspec.field(name="page_size", default=None)
    page_size_kib: _Unsigned | None = None
    """In *bytes* in every version that sends it, whatever its name says."""
    is_guest_memfd: bool = False

    @property
    def page_size(self) -> int:
        """Host page size that backs the region, bytes."""
        if self.page_size_given is not None:
            return self.page_size_given
        return 4096 if self.page_size_kib is None else self.page_size_kib


class RegionsReader:
    """Reads Firecracker's message from bytes that come in any pieces."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._seen = 0  # bytes of it that `_complete` has looked at
        self._depth = 0
        self._in_string = False

    @property
    def pending(self) -> int:
        """Bytes received so far."""
        return len(self._text)

    def feed(self, data: bytes) -> tuple[Region, ...] | None:
        """Take the next bytes; return the regions once the text is complete, None before that.

        :raise ProtocolError: if the text is too long, is not such a message or breaks a rule for
            its values. The reader is of no use after it.
        """
        self._text += data
        if len(self._text) > FIRST_MESSAGE_LIMIT:
            raise ProtocolError(f"more than {FIRST_MESSAGE_LIMIT} bytes and not complete", None)
        return _decode(self._text) if self._complete() else None

    def _complete(self) -> bool:
        """Tell whether all brackets that were opened are closed, looking at each byte once."""
        while self._seen < len(self._text):
            pattern = _IN_STRING if self._in_string else _OUTSIDE
            match = pattern.search(self._text, self._seen)
            if match is None:
                self._seen = len(self._text)
                break
            token = match.group()
            if token == b"\\":
                self._seen = match.end() + 1  # what it escapes, which may still be to come
                continue
            self._seen = match.end()
            if token == b'"':
                self._in_string = not self._in_string
            elif token in b"[{":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    return True
        return False


_OUTSIDE = re.compile(rb'["\[\]{}]')
_IN_STRING = re.compile(rb'["\\]')

_decoder = msgspec.json.Decoder(
    Annotated[tuple[Region, ...], msgspec.Meta(min_length=1, max_length=BLOCK_LIMIT)]
)


def _decode(text: bytearray) -> tuple[Region, ...]:
    try:
        regions: tuple[Region, ...] = _decoder.decode(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        what = str(error)[:REASON_LIMIT]
        raise ProtocolError(f"not Firecracker's message: {what}", None) from None
    for number, region in enumerate(regions):
        _check(number, region, regions[0].page_size)
    return regions


def _check(number: int, region: Region, common_page_size: int) -> None:
    if region.is_guest_memfd:
        raise ProtocolError(
            f"region {number}: is_guest_memfd is true, and memory of that kind (guest_memfd, "
            "'secret freedom') is not served here; restore the snapshot without it",
            None,
        )
    size = region.page_size
    if size not in PAGE_SIZES:
        raise ProtocolError(
            f"region {number}: page size {size} is none of Firecracker's, 4096 and 2097152", None
        )
    if size != common_page_size:
        raise ProtocolError(
            f"region {number}: page size {size}, but {common_page_size} in region 0", None
        )
    for field, value in (
        ("base_host_virt_addr", region.address),
        ("size", region.length),
        ("offset", region.offset),
    ):
        if value % size:
            raise ProtocolError(
                f"region {number}: {field} {value:#x} is not a multiple of the page size {size}",
                None,
            )
