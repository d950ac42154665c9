"""What is fuzzed: for each reader of something from outside one function that takes any bytes.

It tells what came of them, and raises if that is not what must come of any bytes at all: accepted,
or refused with the one exception that the reader documents; the same however they are split.
"""

from __future__ import annotations

import contextlib
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final, TypeVar

from postcopyd.daemon import channel
from postcopyd.daemon.certificate_names import AllowedNames
from postcopyd.daemon.config import check_name
from postcopyd.daemon.sockets import check_path, listen_address
from postcopyd.incoming.journal import Journal, JournalUnreadable
from postcopyd.vmm import checks
from postcopyd.vmm.checks import HandoffRefused
from postcopyd.vmm.handoff import _firecracker_blocks, _native_blocks
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.firecracker import Region, RegionsReader
from postcopyd.wire.handoff import LineReader, answer_reader, handoff_reader
from postcopyd.wire.preempt_reader import PreemptReader
from postcopyd.wire.return_path import ReturnMessage, ReturnPathReader
from postcopyd.wire.stream_reader import ResumeState, StreamReader
from tests.fuzz import corpus
from tests.wire.reference_parser import ReferenceParser
from tests.wire.streams import BLOCKS, PAGE, SECTION_ID, receive, until_pages

ACCEPTED: Final = "accepted"
REFUSED: Final = "refused"

_T = TypeVar("_T")
_RECEIVES = 300
"""Most receives of the chosen size; what is left then comes at once, to save time."""
_SIZES = (1, 2, 7, 8, 9, 100, 4095, 4104, 4105, 9000, 70_000)
_PREFIX = until_pages()


