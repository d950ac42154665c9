"""The list of RAM blocks in the first section "ram" (docs/qemu-wire.md, 3.1)."""

from __future__ import annotations

from collections.abc import Generator

from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import BlockEntry, BlockList
from postcopyd.wire.names import decode_name
from postcopyd.wire.receive_buffer import ReceiveBuffer
from postcopyd.wire.stream_format import SMALLEST_HOST_PAGE


def read_block_list(
    buffer: ReceiveBuffer, total: int, page_sizes: int | None, limit: int
) -> Generator[None, None, BlockList]:
    """Read the blocks whose lengths add up to `total`.

    :param page_sizes: the sizes that ADVISE named, or-ed together; None without ADVISE.
    :param limit: most blocks that are accepted.
    :raise ProtocolError: if a name, a length or their sum is wrong.
    """
    blocks: dict[str, BlockEntry] = {}
    rest = total
    while rest:
        position = buffer.position
        if len(blocks) == limit:
            raise ProtocolError(f"more than {limit} RAM blocks", position)
        name = decode_name((yield from buffer.take_counted()), "block", position)
        if name in blocks:
            raise ProtocolError(f"RAM block {name!r} is listed twice", position)
        length = yield from buffer.take_number(8)
        if not length:
            raise ProtocolError(f"RAM block {name!r} has no bytes", position)
        if length > rest:
            raise ProtocolError(
                f"RAM block {name!r} has {length:#x} bytes, only {rest:#x} of the total "
                f"{total:#x} are left for it",
                position,
            )
        page_size = SMALLEST_HOST_PAGE
        if page_sizes is not None:
            page_size = yield from _page_size(buffer, page_sizes)
            if not page_size & page_sizes:
                raise ProtocolError(
                    f"RAM block {name!r} has host pages of {page_size:#x} bytes, ADVISE names "
                    f"only {page_sizes:#x}",
                    position,
                )
        if length % page_size:
            raise ProtocolError(
                f"RAM block {name!r} has {length:#x} bytes, which is not whole pages of "
                f"{page_size:#x}",
                position,
            )
        blocks[name] = BlockEntry(name, length, page_size)
        rest -= length
    return BlockList(total, tuple(blocks.values()))


def _page_size(buffer: ReceiveBuffer, page_sizes: int) -> Generator[None, None, int]:
    """Read the host page size, which is only there for a block of large pages.

    Nothing flags it. But a name begins with a length byte that is not 0, and the word behind the
    list is no page size, so the 8 bytes are one exactly if they equal one that ADVISE named.
    """
    yield from buffer.need(8)
    word = int.from_bytes(buffer.view[buffer.start : buffer.start + 8], "big")
    if word > SMALLEST_HOST_PAGE and word & page_sizes == word and not word & (word - 1):
        buffer.start += 8
        return word
    return SMALLEST_HOST_PAGE
