"""The head of a new migration: stream header and configuration (docs/qemu-wire.md, 1 and 1.1)."""

from __future__ import annotations

from collections.abc import Generator

from postcopyd.wire.errors import NotAStream, NothingToResume, ProtocolError
from postcopyd.wire.messages import Configuration
from postcopyd.wire.names import decode_name
from postcopyd.wire.receive_buffer import ReceiveBuffer
from postcopyd.wire.stream_format import (
    CAPABILITIES,
    MAGIC,
    MULTIFD_MAGIC,
    SUBSECTION_VERSION,
    TARGET_PAGE_BITS,
    TLS_HANDSHAKE,
    UUID,
    UUID_LENGTH,
    VERSION,
    Section,
)


def read_header(buffer: ReceiveBuffer) -> Generator[None, None, bytes]:
    """Read the stream header.

    :return: its bytes.
    :raise NotAStream: if it is not the header of a stream that is understood, saying what it looks
        like instead; `NothingToResume` if it is a resumed one.
    """
    position = buffer.position
    magic = yield from buffer.take(len(MAGIC))
    if magic != MAGIC:
        kind = NothingToResume if magic[0] == Section.COMMAND else NotAStream
        raise kind(f"not a migration stream: {_explain(magic)}", position)
    version = yield from buffer.take(4)
    if int.from_bytes(version, "big") != VERSION:
        raise NotAStream(
            f"stream version {int.from_bytes(version, 'big')}; only {VERSION} is spoken", position
        )
    return magic + version


def _explain(magic: bytes) -> str:
    if magic == MULTIFD_MAGIC:
        return "it begins as a multifd channel; switch the capability multifd off at the source"
    if magic.startswith(TLS_HANDSHAKE):
        return "it begins as a TLS handshake, and no TLS is spoken here"
    if magic[0] == Section.COMMAND:
        return "it begins with a command, as a resumed migration does, and none is paused here"
    if magic[0] == 0:
        return (
            "it begins with a page record, as a preempt channel does; the main connection has to "
            "come first"
        )
    return f"it begins with {magic.hex(' ')}"


class ConfigurationReader:
    """Reads one configuration; a class only because two results come of it."""

    def __init__(self, buffer: ReceiveBuffer, name_limit: int) -> None:
        """Read from `buffer`; a machine name may have `name_limit` bytes."""
        self._buffer = buffer
        self._name_limit = name_limit
        self._raw = b""
        self.target_page_bits: int | None = None
        """The target page size as a power of two, when the source says it."""

    def read(self, header: bytes) -> Generator[None, None, Configuration]:
        """Read the configuration that follows `header`.

        :raise ProtocolError: if there is none, it is malformed, or it asks for what is not
            supported.
        """
        buffer = self._buffer
        position = buffer.position
        self._raw = header
        kind = yield from self._number(1)
        if kind != Section.CONFIGURATION:
            raise ProtocolError(
                f"the configuration is missing: section type {kind:#04x} follows the header",
                position,
            )
        length = yield from self._number(4)
        if not 0 < length <= self._name_limit:
            raise ProtocolError(
                f"a machine type of {length} bytes; 1 to {self._name_limit} are accepted", position
            )
        machine = decode_name((yield from self._take(length)), "machine", position)
        uuid: bytes | None = None
        seen: set[str] = set()
        while True:
            # Only the byte behind it tells that the configuration has no further subsection.
            yield from buffer.need(1)
            position = buffer.position
            if buffer.view[buffer.start] != Section.SUBSECTION:
                return Configuration(machine, (), uuid, self._raw)
            name = yield from self._subsection_name()
            if name in seen:
                raise ProtocolError(f"the subsection {name!r} comes twice", position)
            seen.add(name)
            if name == TARGET_PAGE_BITS:
                self.target_page_bits = yield from self._number(4)
            elif name == CAPABILITIES:
                yield from self._capabilities(position)
            elif name == UUID:
                uuid = yield from self._take(UUID_LENGTH)
            else:
                raise ProtocolError(f"unknown subsection {name!r} of the configuration", position)

    def _subsection_name(self) -> Generator[None, None, str]:
        position = self._buffer.position
        yield from self._take(1)
        name = decode_name((yield from self._counted()), "subsection", position)
        version = yield from self._number(4)
        if version != SUBSECTION_VERSION:
            raise ProtocolError(
                f"version {version} of the subsection {name!r}; only {SUBSECTION_VERSION} is known",
                position,
            )
        return name

    def _capabilities(self, position: int) -> Generator[None, None, None]:
        """Refuse the first capability: each that is validated changes what the stream holds."""
        count = yield from self._number(4)
        if count:
            name = decode_name((yield from self._counted()), "capability", position)
            raise ProtocolError(
                f"the capability {name} is not supported: switch it off at the source", position
            )

    def _take(self, count: int) -> Generator[None, None, bytes]:
        data = yield from self._buffer.take(count)
        self._raw += data
        return data

    def _number(self, size: int) -> Generator[None, None, int]:
        return int.from_bytes((yield from self._take(size)), "big")

    def _counted(self) -> Generator[None, None, bytes]:
        length = yield from self._number(1)
        return (yield from self._take(length))
