"""The grammar of a migration stream: one generator that stops wherever bytes are missing.

`stream_reader` brings the bytes; here is what they mean, section by section (docs/qemu-wire.md, 1).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal, NoReturn

import msgspec

from postcopyd.wire.block_list import read_block_list
from postcopyd.wire.commands import (
    check_command,
    check_target_page_size,
    decode_advise,
    decode_bitmap_request,
    decode_discard,
)
from postcopyd.wire.configuration import ConfigurationReader, read_header
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import (
    Advise,
    BlockEntry,
    DeviceState,
    EndOfStream,
    Message,
    Opaque,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyResume,
    RamSectionEnd,
    SwitchoverStart,
    VmDescription,
)
from postcopyd.wire.package import check_package
from postcopyd.wire.ram_reader import RamReader
from postcopyd.wire.receive_buffer import ReceiveBuffer
from postcopyd.wire.stream_format import (
    EOS,
    MEM_SIZE,
    RAM,
    RAM_INSTANCE,
    RAM_VERSION,
    TARGET_PAGE_SIZE,
    Command,
    Section,
)

_Kind = Literal["start", "part", "end"]


class StreamLimits(msgspec.Struct, frozen=True):
    """What a source may make us allocate or read."""

    package: int = 16 << 20
    """Largest device package, bytes."""
    vm_description: int = 16 << 20
    """Longest description behind the end, bytes; it is dropped as it comes."""
    configuration: int = 255
    """Longest machine type, bytes."""
    blocks: int = 4096
    """Most RAM blocks."""


class ResumeState(msgspec.Struct, frozen=True):
    """What a resumed connection does not say again."""

    blocks: tuple[BlockEntry, ...]
    section_id: int
    target_page_size: int


class StreamParser:
    """Parses what is in `buffer` and appends what it says to `messages`."""

    def __init__(
        self, buffer: ReceiveBuffer, limits: StreamLimits, resume: ResumeState | None
    ) -> None:
        self.messages: list[Message] = []
        """Where messages go; whoever takes them away puts a new list here."""
        self.reading: str | None = None
        """What the stream is in the middle of; None between two messages."""
        self.package_begun = False
        """True once the source has begun to send its device package."""
        self.ended = False
        """True once the source has said that it has sent everything."""
        self.ram: RamReader | None = None
        """The reader of page records, once the first section "ram" has begun."""
        self.at_record = False
        """True while the next bytes belong to a page record, or to one that ends the records."""
        self.blocks: dict[bytes, BlockEntry] = {}
        """The RAM blocks by name."""
        self.section_id: int | None = None
        """The id of the section "ram", once it has begun."""
        self.target_page_size = TARGET_PAGE_SIZE
        self._buffer = buffer
        self._limits = limits
        self._page_sizes: int | None = None
        self._return_path_open = False
        self._ram_ended = False
        self._block_list_seen = resume is not None
        self._page_size_configured = False
        self._parser = self._new_migration() if resume is None else self._resumed(resume)

    def advance(self) -> None:
        """Parse as far as the bytes go.

        :raise ProtocolError: at a mistake; what came before it is in `messages`. There is no
            going on behind one.
        """
        next(self._parser)

    def _new_migration(self) -> Generator[None, None, None]:
        self.reading = "the stream header"
        header = yield from read_header(self._buffer)
        self.reading = "the configuration"
        position = self._buffer.position
        reader = ConfigurationReader(self._buffer, self._limits.configuration)
        configuration = yield from reader.read(header)
        if reader.target_page_bits is not None:
            # A silly number of bits must not become a silly number.
            self.target_page_size = 1 << min(reader.target_page_bits, 64)
            check_target_page_size(self.target_page_size, position)
            self._page_size_configured = True
        self.messages.append(configuration)
        yield from self._sections()

    def _resumed(self, state: ResumeState) -> Generator[None, None, None]:
        self.target_page_size = state.target_page_size
        self.section_id = state.section_id
        self.blocks.update((block.name.encode(), block) for block in state.blocks)
        self.ram = RamReader(self.blocks, state.target_page_size)
        self._return_path_open = True
        self.reading = "the first command of the resumed migration"
        yield from self._buffer.need(1)
        first = self._buffer.view[self._buffer.start]
        if first != Section.COMMAND:
            raise ProtocolError(
                f"a resumed migration begins with a command, not with {first:#04x}", 0
            )
        yield from self._sections()

    def _sections(self) -> Generator[None, None, None]:
        buffer = self._buffer
        while not self.ended:
            self.reading = None
            yield from buffer.need(1)
            position = buffer.position
            kind = buffer.view[buffer.start]
            if kind == Section.COMMAND:
                yield from self._command(position)
            elif kind == Section.PART:
                yield from self._ram_section("part", position)
            elif kind == Section.END:
                yield from self._ram_section("end", position)
            elif kind in (Section.START, Section.FULL):
                yield from self._named_section(kind, position)
            elif kind == Section.END_OF_FILE:
                self._end_of_stream(position)
            else:
                raise ProtocolError(
                    f"section type {kind:#04x} where a section or command begins", position
                )
        yield from self._behind_the_end()

    # -- sections ------------------------------------------------------------------------------

    def _named_section(self, kind: int, position: int) -> Generator[None, None, None]:
        """Read a section that says its name: "ram", or the begin of what only a VMM can read."""
        self.reading = "the head of a section"
        buffer = self._buffer
        yield from buffer.need(6)
        length = buffer.view[buffer.start + 5]
        yield from buffer.need(6 + length + 8)
        head = bytes(buffer.view[buffer.start : buffer.start + 6 + length + 8])
        name = head[6 : 6 + length]
        if not name:
            raise ProtocolError("a section without a name", position)
        if name != RAM.encode():
            yield from self._opaque(position)
        section_id, instance, version = (
            int.from_bytes(head[at : at + 4], "big") for at in (1, 6 + length, 10 + length)
        )
        if kind == Section.FULL:
            raise ProtocolError("the RAM in one piece (a FULL section 'ram')", position)
        if self.section_id is not None:
            raise ProtocolError("the section 'ram' begins a second time", position)
        if (instance, version) != (RAM_INSTANCE, RAM_VERSION):
            raise ProtocolError(
                f"section 'ram' with instance {instance} and version {version}; only instance "
                f"{RAM_INSTANCE} and version {RAM_VERSION} are known",
                position,
            )
        buffer.start += len(head)
        self.section_id = section_id
        self.ram = RamReader(self.blocks, self.target_page_size)
        yield from self._ram_payload("start", position)

    def _ram_section(self, kind: _Kind, position: int) -> Generator[None, None, None]:
        self.reading = "the head of a section"
        buffer = self._buffer
        yield from buffer.need(5)
        section_id = int.from_bytes(buffer.view[buffer.start + 1 : buffer.start + 5], "big")
        if section_id != self.section_id:
            raise ProtocolError(
                f"section {section_id} ({kind.upper()}) was never started", position
            )
        if self._ram_ended:
            raise ProtocolError(f"section {section_id} 'ram' goes on behind its end", position)
        buffer.start += 5
        yield from self._ram_payload(kind, position)
        self._ram_ended = kind == "end"

    def _ram_payload(self, kind: _Kind, position: int) -> Generator[None, None, None]:
        self.reading = f"section {self.section_id} 'ram' ({kind.upper()})"
        ram = self.ram
        buffer = self._buffer
        assert ram is not None
        while True:
            word = ram.parse(buffer, self.messages)
            if word == EOS:
                break
            if word is not None:
                yield from self._block_list(kind, word - MEM_SIZE, buffer.position - 8)
                continue
            self.at_record = True
            yield
            self.at_record = False
        if not self._block_list_seen:
            raise ProtocolError("the first section 'ram' has no list of RAM blocks", position)
        footer = yield from buffer.take(5)
        if footer[0] != Section.FOOTER or int.from_bytes(footer[1:], "big") != self.section_id:
            raise ProtocolError(
                f"section {self.section_id} 'ram' ends with {footer.hex(' ')}, not with its footer",
                buffer.position - 5,
            )
        self.messages.append(RamSectionEnd(kind))

    def _block_list(self, kind: _Kind, total: int, position: int) -> Generator[None, None, None]:
        if kind != "start" or self._block_list_seen:
            raise ProtocolError("a second list of RAM blocks", position)
        self._block_list_seen = True
        block_list = yield from read_block_list(
            self._buffer, total, self._page_sizes, self._limits.blocks
        )
        self.blocks.update((block.name.encode(), block) for block in block_list.blocks)
        self.messages.append(block_list)

    def _opaque(self, position: int) -> Generator[None, None, NoReturn]:
        self.reading = "the device state"
        self.messages.append(DeviceState(position))
        buffer = self._buffer
        while True:
            if buffer.pending:
                self.messages.append(Opaque(buffer.view[buffer.start : buffer.end]))
                buffer.start = buffer.end
            yield

    # -- commands ------------------------------------------------------------------------------

    def _command(self, position: int) -> Generator[None, None, None]:
        self.reading = "a command"
        buffer = self._buffer
        yield from buffer.need(5)
        head = buffer.view[buffer.start : buffer.start + 5]
        number = int.from_bytes(head[1:3], "big")
        length = int.from_bytes(head[3:5], "big")
        command = check_command(number, length, position)
        buffer.start += 5
        self.reading = f"the command {command.name}"
        payload = yield from buffer.take(length)
        if command is Command.PACKAGED:
            yield from self._package(int.from_bytes(payload, "big"), position)
        else:
            self.messages.append(self._decode_command(command, payload, position))

    def _decode_command(self, command: Command, payload: bytes, position: int) -> Message:
        match command:
            case Command.PING:
                value = int.from_bytes(payload, "big")
                if not self._return_path_open:
                    raise ProtocolError(
                        f"PING {value} came before a return path was opened", position
                    )
                return Ping(value)
            case Command.OPEN_RETURN_PATH:
                self._return_path_open = True
                return OpenReturnPath()
            case Command.POSTCOPY_ADVISE:
                return self._advise(payload, position)
            case Command.POSTCOPY_RAM_DISCARD:
                return decode_discard(payload, self.blocks, position)
            case Command.RECV_BITMAP:
                return decode_bitmap_request(payload, self.blocks, position)
            case Command.POSTCOPY_RESUME:
                return PostcopyResume()
            case Command.SWITCHOVER_START:
                return SwitchoverStart()
            case Command.ENABLE_COLO:
                raise ProtocolError("COLO is not supported: switch x-colo off", position)
            case _:
                raise ProtocolError(f"{command.name} outside a device package", position)

    def _advise(self, payload: bytes, position: int) -> Advise:
        advise = decode_advise(payload, position)
        if self.section_id is not None:
            raise ProtocolError("ADVISE came after the list of RAM blocks", position)
        if self._page_sizes is not None:
            raise ProtocolError("ADVISE came twice", position)
        size = advise.target_page_size
        if self._page_size_configured and size != self.target_page_size:
            raise ProtocolError(
                f"ADVISE says target pages of {size} bytes, the configuration "
                f"{self.target_page_size}",
                position,
            )
        self._page_sizes = advise.page_sizes
        self.target_page_size = size
        return advise

    def _package(self, length: int, position: int) -> Generator[None, None, None]:
        self.package_begun = True
        limit = self._limits.package
        if length > limit:
            raise ProtocolError(
                f"a device package of {length} bytes; the limit is {limit}", position
            )
        self.reading = f"the device package of {length} bytes"
        buffer = self._buffer
        begin = buffer.position
        data = bytearray()
        while len(data) < length:
            if not buffer.pending:
                yield
            taken = min(buffer.pending, length - len(data))
            data += buffer.view[buffer.start : buffer.start + taken]
            buffer.start += taken
        package = bytes(data)
        check_package(package, begin)
        self.messages.append(Package(package))

    # -- the end -------------------------------------------------------------------------------

    def _end_of_stream(self, position: int) -> None:
        if self.section_id is not None and not self._ram_ended:
            raise ProtocolError(
                f"the stream ends, but section {self.section_id} 'ram' has not ended", position
            )
        self._buffer.start += 1
        self.ended = True
        self.reading = None
        self.messages.append(EndOfStream())

    def _behind_the_end(self) -> Generator[None, None, NoReturn]:
        buffer = self._buffer
        yield from buffer.need(1)
        position = buffer.position
        if buffer.view[buffer.start] == Section.VM_DESCRIPTION:
            self.reading = "the description behind the end"
            length = int.from_bytes((yield from buffer.take(5))[1:], "big")
            if length > self._limits.vm_description:
                raise ProtocolError(
                    f"a description of {length} bytes behind the end; the limit is "
                    f"{self._limits.vm_description}",
                    position,
                )
            rest = length
            while rest:
                if not buffer.pending:
                    yield
                taken = min(buffer.pending, rest)
                buffer.start += taken
                rest -= taken
            self.reading = None
            self.messages.append(VmDescription(length))
            yield from buffer.need(1)
        raise ProtocolError("bytes behind the end of the stream", buffer.position)
