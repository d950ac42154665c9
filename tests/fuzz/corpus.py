"""Inputs: right ones to begin fuzzing with, short ones first, and ones that are nearly right."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, Final

import msgspec

from postcopyd.daemon import channel
from postcopyd.wire import handoff
from postcopyd.wire import stream_writer as writer
from postcopyd.wire.return_path import ReturnPathWriter
from postcopyd.wire.stream_format import EOS
from tests.fuzz.hostile_streams import HostileStreams
from tests.fuzz.mutating import changed_bytes, changed_json, changed_order
from tests.wire.streams import (
    BIG,
    BLOCKS,
    CAPTURES,
    DEVICES,
    HUGE,
    PAGE,
    RAM,
    SECTION_ID,
    VGA,
    captured,
    page_content,
    until_pages,
)

AT_THE_FIRST_PAGE = 0x80
"""In the first byte of an input: everything up to the first page record is put in front."""

_streams = HostileStreams(BLOCKS)


def _with_split(numbers: Random, parts: list[bytes]) -> bytes:
    return bytes((numbers.randrange(128),)) + b"".join(parts)


def stream_seeds() -> Iterator[bytes]:
    """Give streams with the byte in front that says how they are split."""
    ram = writer.StreamWriter(SECTION_ID)
    head = until_pages(ram)
    pages = b"".join(
        header + page_content(place)
        for place, header in enumerate(
            ram.page_headers(RAM.name, [0, PAGE, 2 * PAGE, 9 * PAGE, PAGE])
        )
    )
    records = ram.zero_pages(VGA.name, [0, PAGE, 5 * PAGE]) + pages + ram.ram_footer()
    commands = (
        writer.discard(VGA.name, [(0, PAGE), (PAGE, 2 * PAGE)])
        + writer.switchover_start()
        + writer.ping(2)
        + writer.package(DEVICES)
        + writer.received_bitmap_request(BIG.name)
        + writer.postcopy_resume()
    )
    end = ram.ram_end() + ram.zero_page(BIG.name, HUGE) + ram.ram_footer() + writer.END_OF_STREAM
    for split in (0, 4, 7, 10):
        yield bytes((split,)) + head + records + commands + end
        yield bytes((split | AT_THE_FIRST_PAGE,)) + records + commands + end
        yield bytes((split | AT_THE_FIRST_PAGE,)) + ram.ram_footer() + DEVICES
    yield b"\x0a" + head + ram.ram_footer() + end + writer.vm_description(b"{}")
    # Pages expected, then zero pages as long as a page, then a page again, in receives of 9000.
    again = writer.StreamWriter(SECTION_ID)
    guess = b"".join(
        header + page_content(place)
        for place, header in enumerate(again.page_headers(RAM.name, range(0, 3 * PAGE, PAGE)))
    )
    zeros = again.zero_pages(RAM.name, range(0, 500 * PAGE, PAGE))
    last = again.page(RAM.name, PAGE) + page_content(1) + again.ram_footer()
    yield bytes((9 | AT_THE_FIRST_PAGE,)) + guess + zeros + last
    for name in CAPTURES:
        yield b"\x09" + captured(name)


def hostile_stream(numbers: Random) -> bytes:
    """Return a stream, as `stream_seeds`."""
    return _with_split(numbers, _streams.stream(numbers))


def resumed_seeds() -> Iterator[bytes]:
    """Give streams of a source that comes back, with the byte in front that says the split."""
    ram = writer.StreamWriter(SECTION_ID)
    asked = b"".join(writer.received_bitmap_request(block.name) for block in BLOCKS)
    page = ram.page(RAM.name, PAGE) + page_content(1)
    for split in (0, 4, 10):
        said = asked + writer.postcopy_resume() + ram.ram_part() + page + ram.ram_footer()
        yield bytes((split,)) + said + ram.ram_end() + ram.ram_footer() + writer.END_OF_STREAM


def hostile_resumed_stream(numbers: Random) -> bytes:
    """Return a stream of a source that comes back, as `resumed_seeds`."""
    return _with_split(numbers, _streams.resumed(numbers))


def preempt_seeds() -> Iterator[bytes]:
    """Give preempt channels with the byte in front that says how they are split."""
    ram = writer.StreamWriter(0)
    pages = b"".join(
        header + page_content(place)
        for place, header in enumerate(ram.page_headers(RAM.name, [0, 9 * PAGE, PAGE]))
    )
    records = ram.zero_pages(VGA.name, [0, PAGE]) + pages + ram.zero_page(RAM.name, 5 * PAGE)
    for split in (0, 4, 7, 10):
        yield bytes((split,)) + records + writer.page_word(0, EOS)
        yield bytes((split,)) + records


def hostile_preempt_channel(numbers: Random) -> bytes:
    """Return a preempt channel, as `preempt_seeds`."""
    return _with_split(numbers, _streams.preempt(numbers))


def return_path_seeds() -> Iterator[bytes]:
    """Give return paths with the byte in front that says how they are split."""
    said = ReturnPathWriter()
    everything = (
        said.pong(1)
        + said.request_pages(RAM.name, PAGE, PAGE)
        + said.request_pages(RAM.name, 0, PAGE)
        + said.received_bitmap(VGA.name, b"\xff\x0f" + bytes(6))
        + said.request_pages(BIG.name, HUGE, HUGE)
        + said.resume_ack()
        + said.switchover_ack()
        + said.shut(0)
    )
    for split in (0, 4, 31):
        yield bytes((split,)) + everything


def hostile_return_path(numbers: Random) -> bytes:
    """Return a return path, as `return_path_seeds`."""
    return _with_split(numbers, _streams.return_path(numbers))


# -- handoffs --------------------------------------------------------------------------------------

_BLOCK: Final[dict[str, Any]] = {
    "name": "pc.ram",
    "address": 0x7F0000000000,
    "length": 64 * PAGE,
    "page_size": PAGE,
}
_HANDOFF: Final[dict[str, Any]] = {
    "postcopyd": handoff.VERSION,
    "name": "vm0",
    "blocks": [
        _BLOCK,
        _BLOCK | {"name": "file", "address": 0x7E0000000000, "memory_file": 1, "file_offset": PAGE},
        _BLOCK | {"name": "other", "address": 0x7D0000000000, "memory_file": 2},
    ],
    "listen": "tcp:127.0.0.1:0",
}
_REGION: Final[dict[str, Any]] = {
    "base_host_virt_addr": 0x7F0000000000,
    "size": 2 * HUGE,
    "offset": 0,
}
_REGIONS: Final[tuple[list[dict[str, Any]], ...]] = (
    [_REGION, _REGION | {"base_host_virt_addr": 0x7E0000000000, "offset": 2 * HUGE}],
    [
        _REGION | {"page_size_kib": 4096},
        _REGION | {"base_host_virt_addr": HUGE, "page_size_kib": 4096},
    ],
    [_REGION | {"page_size": HUGE, "page_size_kib": HUGE, "is_guest_memfd": False}],
)


def handoff_seeds() -> Iterator[bytes]:
    """Give handoffs with the byte in front that says how they are split."""
    for split in (0, 31):
        yield bytes((split,)) + msgspec.json.encode(_HANDOFF) + b"\n"


def hostile_handoff(numbers: Random) -> bytes:
    """Return a handoff, as `handoff_seeds`."""
    return _with_split(numbers, [changed_json(numbers, _HANDOFF), b"\n"])


def firecracker_seeds() -> Iterator[bytes]:
    """Give Firecracker's handoffs with the byte in front that says how they are split."""
    for regions in _REGIONS:
        yield b"\x1f" + msgspec.json.encode(regions)