def one_stream(data: bytes) -> str:
    """Read one stream: the first byte says how it is split and whether a right head is in front.

    :raise AssertionError: if the reader and the reference parser do not agree.
    """
    if not data:
        return REFUSED
    choice, stream = data[0], data[1:]
    if choice & corpus.AT_THE_FIRST_PAGE:
        stream = _PREFIX + stream
    size = _SIZES[(choice & 0x7F) % len(_SIZES)]
    reader = StreamReader()
    outcome = receive(reader, stream, [size] * min(len(stream) // size, _RECEIVES))
    reference = ReferenceParser(stream)
    if not _beyond_the_reference(stream, reference):
        wrong_at = outcome.error.position if outcome.error else None
        assert wrong_at == reference.wrong_at, (outcome.error, reference.wrong_at)
        assert outcome.events == reference.events
    return ACCEPTED if outcome.error is None else REFUSED


def _beyond_the_reference(stream: bytes, reference: ReferenceParser) -> bool:
    """Tell whether the reference stopped at what only the reader knows.

    That is a subsection of the configuration, and ADVISE with other target pages.
    """
    at = reference.wrong_at
    if at is None:
        return False
    subsection = not reference.events and stream[at : at + 1] == b"\x05"
    return subsection or stream[at : at + 3] == b"\x08\0\x03"


def one_resumed_stream(data: bytes) -> str:
    """Read one stream of a source that comes back: the first byte says how it is split.

    :raise AssertionError: if the split makes a difference.
    """
    return _split(data, lambda: StreamReader(resume=ResumeState(BLOCKS, SECTION_ID, PAGE)))


def one_preempt_channel(data: bytes) -> str:
    """Read one preempt channel. As `one_resumed_stream`."""
    return _split(data, lambda: PreemptReader(BLOCKS, PAGE))


def _split(data: bytes, reader: Callable[[], StreamReader | PreemptReader]) -> str:
    if not data:
        return REFUSED
    size, said = _SIZES[data[0] % len(_SIZES)], data[1:]
    split = receive(reader(), said, [size] * min(len(said) // size, _RECEIVES))
    whole = receive(reader(), said)
    assert split.events == whole.events
    assert str(split.error) == str(whole.error)
    return ACCEPTED if whole.error is None else REFUSED


def one_return_path(data: bytes) -> str:
    """Read one return path. As `one_resumed_stream`."""

    def messages(pieces: list[bytes]) -> tuple[list[ReturnMessage], str]:
        reader = ReturnPathReader(BLOCKS)
        came: list[ReturnMessage] = []
        try:
            for piece in pieces:
                came.extend(reader.feed(piece))
        except ProtocolError as error:
            return came, str(error)
        return came, ""

    return _however_split(data, messages)[1]


def one_handoff(data: bytes) -> str:
    """Read what a native VMM sends first, and check its blocks. As `one_resumed_stream`."""
    lines, outcome = _however_split(data, lambda pieces: _lines(handoff_reader(), pieces))
    for handoff in lines:
        try:
            checks.check_name("the migration", handoff.name)
            checks.check_blocks(_native_blocks(handoff, (0, 1, 2)))
        except HandoffRefused as refused:
            assert len(refused.reason) < 2000
            outcome = REFUSED
    return outcome


def one_firecracker_handoff(data: bytes) -> str:
    """Read what Firecracker sends, and check its regions. As `one_resumed_stream`."""

    def regions(pieces: list[bytes]) -> tuple[list[tuple[Region, ...]], str]:
        reader = RegionsReader()
        try:
            for place, piece in enumerate(pieces, 1):
                if (came := reader.feed(piece)) is not None:
                    # What comes behind it is a mistake if it is there already.
                    return ([came], "") if place == len(pieces) else ([], "wrong")
        except ProtocolError as error:
            return [], _kind_of(error)
        return [], ""

    came, outcome = _however_split(data, regions)
    for message in came:
        try:
            checks.check_blocks(_firecracker_blocks(message))
        except HandoffRefused:
            outcome = REFUSED
    return outcome


def one_answer(data: bytes) -> str:
    """Read what a native VMM sends later. As `one_resumed_stream`."""
    return _however_split(data, lambda pieces: _lines(answer_reader(), pieces))[1]


def _lines(reader: LineReader[_T], pieces: list[bytes]) -> tuple[list[_T], str]:
    came: list[_T] = []
    try:
        for piece in pieces:
            for line in reader.feed(piece):
                came.append(line)
    except ProtocolError as error:
        return came, _kind_of(error)
    return came, ""


def _kind_of(error: ProtocolError) -> str:
    assert len(str(error)) < 2000
    return "wrong"


def _however_split(
    data: bytes, read: Callable[[list[bytes]], tuple[list[_T], str]]
) -> tuple[list[_T], str]:
    """Read `data` behind its first byte in pieces and whole; return what came of it.

    :raise AssertionError: if that makes a difference.
    """
    if not data:
        return [], REFUSED
    size, said = data[0] % 32 + 1, data[1:]
    size = max(size, len(said) // _RECEIVES)
    whole = read([said])
    pieces = read([said[start : start + size] for start in range(0, len(said), size)])
    assert pieces == whole
    return whole[0], REFUSED if whole[1] else ACCEPTED


def one_journal(data: bytes) -> str:
    """Read a journal whose newest slot holds `data`, behind a first byte that says where."""
    if not data:
        return REFUSED
    sequence, content = data[0] + 1, data[1:]
    descriptor = Journal.create()
    checksum = zlib.crc32(content, zlib.crc32(sequence.to_bytes(8, "little")))
    head = sequence.to_bytes(8, "little") + len(content).to_bytes(4, "little")
    slot = 8192 + sequence % 2 * (4 << 20)
    os.pwrite(descriptor, head + checksum.to_bytes(4, "little") + content, slot)
    journal = Journal(descriptor)
    try:
        assert journal.read() is not None
    except JournalUnreadable as error:
        assert str(error)
        return REFUSED
    finally:
        journal.close()
    return ACCEPTED


_ends: list[socket.socket] = []
_spare = os.memfd_create("spare")


def one_packet(data: bytes) -> str:
    """Receive one packet between supervisor and worker; the first byte says what comes along.

    :raise AssertionError: if a descriptor that came is neither given nor closed.
    """
    if not data:
        return REFUSED
    if not _ends:
        _ends.extend(channel.Channel.pair())
    sender, receiver = _ends
    rights = [_spare] * (data[0] % 4)
    before = _free_numbers()
    socket.send_fds(sender, [data[1:] or b" "], rights)
    try:
        for _, descriptor in channel.Channel(receiver).received():
            if descriptor is not None:
                os.close(descriptor)
        outcome = ACCEPTED
    except ValueError:
        outcome = REFUSED
    assert _free_numbers() == before, "a descriptor is left open"
    return outcome


def _free_numbers() -> list[int]:
    """Return the lowest numbers that the next descriptors get."""
    taken = [os.dup(_spare) for _ in range(4)]
    for descriptor in taken:
        os.close(descriptor)
    return taken


def one_text(data: bytes) -> str:
    """Take a text for each thing that a user of the control API may name."""
    text = data.decode(errors="surrogateescape")
    accepted = 0
    for check in (check_name, listen_address, check_path, lambda name: AllowedNames([name])):
        with contextlib.suppress(ValueError):
            check(text)
            accepted += 1
    return ACCEPTED if accepted else REFUSED


@dataclass(frozen=True)
class Target:
    """One reader of something from outside."""

    one_input: Callable[[bytes], str]
    """Takes any bytes, and tells what came of them."""
    seeds: Callable[[], Iterator[bytes]]
    """Inputs to begin with."""
    hostile: Callable[[Random], bytes]
    """Makes an input that is right but for a few things."""


TARGETS: Final[dict[str, Target]] = {
    "stream": Target(one_stream, corpus.stream_seeds, corpus.hostile_stream),
    "resumed": Target(one_resumed_stream, corpus.resumed_seeds, corpus.hostile_resumed_stream),
    "preempt": Target(one_preempt_channel, corpus.preempt_seeds, corpus.hostile_preempt_channel),
    "return-path": Target(one_return_path, corpus.return_path_seeds, corpus.hostile_return_path),
    "handoff": Target(one_handoff, corpus.handoff_seeds, corpus.hostile_handoff),
    "firecracker": Target(
        one_firecracker_handoff, corpus.firecracker_seeds, corpus.hostile_firecracker_handoff
    ),
    "answers": Target(one_answer, corpus.answer_seeds, corpus.hostile_answers),
    "journal": Target(one_journal, corpus.journal_seeds, corpus.hostile_journal),
    "channel": Target(one_packet, corpus.packet_seeds, corpus.hostile_packet),
    "texts": Target(one_text, corpus.text_seeds, corpus.hostile_text),
}


def check(target: str, data: bytes) -> str:
    """Have one target take `data`; what goes wrong is told with the input.

    :raise AssertionError: with the input, if anything is raised.
    """
    try:
        return TARGETS[target].one_input(data)
    except Exception as error:
        raise AssertionError(f"{target}: {error!r} for the input {data!r}") from error
