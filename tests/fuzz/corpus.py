"""Inputs to begin fuzzing with: right streams, short ones first, so that mutations go deep."""

from __future__ import annotations

from collections.abc import Iterator

from postcopyd.wire import stream_writer as writer
from postcopyd.wire.return_path import ReturnPathWriter
from postcopyd.wire.stream_format import EOS
from tests.wire.streams import (
    BIG,
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