def hostile_firecracker_handoff(numbers: Random) -> bytes:
    """Return a handoff of Firecracker's, as `firecracker_seeds`."""
    return _with_split(numbers, [changed_json(numbers, numbers.choice(_REGIONS))])


_ANSWERS: Final[tuple[dict[str, Any], ...]] = (
    {"event": "advised"},
    {"event": "discarded"},
    {"event": "loaded"},
    {"event": "refused", "reason": "no memory"},
)


def answer_seeds() -> Iterator[bytes]:
    """Give answers of a VMM with the byte in front that says how they are split."""
    lines = b"".join(msgspec.json.encode(answer) + b"\n" for answer in _ANSWERS)
    for split in (0, 31):
        yield bytes((split,)) + lines


def hostile_answers(numbers: Random) -> bytes:
    """Return a few answers of a VMM, as `answer_seeds`."""
    lines = [msgspec.json.encode(answer) + b"\n" for answer in _ANSWERS]
    changed_order(numbers, lines, [b"\n", b"{}\n", b" " * 100, b" " * 70_000])
    place = numbers.randrange(len(lines) + 1)
    lines.insert(place, changed_json(numbers, numbers.choice(_ANSWERS)) + b"\n")
    return _with_split(numbers, lines)


# -- what is kept for a successor ------------------------------------------------------------------

