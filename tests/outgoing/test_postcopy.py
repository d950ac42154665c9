"""What is sent behind the package, and in which order, without a connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from bitarray import bitarray

from postcopyd.outgoing.bandwidth import Bandwidth
from postcopyd.outgoing.image import BlockFile, MemoryImage
from postcopyd.outgoing.postcopy import PostcopyPages
from postcopyd.outgoing.records import Batch, Pause, RamRecords
from postcopyd.outgoing.report import Counts
from postcopyd.outgoing.schedule import SendSchedule
from postcopyd.wire.stream_writer import StreamWriter

PAGE = 4096
HUGE = 2 << 20
MakeBlock = Callable[..., BlockFile]


class Sender:
    """Post-copy pages of some blocks that are stale from end to end."""

    def __init__(self, image: MemoryImage, rate: int | None = None) -> None:
        self.now = 0.0
        self.crowded = False
        self.may_end = True
        self.counts = Counts()
        self.schedule = SendSchedule(
            [bitarray("1" * block.pages) for block in image.blocks],
            [block.page_size for block in image.blocks],
        )
        self.pages = PostcopyPages(
            image.blocks,
            self.schedule,
            RamRecords(StreamWriter(2), self.counts),
            Bandwidth(rate),
            lambda: self.now,
            self.counts,
            lambda: self.crowded,
            lambda: self.may_end,
        )
        self.batches: Iterator[Batch | Pause] = self.pages.batches()

    def next(self) -> bytes:
        batch = next(self.batches)
        assert isinstance(batch, list)
        return b"".join(batch)

    def pause(self) -> float:
        pause = next(self.batches)
        assert isinstance(pause, Pause)
        return pause.seconds


def numbered(pages: int) -> bytes:
    return b"".join(page.to_bytes(8, "big") * (PAGE // 8) for page in range(1, pages + 1))


def part(*records: bytes) -> bytes:
    """A whole section, written out by hand (qemu-wire, 1 and 3)."""
    return (
        bytes.fromhex("02 00000002")
        + b"".join(records)
        + bytes.fromhex("0000000000000010 7e 00000002")
    )


def record(page: int, content: bytes, *, named: bool = False) -> bytes:
    flags = (0x08 if content else 0x02) | (0 if named else 0x20)
    name = b"\x03ram" if named else b""
    return (page * PAGE + flags).to_bytes(8, "big") + name + (content or b"\0")


@pytest.fixture
def image(make_block: MakeBlock) -> Iterator[MemoryImage]:
    """One block of 1000 numbered pages."""
    with MemoryImage([make_block("ram", numbered(1000))]) as image:
        yield image


def test_a_request_goes_alone_with_the_next_batch(image: MemoryImage) -> None:
    sender = Sender(image)
    sender.next()
    sender.schedule.request(0, 700)
    content = numbered(1000)[700 * PAGE : 701 * PAGE]
    assert sender.next() == record(700, content)
    assert sender.next().startswith(record(701, numbered(1000)[701 * PAGE : 702 * PAGE]))
    assert sender.counts.requests_answered == 1


def test_batches_of_the_scan_grow_while_they_are_taken_whole_and_shrink_when_not(
    image: MemoryImage,
) -> None:
    sender = Sender(image)
    sizes = [len(sender.next()) >> 10 for _ in range(4)]
    sender.crowded = True
    sizes += [len(sender.next()) >> 10 for _ in range(2)]
    sender.crowded = False
    sizes += [len(sender.next()) >> 10 for _ in range(2)]
    assert sizes == [64, 128, 256, 256, 32, 32, 64, 128]


def test_a_pause_leaves_no_section_open_and_a_request_ends_it(image: MemoryImage) -> None:
    sender = Sender(image, rate=PAGE * 100)
    contents = numbered(1000)
    assert sender.next() == part(record(0, contents[:PAGE], named=True))
    assert sender.pause() == pytest.approx(0.01, rel=0.02)
    sender.schedule.request(0, 9)
    assert sender.next() == part(record(9, contents[9 * PAGE : 10 * PAGE]))
    # What was asked for did not wait, but it counts.
    assert sender.pause() == pytest.approx(0.02, rel=0.02)
    sender.now = 0.0205
    assert sender.next() == part(record(10, contents[10 * PAGE : 11 * PAGE]))


def test_the_end_is_a_section_of_its_own_and_the_end_of_the_stream(make_block: MakeBlock) -> None:
    with MemoryImage([make_block("ram", bytes(2 * PAGE))]) as image:
        sender = Sender(image)
        sent = [sender.next()]
        assert not sender.pages.ended
        sent += [sender.next()]
        assert sender.pages.ended
        assert next(sender.batches, None) is None
    end = bytes.fromhex("03 00000002 0000000000000010 7e 00000002 00")
    assert b"".join(sent) == part(record(0, b"", named=True), record(1, b"")) + end
    assert sender.counts.zero_pages == 2


def test_the_end_waits_for_leave_and_leaves_no_section_open(make_block: MakeBlock) -> None:
    with MemoryImage([make_block("ram", bytes(2 * PAGE))]) as image:
        sender = Sender(image)
        sender.may_end = False
        sent = sender.next() + sender.next()
        assert sender.pause() > 0
        assert not sender.pages.ended
        sender.may_end = True
        end = sender.next()
    assert sent == part(record(0, b"", named=True), record(1, b""))
    assert end == bytes.fromhex("03 00000002 0000000000000010 7e 00000002 00")
    assert sender.pages.ended


def test_no_request_comes_between_the_pages_of_a_huge_page(make_block: MakeBlock) -> None:
    with MemoryImage([make_block("ram", numbered(3 * 512), HUGE)]) as image:
        sender = Sender(image)
        sent = sender.next()
        assert len(sent) < HUGE
        sender.schedule.request(0, 2)
        while len(sent) < HUGE:
            sent += sender.next()
        contents = numbered(3 * 512)
        expected = [
            record(page, contents[page * PAGE : (page + 1) * PAGE], named=page == 0)
            for page in range(512)
        ]
        assert sent == part(*expected)[: -len(bytes(13))]
        assert sender.next().startswith(record(1024, contents[1024 * PAGE : 1025 * PAGE]))


def test_a_batch_of_zero_pages_is_bounded_too(make_block: MakeBlock) -> None:
    with MemoryImage([make_block("ram", bytes(5000 * PAGE))]) as image:
        sender = Sender(image)
        assert len(sender.next()) // 9 <= 1024 + 32
