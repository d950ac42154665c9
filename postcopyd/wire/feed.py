"""What an unmodified QEMU destination is fed (docs/qemu-wire.md, 6).

A valid stream of its own: the source's configuration, a small section "ram" for the blocks that
nobody watches, the device sections, the end. The pages of those blocks may come behind the device
sections, as with post-copy; but that is never mentioned: a QEMU that is told of it empties all
its memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from postcopyd.wire.messages import BlockEntry
from postcopyd.wire.stream_format import TARGET_PAGE_SIZE
from postcopyd.wire.stream_writer import (
    END_OF_STREAM,
    StreamWriter,
    open_return_path,
    vm_description,
)

FEED_END = END_OF_STREAM + vm_description(b"{}")
"""The end of a stream whose device sections are complete. With a description, however short, QEMU
does not wait for the connection to be closed."""

_SECTION_ID = 0x7FFF_FFFF
"""Of the "ram" section. Sources count from 0; QEMU wants it to differ from the device sections'."""

_ZERO_PAGE = bytes(TARGET_PAGE_SIZE)
_PAGES = 64
"""Pages in one piece of the feed at most."""


class FeedWriter:
    """Makes one feed: `head`, the device sections as they came, `pages`, `FEED_END`.

    QEMU takes the pages before the device sections as well.
    """

    def __init__(self, configuration: bytes, blocks: Sequence[tuple[str, int]]) -> None:
        """Begin.

        :param configuration: stream header and configuration as the source sent them.
        :param blocks: name and length in bytes of each block that is set here, of ordinary pages.
        """
        self._configuration = configuration
        self._blocks = blocks
        self._writer = StreamWriter(_SECTION_ID)

    def head(self) -> bytes:
        """Return what comes first: the configuration, and how long the blocks are."""
        # Without a return path QEMU would not say how the load has ended.
        head = self._configuration + open_return_path()
        if self._blocks:
            entries = [BlockEntry(name, length, TARGET_PAGE_SIZE) for name, length in self._blocks]
            head += self._writer.ram_start(entries)
        return head

    def pages(self, contents: Sequence[tuple[str, memoryview]]) -> Iterator[bytes]:
        """Iterate over the pieces that set the blocks.

        :param contents: name and whole content of each block.
        """
        if not contents:
            return
        writer = self._writer
        yield writer.ram_end()
        for name, content in contents:
            for begin in range(0, len(content), _PAGES * TARGET_PAGE_SIZE):
                end = min(begin + _PAGES * TARGET_PAGE_SIZE, len(content))
                offsets = range(begin, end, TARGET_PAGE_SIZE)
                yield b"".join(_records(writer, name, content, offsets))
        yield writer.ram_footer()


def _records(
    writer: StreamWriter, name: str, content: memoryview, offsets: Iterable[int]
) -> Iterator[bytes]:
    for offset in offsets:
        page = bytes(content[offset : offset + TARGET_PAGE_SIZE])
        # A page of zeros is told, too: the VMM may have its own firmware there.
        if page == _ZERO_PAGE:
            yield writer.zero_page(name, offset)
        else:
            yield writer.page(name, offset)
            yield page