RECORD: Final[dict[str, Any]] = {
    "state": "running",
    "failure": None,
    "peer": "tcp:127.0.0.1:4444",
    "preempt": None,
    "vmm": {
        "kind": "native",
        "facts": {"advised": True, "discarded": True, "loaded": True},
        "blocks": [
            _BLOCK | {"memory_file": None, "file_offset": 0},
            _BLOCK
            | {"name": "file", "address": PAGE, "memory_file": "memory-0", "file_offset": PAGE},
        ],
        "fed": [{"name": "vga", "length": PAGE, "maximum": 16 * PAGE}],
        "registered": False,
    },
    "waits_for_vmm": False,
    "may_run": False,
    "source": {
        "configuration": "UUVWTQAAAAMHAAAABXBjLXEz",
        "blocks": [{"name": "pc.ram", "length": 64 * PAGE, "page_size": PAGE}],
        "section_id": SECTION_ID,
        "target_page_size": PAGE,
        "package_length": 100,
    },
    "switchover_at": 1.5,
    "loaded_at": 2.5,
    "all_came": False,
    "bytes_received": 1 << 20,
    "counters": {"faults": 3, "requests": 2},
}
"""A record of a migration, as a journal holds it."""


def journal_seeds() -> Iterator[bytes]:
    """Give records with the byte in front that says in which slot they are."""
    yield b"\x04" + msgspec.json.encode(RECORD)
    yield b"\x07" + msgspec.json.encode({"state": "none"})


def hostile_journal(numbers: Random) -> bytes:
    """Return a record, as `journal_seeds`."""
    return bytes((numbers.randrange(256),)) + changed_json(numbers, RECORD)


_PACKETS: Final[tuple[channel.Message, ...]] = (
    channel.Held("vm0", "journal"),
    channel.Released("vm0", "vmm-pidfd"),
    channel.Forgotten("vm0"),
    channel.Settle(),
    channel.Settled(),
    channel.Begin(msgspec.Raw(b'{"listen":"tcp:127.0.0.1:0"}'), True, 1, 2, True),
    channel.Stop(),
    channel.Ended(),
    channel.End(),
    channel.Leave(),
    channel.Reload(),
    channel.Reloaded(),
    channel.Ready(),
    channel.Alive(),
    channel.CannotStart("no userfaultfd"),
    channel.Listed("vm0", "running", "running"),
    channel.Unlisted("vm0"),
    channel.Forget("vm0"),
    channel.Claim("vm0"),
    channel.Claimed("vm0", "name-taken"),
    channel.Where(7, "vm0"),
    channel.There(7, 1, None, {0: 3, 1: 0}, ("vm0", "vm1"), 2),
    channel.PassOn(1, "request"),
    channel.Handed("vmm"),
)

_RIGHT_DESCRIPTORS: Final = 0.8
"""How often a packet comes with as many descriptors as belong to it."""


def packet_seeds() -> Iterator[bytes]:
    """Give packets with the byte in front that says how many descriptors come along."""
    for place, packet in enumerate(_PACKETS):
        yield bytes((place % 4,)) + msgspec.json.encode(packet)


def hostile_packet(numbers: Random) -> bytes:
    """Return a packet, as `packet_seeds`."""
    packet = numbers.choice(_PACKETS)
    right = isinstance(packet, channel.Held | channel.PassOn | channel.Handed)
    descriptors = right if numbers.random() < _RIGHT_DESCRIPTORS else numbers.randrange(4)
    content = msgspec.json.decode(msgspec.json.encode(packet))
    return bytes((descriptors,)) + changed_json(numbers, content)


_TEXTS: Final = (
    *(b"vm0", b"tcp:127.0.0.1:4444", b"tcp:[::1]:0", b"tcp:localhost:0", b"unix:/run/vm0.sock"),
    *(b"/run/vm0.handoff", b"node7.example.org", b"CN=node*,O=Example\\, Inc,C=DE"),
)


def text_seeds() -> Iterator[bytes]:
    """Give texts that name something."""
    yield from _TEXTS


def hostile_text(numbers: Random) -> bytes:
    """Return a text, as `text_seeds`."""
    return changed_bytes(numbers, numbers.choice(_TEXTS))
