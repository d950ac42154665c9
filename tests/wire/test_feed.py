"""The feed: a stream that our own reader understands, and that says nothing of post-copy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.wire import stream_writer as writer
from postcopyd.wire.feed import FEED_END, FeedWriter
from postcopyd.wire.messages import (
    BlockEntry,
    BlockList,
    Configuration,
    DeviceState,
    OpenReturnPath,
)
from tests.wire.streams import DEVICES, PAGE, page_content, read

CONFIGURATION = writer.configuration("pc-q35-7.2", uuid=bytes(16))
EMPTY = bytes(PAGE)


def feed(blocks: dict[str, bytes]) -> bytes:
    feed = FeedWriter(CONFIGURATION, [(name, len(data)) for name, data in blocks.items()])
    pages = feed.pages([(name, memoryview(data)) for name, data in blocks.items()])
    return feed.head() + b"".join(pages) + DEVICES + FEED_END


def test_without_blocks_there_is_no_ram_section() -> None:
    assert feed({}) == CONFIGURATION + writer.open_return_path() + DEVICES + FEED_END


def test_the_end_has_the_shortest_description_of_the_devices() -> None:
    assert bytes.fromhex("00 06 00000002 7b7d") == FEED_END


@given(
    st.dictionaries(
        st.sampled_from(("pc.bios", "/rom@etc/acpi/tables", "vga.vram")),
        st.lists(st.integers(0, 3), min_size=1, max_size=99),
        min_size=1,
    )
)
def test_every_page_of_every_block_is_in_it_zeros_too(numbers: dict[str, list[int]]) -> None:
    blocks = {
        name: [page_content(number) if number else EMPTY for number in pages]
        for name, pages in numbers.items()
    }
    whole = {name: b"".join(pages) for name, pages in blocks.items()}
    events = list(read(feed(whole)))
    assert isinstance(events[0], Configuration)
    assert events[0].raw == CONFIGURATION
    assert events[1] == OpenReturnPath()
    assert isinstance(events[2], BlockList)
    assert events[2].blocks == tuple(
        BlockEntry(name, len(data), PAGE) for name, data in whole.items()
    )
    pages = [event for event in events if isinstance(event, tuple)]
    assert pages == [
        ("zero", name, number * PAGE, b"") if page == EMPTY else ("page", name, number * PAGE, page)
        for name, data in blocks.items()
        for number, page in enumerate(data)
    ]
    assert any(isinstance(event, DeviceState) for event in events)


@pytest.mark.parametrize("pages", [1, 64, 65, 200])
def test_no_piece_is_longer_than_some_pages(pages: int) -> None:
    content = memoryview(page_content(7) * pages)
    pieces = list(FeedWriter(CONFIGURATION, [("rom", len(content))]).pages([("rom", content)]))
    assert max(map(len, pieces)) < 65 * PAGE
    assert sum(map(len, pieces)) > len(content)
