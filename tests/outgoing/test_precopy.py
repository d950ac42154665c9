"""Pre-copy passes, and what they remember."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from bitarray import bitarray

from postcopyd.outgoing.bandwidth import Bandwidth
from postcopyd.outgoing.image import BlockFile, MemoryImage
from postcopyd.outgoing.precopy import SentPages, send_pass
from postcopyd.outgoing.records import Pause, RamRecords
from postcopyd.outgoing.report import Counts
from postcopyd.wire.stream_writer import StreamWriter

PAGE = 4096
HUGE = 2 << 20
MakeBlock = Callable[..., BlockFile]


def overwrite(block: BlockFile, offset: int, content: bytes) -> None:
    with block.path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def records() -> RamRecords:
    return RamRecords(StreamWriter(2), Counts())


def run_pass(sent: SentPages) -> bytes:
    batches = list(send_pass([sent], records(), Bandwidth(None), lambda: 0.0, lambda _: None))
    return b"".join(buffer for batch in batches if isinstance(batch, list) for buffer in batch)


def stale(sent: SentPages) -> bitarray:
    *_, (looked_at, found) = sent.find_stale()
    assert looked_at == sent.block.length
    assert found is not None
    return found


@pytest.fixture
def block(make_block: MakeBlock) -> BlockFile:
    """100 pages of ones."""
    return make_block("ram", b"\1" * (100 * PAGE))


def test_a_block_never_sent_is_stale_from_end_to_end(block: BlockFile) -> None:
    with MemoryImage([block]) as image:
        assert stale(SentPages(image.blocks[0])).all()


def test_behind_a_pass_only_what_changed_is_stale(block: BlockFile) -> None:
    with MemoryImage([block]) as image:
        sent = SentPages(image.blocks[0])
        run_pass(sent)
        assert not stale(sent).any()
        overwrite(block, 33 * PAGE + 4095, b"x")
        overwrite(block, 99 * PAGE, bytes(PAGE))
        assert list(stale(sent).search(bitarray("1"))) == [33, 99]


@pytest.mark.parametrize("change", [b"\2", bytes(PAGE)])
def test_a_page_that_changes_back_is_clean_only_if_that_was_sent(
    block: BlockFile, change: bytes
) -> None:
    with MemoryImage([block]) as image:
        sent = SentPages(image.blocks[0])
        run_pass(sent)
        overwrite(block, 0, change)
        run_pass(sent)
        overwrite(block, 0, b"\1" * PAGE)
        assert stale(sent)[0]


def test_what_is_sent_is_what_was_digested_though_the_guest_writes_meanwhile(
    block: BlockFile,
) -> None:
    with MemoryImage([block]) as image:
        sent = SentPages(image.blocks[0])
        batches = send_pass([sent], records(), Bandwidth(None), lambda: 0.0, lambda _: None)
        first = next(batches)
        assert isinstance(first, list)
        overwrite(block, 0, b"\2" * PAGE)
        data = b"".join(first)
        list(batches)
        overwrite(block, 0, b"\1" * PAGE)
        # Sent as digested: had the twos gone out, the page would look clean and be stale for ever.
        assert b"\2" * PAGE not in data
        assert not stale(sent).any()


def test_one_changed_page_makes_its_huge_page_stale(make_block: MakeBlock) -> None:
    block = make_block("ram", b"\1" * (4 * HUGE), HUGE)
    with MemoryImage([block]) as image:
        sent = SentPages(image.blocks[0])
        run_pass(sent)
        overwrite(block, 2 * HUGE - 1, b"x")
        assert stale(sent) == bitarray("0100")


def test_a_hole_that_is_written_to_is_stale(make_block: MakeBlock) -> None:
    block = make_block("ram", b"")
    with block.path.open("wb") as file:
        file.truncate(50 * PAGE)
    with MemoryImage([block]) as image:
        sent = SentPages(image.blocks[0])
        assert len(run_pass(sent)) < 50 * 20
        overwrite(block, 7 * PAGE, b"x")
        assert list(stale(sent).search(bitarray("1"))) == [7]


def test_a_pass_keeps_to_the_bandwidth(block: BlockFile) -> None:
    now = 0.0
    sent_bytes = 0
    with MemoryImage([block]) as image:
        rate = 100_000
        batches: Iterator[object] = send_pass(
            [SentPages(image.blocks[0])], records(), Bandwidth(rate), lambda: now, lambda _: None
        )
        for batch in batches:
            if isinstance(batch, Pause):
                now += batch.seconds
            elif isinstance(batch, list):
                assert sent_bytes <= (now + 0.02) * rate + 1
                sent_bytes += sum(map(len, batch))
    assert now > 3
