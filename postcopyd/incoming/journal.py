"""The journal of a migration: what a successor must know beside the page map, in a memory file.

It is written when something happens that happens once (a state, a VMM, the package), never for a
page. Two slots take turns, each with a sequence number and a checksum: whatever a write was killed
in, the one before it is whole.

Layout, all numbers little-endian:

====================== ========================================================================
at 0                   ``postcopyd-journal``, version as 32 bits (at 20)
at 4096                the messages of the last read of the userfaultfd, as the kernel wrote them:
                       it hands none out twice, and a removal that is lost would be filled again
at 8192, 8192 + SLOT   a slot: sequence number (64 bits), length and CRC-32 (32 bits each), JSON
====================== ========================================================================
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from typing import Annotated, Final

import msgspec

from postcopyd.incoming.report import Counters
from postcopyd.kernel import memory_file
from postcopyd.kernel.memory import Mapping

VERSION: Final = 1

_MAGIC: Final = b"postcopyd-journal"
_VERSION_AT: Final = 20
_EVENTS_AT: Final = 4096
_EVENTS_SIZE: Final = 4096
_SLOTS_AT: Final = 8192
_SLOT_SIZE: Final = 4 << 20
_SIZE: Final = _SLOTS_AT + 2 * _SLOT_SIZE
_SLOT: Final = struct.Struct("<QII")
_LAST_SEQUENCE: Final = 1 << 63
"""Nobody writes so often; what says so is no slot, and there would be no number behind it."""

_Unsigned = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class JournalUnreadable(Exception):
    """The journal says nothing that can be gone on from; the text says why."""


class BlockRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A RAM block of the VMM, as it was handed over."""

    name: str
    address: _Unsigned
    length: _Unsigned
    page_size: _Unsigned
    memory_file: str | None
    """By which name its memory file is kept; None for private memory."""
    file_offset: _Unsigned


class FedBlockRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A RAM block of the VMM that is not watched."""

    name: str
    length: _Unsigned
    maximum: _Unsigned


class VmmRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The VMM, as far as the engine knows it."""

    kind: str
    """Such as ``native``: who knows what `facts` mean."""
    facts: msgspec.Raw
    """What that one needs to know again, JSON."""
    blocks: tuple[BlockRecord, ...]
    fed: tuple[FedBlockRecord, ...]
    registered: bool
    """True when the VMM registered its memory itself."""


class SourceBlockRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A RAM block as the source announced it."""

    name: str
    length: _Unsigned
    page_size: _Unsigned


class SourceRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the source has said and does not say again."""

    configuration: bytes
    """Stream header and configuration as they were received."""
    blocks: tuple[SourceBlockRecord, ...]
    section_id: _Unsigned
    target_page_size: _Unsigned
    package_length: _Unsigned
    """Bytes of the package file that are the device package."""


class MigrationRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A migration as it stands. Times are seconds of CLOCK_MONOTONIC."""

    state: str
    failure: str | None = None
    peer: str | None = None
    preempt: str | None = None
    vmm: VmmRecord | None = None
    """The one whose memory is filled, or the last one."""
    waits_for_vmm: bool = False
    """True when that one has not loaded its devices, and another may take its place."""
    may_run: bool = False
    """True when that one may have run, or may run, without having said so."""
    source: SourceRecord | None = None
    """None before the package has come: until then the source is the VM and begins anew."""
    switchover_at: float | None = None
    loaded_at: float | None = None
    all_came: bool = False
    """True when the source has sent everything, and everything is placed or staged."""
    bytes_received: _Unsigned = 0
    counters: Counters = msgspec.field(default_factory=Counters)


_decoder = msgspec.json.Decoder(MigrationRecord)


class Journal:
    """The journal of one migration, over a memory file that this object owns."""

    def __init__(self, descriptor: int) -> None:
        """Take over a file that `create` has made, or a predecessor has left.

        :raise JournalUnreadable: if it is none, or of a version that is not known.
        :raise OSError: if it cannot be mapped.
        """
        self._descriptor = descriptor
        try:
            if os.fstat(descriptor).st_size != _SIZE:
                raise JournalUnreadable("it is not of the size that a journal has")
            # Read before it is mapped: reading cannot raise SIGBUS.
            head = os.pread(descriptor, _VERSION_AT + 4, 0)
            if not head.startswith(_MAGIC):
                raise JournalUnreadable("it does not begin as a journal does")
            version = int.from_bytes(head[_VERSION_AT:], "little")
            if version != VERSION:
                raise JournalUnreadable(
                    f"it is of version {version}, and this postcopyd reads version {VERSION}: "
                    "start the version that wrote it"
                )
            self._mapping = Mapping.of_file(descriptor, _EVENTS_SIZE, _EVENTS_AT)
        except BaseException:
            os.close(descriptor)
            raise
        self.events = self._mapping.view
        """Where the messages of the userfaultfd are to be read into."""
        self._sequence = max((sequence for sequence, _ in self._slots()), default=0)

    @staticmethod
    def create() -> int:
        """Return the descriptor of a new, empty journal.

        :raise OSError: if there is no memory for it.
        """
        descriptor = memory_file.create("postcopyd-journal", _SIZE)
        try:
            os.pwrite(descriptor, _MAGIC, 0)
            os.pwrite(descriptor, VERSION.to_bytes(4, "little"), _VERSION_AT)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def write(self, record: MigrationRecord) -> None:
        """Put `record` in the place of the one before.

        :raise OSError: if it is too long, or there is no memory for it; the one before stays.
        """
        content = msgspec.json.encode(record)
        if len(content) > _SLOT_SIZE - _SLOT.size:
            raise OSError(f"a record of {len(content)} bytes does not fit into the journal")
        sequence = self._sequence + 1
        place = _SLOTS_AT + sequence % 2 * _SLOT_SIZE
        head = _SLOT.pack(sequence, len(content), _checksum(sequence, content))
        # Not through the mapping: a machine that is out of memory gives an errno then.
        for part, at in ((content, place + _SLOT.size), (head, place)):
            written = os.pwrite(self._descriptor, part, at)
            if written < len(part):
                raise OSError(errno.ENOMEM, f"{written} of {len(part)} bytes were written")
        self._sequence = sequence

    def read(self) -> MigrationRecord | None:
        """Return what was written last; None if nothing was.

        :raise JournalUnreadable: if it is not a record of this version, or no longer one.
        """
        newest = max(self._slots(), default=None)
        if newest is None:
            if any(any(self._head_of(number)) for number in range(2)):
                raise JournalUnreadable("something was written, and none of it is whole")
            return None
        try:
            return _decoder.decode(newest[1])
        except (ValueError, RecursionError) as error:
            raise JournalUnreadable(f"its record is wrong: {error}") from None

    def _slots(self) -> list[tuple[int, bytes]]:
        """Return sequence number and content of each slot that is whole."""
        found = []
        for number in range(2):
            sequence, length, checksum = _SLOT.unpack(self._head_of(number))
            if not 0 < sequence < _LAST_SEQUENCE or sequence % 2 != number:
                continue
            if length > _SLOT_SIZE - _SLOT.size:
                continue
            place = _SLOTS_AT + number * _SLOT_SIZE + _SLOT.size
            content = os.pread(self._descriptor, length, place)
            if checksum == _checksum(sequence, content):
                found.append((sequence, content))
        return found

    def _head_of(self, number: int) -> bytes:
        return os.pread(self._descriptor, _SLOT.size, _SLOTS_AT + number * _SLOT_SIZE)

    def close(self) -> None:
        """Release mapping and descriptor. Idempotent."""
        if self._descriptor >= 0:
            self._mapping.close_when_unused()
            os.close(self._descriptor)
            self._descriptor = -1


def _checksum(sequence: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(sequence.to_bytes(8, "little")))
