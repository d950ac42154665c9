"""Placing into real memory, and each odd answer of the kernel provoked for real."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from postcopyd.incoming.placing import Placer, VmmGone
from postcopyd.incoming.report import Counters, Histogram
from postcopyd.kernel.huge_pages import free_huge_pages
from postcopyd.kernel.userfaultfd import (
    EVENT_REMOVE,
    Feature,
    Operation,
    RegisterMode,
    Userfaultfd,
)
from postcopyd.ram.block import BlockTable, RamBlock
from postcopyd.ram.page_map import PageMap
from tests.incoming.guest import HUGE, LIMIT, PAGE, Guest


@dataclass
class Bench:
    """A guest and a placer for it."""

    guest: Guest
    block: RamBlock = field(init=False)
    waiting: dict[int, int] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    latency: Histogram = field(default_factory=Histogram)

    def __post_init__(self) -> None:
        guest = self.guest
        self.block = RamBlock("pc.ram", guest.length, guest.page_size, guest.address, 0)
        blocks = BlockTable([self.block])
        self.page_map = PageMap(blocks)
        self.placer = Placer(
            guest.userfaultfd,
            blocks,
            self.page_map,
            self.waiting,
            self.counters,
            self.latency,
            None,
            {0} if guest.shared else (),
        )
        self._source = mmap.mmap(-1, guest.length)
        for page in range(guest.pages):
            start = page * guest.page_size
            self._source[start : start + guest.page_size] = content(page) * (
                guest.page_size // len(content(page))
            )
        self.source = ctypes.addressof(ctypes.c_char.from_buffer(self._source))

    def received(self) -> list[int]:
        bits = self.page_map[0].received
        return [page for page in range(self.guest.pages) if bits[page]]

    def place(self, pages: range | list[int], stride: int = PAGE) -> bool:
        """Place pages from where their content lies in the source, or a part of it."""
        if isinstance(pages, range):
            offsets: range | list[int] = range(pages.start * PAGE, pages.stop * PAGE, PAGE)
        else:
            offsets = [page * PAGE for page in pages]
        return self.placer.place_pages(self.block, offsets, self.source + pages[0] * PAGE, stride)

    def close(self) -> None:
        self.placer.close()
        self.page_map.close()
        self.guest.close()


def content(page: int) -> bytes:
    return (page + 1).to_bytes(8, "little")


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(**arguments: object) -> Bench:
        made.append(Bench(Guest(**arguments)))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for bench in made:
        bench.close()


def test_a_run_is_placed_marked_and_counted(make: Callable[..., Bench]) -> None:
    bench = make()
    assert bench.place(range(3, 40))
    assert bench.received() == list(range(3, 40))
    assert bench.counters.pages_by_background == 37
    for page in (3, 20, 39):
        assert bench.guest.touch(page).result()[:8] == content(page)


def test_scattered_pages_go_where_they_belong(make: Callable[..., Bench]) -> None:
    bench = make()
    assert bench.place([10, 3, 60])
    assert bench.received() == [3, 10, 60]
    # Page i of the batch lies i pages behind the first.
    assert bench.guest.touch(10).result()[:8] == content(10)
    assert bench.guest.touch(3).result()[:8] == content(11)
    assert bench.guest.touch(60).result()[:8] == content(12)


def test_a_source_that_is_not_aligned_is_placed_all_the_same(make: Callable[..., Bench]) -> None:
    bench = make()
    offsets = range(0, 2 * PAGE, PAGE)
    assert bench.placer.place_pages(bench.block, offsets, bench.source + 8, PAGE + 8)
    assert bench.guest.touch(0).result()[:8] == content(0)
    assert bench.received() == [0, 1]


def test_a_page_that_a_fault_waits_for_ends_the_wait_and_is_timed(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    touch = bench.guest.touch(5)
    bench.guest.wait_for_event()
    bench.waiting[bench.block.address + 5 * PAGE] = 1
    assert bench.place(range(8))
    assert touch.result()[:8] == content(5)
    assert not bench.waiting
    assert (bench.counters.pages_by_fault, bench.counters.pages_by_background) == (1, 7)
    assert bench.latency.count == 1


def test_only_the_pages_of_the_batch_end_their_waits(make: Callable[..., Bench]) -> None:
    bench = make()
    addresses = [bench.block.address + page * PAGE for page in (1, 2, 30, 31, 50)]
    bench.waiting.update(dict.fromkeys(addresses, 1))
    assert bench.place([30, 2])
    assert sorted(bench.waiting) == [addresses[0], addresses[3], addresses[4]]
    assert bench.place(range(31, 32))
    assert sorted(bench.waiting) == [addresses[0], addresses[4]]


def test_eexist_a_page_that_is_there_is_counted_woken_and_not_overwritten(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    bench.guest.userfaultfd.copy(bench.block.address + 4 * PAGE, bench.source, PAGE)
    assert bench.place([4])
    assert bench.guest.touch(4).result()[:8] == content(0)
    assert bench.counters.pages_duplicate == 1
    assert bench.received() == [4]


@pytest.mark.parametrize("pages", [range(8), [0, 1, 2, 3, 4, 5, 6, 7]], ids=["run", "list"])
def test_a_partial_copy_is_resumed_behind_the_page_that_was_there(
    make: Callable[..., Bench], pages: range | list[int]
) -> None:
    bench = make()
    bench.guest.userfaultfd.copy(bench.block.address + 3 * PAGE, bench.source, PAGE)
    assert bench.place(pages)
    assert bench.received() == list(range(8))
    assert bench.counters.pages_duplicate == 1
    assert bench.counters.pages_by_background == 7
    assert bench.guest.touch(3).result()[:8] == content(0)
    for page in (0, 2, 4, 7):
        assert bench.guest.touch(page).result()[:8] == content(page)


@pytest.mark.parametrize("pages", [range(4), [0, 1, 2, 3]], ids=["run", "list"])
def test_eagain_while_a_removal_is_unread_puts_off_and_the_retry_places(
    make: Callable[..., Bench], pages: range | list[int]
) -> None:
    bench = make()
    assert bench.place(range(40, 42))
    remover = bench.guest.remove(40)
    bench.guest.wait_for_event()
    assert not bench.place(pages)
    assert bench.received() == [40, 41]
    assert bench.counters.retries == 1
    events = list(bench.guest.userfaultfd.read_events())
    assert [event[0] for event in events] == [EVENT_REMOVE]
    remover.join(LIMIT)
    assert bench.placer.retry()
    assert bench.received() == [0, 1, 2, 3, 40, 41]
    assert bench.guest.touch(2).result()[:8] == content(2)
    assert bench.counters.pages_by_background == 2 + 4


def test_a_removed_page_is_never_filled_from_the_source(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.placer.any_removed = True
    bench.page_map[0].zero[2] = 1
    bench.page_map[0].received[2] = 1
    assert bench.place(range(5))
    assert bench.counters.pages_removed == 1
    assert bench.counters.pages_by_background == 4
    assert bench.placer.try_zero(bench.block, 2)
    assert bench.guest.touch(2).result() == bytes(PAGE)


def test_enoent_a_range_that_is_not_mapped_any_more_is_dropped(make: Callable[..., Bench]) -> None:
    bench = make()
    unmapper = bench.guest.unmap(8, 4)
    bench.guest.wait_for_event()
    list(bench.guest.userfaultfd.read_events())
    unmapper.join(LIMIT)
    assert bench.place(range(6, 14))
    assert bench.counters.pages_removed == 4
    assert bench.counters.pages_by_background == 4
    assert bench.received() == list(range(6, 14))


def test_esrch_a_process_that_has_exited_is_told_apart() -> None:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        memory = Guest(pages=4)
        socket.send_fds(
            theirs, [memory.address.to_bytes(8, "little")], [memory.userfaultfd.fileno()]
        )
        signal.pause()
        os._exit(0)
    theirs.close()
    ours.settimeout(LIMIT)
    data, descriptors, _, _ = socket.recv_fds(ours, 8, 1)
    ours.close()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    userfaultfd = Userfaultfd(descriptors[0])
    block = RamBlock("pc.ram", 4 * PAGE, PAGE, int.from_bytes(data, "little"), 0)
    blocks = BlockTable([block])
    page_map = PageMap(blocks)
    placer = Placer(userfaultfd, blocks, page_map, {}, Counters(), Histogram(), None, ())
    source = mmap.mmap(-1, 4 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(source))
    with pytest.raises(VmmGone, match="the VMM has exited"):
        placer.place_pages(block, range(0, PAGE, PAGE), address, PAGE)
    with pytest.raises(VmmGone):
        placer.try_zero(block, 1)
    placer.close()
    page_map.close()
    userfaultfd.close()


@pytest.mark.parametrize("shared", [False, True], ids=["private", "memory file"])
def test_enospc_no_huge_page_to_be_had_puts_off_and_the_retry_places(
    make: Callable[..., Bench], huge_pages: Callable[[int], None], shared: bool
) -> None:
    huge_pages(2)
    bench = make(pages=2, page_size=HUGE, reserve=False, shared=shared)
    hungry = Guest(pages=free_huge_pages(HUGE), page_size=HUGE)  # the whole pool is promised to it
    assert not bench.placer.place_host_page(bench.block, HUGE, bench.source)
    assert bench.received() == []
    hungry.close()
    assert bench.placer.retry()
    assert bench.received() == [1]
    assert bench.guest.touch(1).result()[:8] == content(0)


def test_eexist_a_huge_page_in_a_memory_file_is_believed_to_be_there_in_a_pool_that_is_used_up(
    make: Callable[..., Bench], huge_pages: Callable[[int], None]
) -> None:
    """A predecessor was killed when it had placed it and not marked it."""
    huge_pages(2)
    bench = make(pages=2, page_size=HUGE, reserve=False, shared=True)
    bench.guest.userfaultfd.copy(bench.block.address + HUGE, bench.source, HUGE)
    with Guest(pages=free_huge_pages(HUGE), page_size=HUGE):
        assert bench.placer.place_host_page(bench.block, HUGE, bench.source + HUGE)
    assert bench.received() == [1]
    assert bench.counters.pages_duplicate == 1
    assert bench.guest.touch(1).result()[:8] == content(0)


def test_zero_pages_are_placed_in_runs(make: Callable[..., Bench]) -> None:
    bench = make()
    assert bench.placer.place_zeros(bench.block, range(0, 10 * PAGE, PAGE))
    assert bench.placer.place_zeros(bench.block, [20 * PAGE, 21 * PAGE, 30 * PAGE])
    assert bench.received() == [*range(10), 20, 21, 30]
    assert bench.counters.pages_zero == 13
    assert bench.guest.touch(30).result() == bytes(PAGE)


@pytest.mark.parametrize("shared", [False, True], ids=["private", "memory file"])
def test_a_huge_page_is_placed_whole_and_zeros_by_a_zero_page(
    make: Callable[..., Bench], huge_pages: Callable[[int], None], shared: bool
) -> None:
    huge_pages(4)
    bench = make(pages=2, page_size=HUGE, shared=shared)
    assert bench.placer.place_host_page(bench.block, HUGE, bench.source + HUGE)
    assert bench.placer.place_host_page(bench.block, 0, 0)
    assert bench.received() == [0, 1]
    assert bench.guest.touch(1, HUGE).result() == content(1) * (HUGE // 8)
    assert bench.guest.touch(0, HUGE).result() == bytes(HUGE)
    assert bench.counters.pages_zero == 1


def test_shared_memory_is_filled_as_private_memory_is(make: Callable[..., Bench]) -> None:
    bench = make(shared=True)
    assert bench.place(range(20))
    assert bench.placer.place_zeros(bench.block, [20 * PAGE])
    assert bench.guest.touch(19).result()[:8] == content(19)
    assert bench.guest.touch(20).result() == bytes(PAGE)


def test_a_range_registered_without_missing_mode_is_a_mistake_of_ours_and_raises() -> None:
    with Guest(pages=2, register=False) as guest:
        guest.userfaultfd.register(
            guest.address, guest.length, RegisterMode.MISSING, Operation.COPY
        )
        with pytest.raises(OSError, match="Invalid argument"):
            guest.userfaultfd.copy(guest.address + 1, guest.address, PAGE)
        assert Feature.EVENT_REMOVE in guest.features
