"""The native handoff: what a VMM and postcopyd say to each other, as lines of JSON.

The VMM speaks first, with one `Handoff` line and the descriptors that go with it; from then on
postcopyd sends `Event` lines and the VMM sends an `Answer` line to those that ask for one:

=================  ==========================================================================
event              answer
=================  ==========================================================================
registered         none: the handoff was accepted
inhibit-balloon    none
advise             advised: all memory is empty and nothing holds it
discard            discarded: no huge page forms any more
listening          none: faults are served from now on
run                loaded: the device state (it comes with a descriptor) is loaded
allow-balloon      none
complete           none, the last event: all memory is there, or what is `missing` is given up
failed             none, the last event
=================  ==========================================================================

Instead of advised, discarded or loaded the VMM may answer refused, with its reason.
When postcopyd was killed and goes on, it may say again what it has said: what is asked twice is
answered twice, and done once.
Here are only the lines; the descriptors travel beside them (SCM_RIGHTS).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Generic, TypeAlias, TypeVar

import msgspec

from postcopyd.wire.errors import ProtocolError

VERSION = 1
FIRST_MESSAGE_LIMIT = 1 << 20
"""Largest first message, native or of Firecracker, bytes."""
BLOCK_LIMIT = 4096
"""Most blocks in one handoff."""
LINE_LIMIT = 64 << 10
"""Longest line after the first message, bytes."""
REASON_LIMIT = 1000
"""Longest reason that a VMM may give, characters."""

_Unsigned = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class BlockDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One RAM block as the VMM describes it. Nothing but the types has been checked."""

    name: str
    address: _Unsigned
    """Where the block is mapped in the VMM, bytes."""
    length: _Unsigned
    """Bytes."""
    page_size: _Unsigned
    """Host page size that backs the block, bytes."""
    memory_file: _Unsigned | None = None
    """Which of the descriptors sent along is the shared memory behind the block, counted from 0
    (0 is the userfaultfd); None for private memory."""
    file_offset: _Unsigned = 0
    """Where in the memory file the block begins, bytes."""


# Unknown fields are refused: a wish that is not understood must not be dropped in silence.
class Handoff(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The first message: who the VMM is and what memory it hands over."""

    version: int = msgspec.field(name="postcopyd")
    """Always `VERSION`; the field that tells what the line is."""
    name: str
    """The migration that the VMM is for."""
    blocks: Annotated[tuple[BlockDescription, ...], msgspec.Meta(max_length=BLOCK_LIMIT)]
    listen: str | None = None
    """Address on which to wait for the source; None leaves it to postcopyd."""

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(
                f"handoff version {self.version} is not spoken here, only version {VERSION}"
            )


# Events may grow fields, which an older VMM is to ignore.
class _Event(msgspec.Struct, frozen=True, tag_field="event"):
    pass


class Registered(_Event, frozen=True, tag="registered"):
    """The handoff was accepted."""

    name: str
    listen: tuple[str, ...]
    """Addresses to which the source may connect."""


class InhibitBalloon(_Event, frozen=True, tag="inhibit-balloon"):
    """Give no memory back to the host from now on."""


class Advise(_Event, frozen=True, tag="advise"):
    """A migration begins: put memory locks aside, then empty all blocks."""


class Discard(_Event, frozen=True, tag="discard"):
    """Forbid huge pages from forming in all blocks."""


class Listening(_Event, frozen=True, tag="listening"):
    """Missing memory is waited for, and served, from now on."""


class Run(_Event, frozen=True, tag="run"):
    """The device state comes along in a sealed memory file: load it and run."""

    length: _Unsigned
    """Bytes of device state."""


class AllowBalloon(_Event, frozen=True, tag="allow-balloon"):
    """Memory may be given back to the host again."""


class Complete(_Event, frozen=True, tag="complete", omit_defaults=True):
    """No more memory comes: all is there, but for what an operator has given up."""

    missing: _Unsigned = 0
    """Bytes that never came and are memory errors."""


class Failed(_Event, frozen=True, tag="failed"):
    """The handoff was refused, or the migration has ended without all memory."""

    reason: str


class _Answer(msgspec.Struct, frozen=True, tag_field="event", forbid_unknown_fields=True):
    pass


class Advised(_Answer, frozen=True, tag="advised"):
    """Answers advise."""


class Discarded(_Answer, frozen=True, tag="discarded"):
    """Answers discard."""


class Loaded(_Answer, frozen=True, tag="loaded"):
    """Answers run."""


class Refused(_Answer, frozen=True, tag="refused"):
    """Answers any of them: it could not be done."""

    reason: Annotated[str, msgspec.Meta(max_length=REASON_LIMIT)]


Event: TypeAlias = (
    Registered
    | InhibitBalloon
    | Advise
    | Discard
    | Listening
    | Run
    | AllowBalloon
    | Complete
    | Failed
)
Answer: TypeAlias = Advised | Discarded | Loaded | Refused

_Message = TypeVar("_Message")


def encode(message: Handoff | Event | Answer) -> bytes:
    """Return `message` as one line, its newline included."""
    return msgspec.json.encode(message) + b"\n"


class LineReader(Generic[_Message]):
    """Reads messages of one kind from bytes that come in any pieces."""

    def __init__(self, kind: Any, limit: int, *, in_a_line: bool = False) -> None:
        """Read messages of the type or union `kind`; no line may have more than `limit` bytes.

        :param in_a_line: the first bytes may be the end of a line that somebody else has begun to
            read, and are left out then.
        """
        self._in_a_line = in_a_line
        self._decoder = msgspec.json.Decoder(kind)
        self._limit = limit
        self._line = bytearray()
        self._position = 0

    @property
    def pending(self) -> int:
        """Bytes received of a line that is not complete."""
        return len(self._line)

    def feed(self, data: bytes) -> Iterator[_Message]:
        """Take the next bytes; give the messages that they complete. To be iterated to its end.

        :raise ProtocolError: after the messages before it, if a line is too long or no message of
            the kind. The reader is of no use from there on.
        """
        *ends, rest = data.split(b"\n")
        for end in ends:
            first, self._in_a_line = self._in_a_line, False
            try:
                message = self._decode(end)
            except ProtocolError:
                if not first:
                    raise
                self._line.clear()
            else:
                yield message
        self._take(rest)

    def _take(self, data: bytes) -> None:
        self._line += data
        if len(self._line) > self._limit:
            raise ProtocolError(f"a line of more than {self._limit} bytes", self._position)

    def _decode(self, end: bytes) -> _Message:
        self._take(end)
        try:
            message: _Message = self._decoder.decode(self._line)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
            # It may quote the line, which may be long.
            what = str(error)[:REASON_LIMIT]
            raise ProtocolError(f"not a valid message: {what}", self._position) from None
        self._position += len(self._line) + 1
        self._line.clear()
        return message


def handoff_reader() -> LineReader[Handoff]:
    """Return a reader for what the VMM sends first."""
    return LineReader(Handoff, FIRST_MESSAGE_LIMIT)


def answer_reader(*, in_a_line: bool = False) -> LineReader[Answer]:
    """Return a reader for what the VMM sends from then on; for `in_a_line` see `LineReader`."""
    return LineReader(Answer, LINE_LIMIT, in_a_line=in_a_line)


def event_reader() -> LineReader[Event]:
    """Return a reader for what postcopyd sends."""
    return LineReader(Event, LINE_LIMIT)
