"""Faults of real threads: each is requested, answered from here, or woken, and asked for once."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator

import pytest

from postcopyd.incoming.faults import FaultHandler, UnexpectedEvent
from postcopyd.incoming.placing import Placer
from postcopyd.incoming.report import Counters, Histogram
from postcopyd.incoming.staging import BlockStage
from postcopyd.kernel import memory_file
from postcopyd.kernel.userfaultfd import Feature
from postcopyd.ram.block import BlockTable, RamBlock
from postcopyd.ram.page_map import PageMap
from tests.incoming.guest import HUGE, LIMIT, PAGE, Guest


class Bench:
    """A guest and a fault handler for it; requests and removals are kept in lists."""

    def __init__(self, guest: Guest, blocks: BlockTable | None = None):
        self.guest = guest
        self.requests: list[tuple[str, int]] = []
        self.removals: list[tuple[int, int]] = []
        self.waiting: dict[int, int] = {}
        self.counters = Counters()
        self.latency = Histogram()
        self.blocks = blocks or BlockTable(
            [RamBlock("pc.ram", guest.length, guest.page_size, guest.address, 0)]
        )
        self.block = self.blocks[0]
        self.page_map = PageMap(self.blocks)
        self.maps = self.page_map[0]
        self.stages = [
            BlockStage(
                block,
                handed,
                self.page_map[block.index],
                memory_file.create("staging", block.length),
            )
            for block, handed in zip(self.blocks, guest.memory.blocks * 2, strict=False)
        ]
        self.placer = Placer(
            guest.userfaultfd,
            self.blocks,
            self.page_map,
            self.waiting,
            self.counters,
            self.latency,
            None,
            (),
        )
        self.handler = FaultHandler(
            guest.userfaultfd,
            self.blocks,
            self.page_map,
            self.stages,
            self.placer,
            self.waiting,
            self.counters,
            blocktime=None,
            request=lambda runs: self.requests.extend((b.name, p) for b, run in runs for p in run),
            removed=lambda block, offset, length: self.removals.append((offset, length)),
        )
        self.handler.keep_staged = False

    def read(self) -> None:
        self.guest.wait_for_event()
        self.handler.read()

    def place(self, page: int, fill: bytes = b"\x5a") -> None:
        source = mmap.mmap(-1, self.guest.page_size)
        source[:] = fill * self.guest.page_size
        address = ctypes.addressof(ctypes.c_char.from_buffer(source))
        offset = page * self.guest.page_size
        assert self.placer.place_host_page(self.block, offset, address)

    def close(self) -> None:
        self.placer.close()
        for stage in self.stages:
            stage.close()
        self.page_map.close()
        self.guest.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(guest: Guest | None = None, **arguments: object) -> Bench:
        made.append(Bench(guest or Guest(), **arguments))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for bench in made:
        bench.close()


def test_a_fault_asks_for_its_page_and_goes_on_when_it_is_placed(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    touch = bench.guest.touch(7)
    bench.read()
    assert bench.requests == [("pc.ram", 7)]
    assert bench.maps.requested[7]
    assert list(bench.waiting) == [bench.block.address + 7 * PAGE]
    assert touch.waits
    bench.place(7)
    assert touch.result() == b"\x5a" * PAGE
    assert not bench.waiting
    assert bench.counters.pages_by_fault == 1


def test_a_hundred_threads_on_one_page_are_one_request(make: Callable[..., Bench]) -> None:
    bench = make()
    touches = [bench.guest.touch(3) for _ in range(100)]
    while bench.counters.faults < 100:
        bench.read()
    assert bench.requests == [("pc.ram", 3)]
    bench.place(3)
    assert {touch.result() for touch in touches} == {b"\x5a" * PAGE}


def test_a_hundred_threads_on_a_hundred_pages_are_read_in_bulk(
    make: Callable[..., Bench],
) -> None:
    bench = make(Guest(pages=128))
    touches = [bench.guest.touch(page) for page in range(100)]
    while bench.counters.faults < 100:
        bench.read()
    asked = sorted(page for _, page in bench.requests)
    assert asked == list(range(asked[-1] + 1))
    assert asked[-1] >= 99
    assert bench.counters.requests + bench.counters.pages_around == len(asked)
    for page in range(100):
        bench.place(page)
    assert {touch.result() for touch in touches} == {b"\x5a" * PAGE}


def test_a_fault_within_a_huge_page_asks_for_the_whole_page(
    make: Callable[..., Bench], huge_pages: Callable[[int], None]
) -> None:
    huge_pages(2)
    bench = make(Guest(pages=2, page_size=HUGE))
    touch = bench.guest.touch(1)
    bench.read()
    assert bench.requests == [("pc.ram", 1)]
    bench.place(1)
    assert touch.result() == b"\x5a" * PAGE


def test_a_fault_on_a_page_just_placed_is_woken_and_not_asked_for(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    touch = bench.guest.touch(9)
    bench.guest.wait_for_event()
    # Placed without waking, before the fault is read: the message is old when we see it.
    source = mmap.mmap(-1, PAGE)
    source[:] = b"\x77" * PAGE
    address = ctypes.addressof(ctypes.c_char.from_buffer(source))
    bench.guest.userfaultfd.copy(bench.block.address + 9 * PAGE, address, PAGE, 1)
    bench.maps.received[9] = 1
    bench.handler.read()
    assert touch.result() == b"\x77" * PAGE
    assert bench.requests == []
    assert not bench.waiting


def test_a_spurious_readiness_is_harmless(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.handler.read()
    assert bench.counters.faults == 0


def test_a_fault_on_a_staged_page_is_answered_from_here(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.stages[0].write(5 * PAGE, memoryview(b"\x11" * PAGE))
    touch = bench.guest.touch(5)
    bench.read()
    assert touch.result() == b"\x11" * PAGE
    assert bench.requests == []
    assert not bench.maps.staged[5]
    assert bench.latency.count == 1


def test_a_fault_on_a_page_that_came_as_zeros_is_answered_from_here(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    bench.stages[0].write_zeros(5 * PAGE, PAGE)
    touch = bench.guest.touch(5)
    bench.read()
    assert touch.result() == bytes(PAGE)
    assert bench.requests == []


def test_a_removed_page_reads_as_zeros_and_is_never_asked_for(make: Callable[..., Bench]) -> None:
    bench = make()
    remover = bench.guest.remove(8, 4)
    bench.read()
    remover.join(LIMIT)
    assert bench.removals == [(8 * PAGE, 4 * PAGE)]
    touch = bench.guest.touch(9)
    bench.read()
    assert touch.result() == bytes(PAGE)
    assert bench.requests == []
    bench.place(10)
    assert bench.counters.pages_removed == 1


def test_a_placed_page_that_is_removed_reads_as_zeros(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.place(2)
    assert bench.guest.touch(2).result() == b"\x5a" * PAGE
    remover = bench.guest.remove(2)
    bench.read()
    remover.join(LIMIT)
    touch = bench.guest.touch(2)
    bench.read()
    assert touch.result() == bytes(PAGE)


def test_a_removal_frees_the_threads_that_wait_for_its_pages(make: Callable[..., Bench]) -> None:
    bench = make()
    touch = bench.guest.touch(4)
    bench.read()
    assert bench.requests == [("pc.ram", 4)]
    remover = bench.guest.remove(4)
    bench.read()
    remover.join(LIMIT)
    assert bench.handler.deferred
    assert bench.handler.retry_deferred()
    assert touch.result() == bytes(PAGE)
    assert not bench.waiting


def test_a_fault_and_a_removal_in_one_read_are_judged_removal_first(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    remover = bench.guest.remove(4)
    bench.guest.wait_for_event()
    touch = bench.guest.touch(4)
    while bench.counters.faults == 0:
        bench.read()
    remover.join(LIMIT)
    while not bench.handler.retry_deferred():
        bench.handler.read()
    assert touch.result() == bytes(PAGE)
    assert bench.requests == []


def test_a_page_dropped_unseen_is_given_zeros_where_removals_are_not_reported(
    make: Callable[..., Bench],
) -> None:
    bench = make(Guest(features=Feature.THREAD_ID))
    bench.place(6)
    bench.guest.remove(6).join(LIMIT)
    touch = bench.guest.touch(6)
    bench.read()
    assert touch.result() == bytes(PAGE)
    assert bench.requests == []


def test_a_placed_page_whose_file_was_given_a_hole_is_given_zeros(
    make: Callable[..., Bench],
) -> None:
    """No event tells of it, and to wake who waits would only make him wait again."""
    bench = make(Guest(shared=True))
    assert bench.guest.memory_file is not None
    bench.place(6)
    bench.place(7)
    memory_file.punch_hole(bench.guest.memory_file, 6 * PAGE, PAGE)
    touch = bench.guest.touch(6)
    bench.read()
    assert touch.result() == bytes(PAGE)
    assert bench.guest.touch(7).result() == b"\x5a" * PAGE
    assert bench.requests == []


def test_a_removal_that_touches_parts_of_pages_and_other_memory_marks_whole_pages_of_ours_only(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    start = bench.block.address
    bench.handler.apply_removals([(start - 8 * PAGE, start + 2 * PAGE + 9)])
    assert bench.removals == [(0, 2 * PAGE)]
    assert bench.maps.zero.count() == 2


def test_removals_of_one_read_are_done_once_a_page_however_often_they_say_it(
    make: Callable[..., Bench],
) -> None:
    """Each costs what its length is: 64 times all memory would keep everybody else waiting."""
    bench = make(Guest(pages=64))
    start, page = bench.block.address, PAGE
    whole = (start, start + 64 * page)
    bench.handler.apply_removals([whole] * 32 + [(start, start + page)] * 16 + [whole] * 16)
    assert bench.removals == [(0, 64 * page)]
    bench.removals.clear()
    apart = [(start + first * page, start + (first + 1) * page) for first in (9, 3, 4, 30)]
    bench.handler.apply_removals([*apart, (start + 2 * page + 1, start + 4 * page - 1)])
    assert bench.removals == [(3 * page, 2 * page), (9 * page, page), (30 * page, page)]


def test_a_fault_outside_every_block_is_named(make: Callable[..., Bench]) -> None:
    guest = Guest(pages=8)
    blocks = BlockTable([RamBlock("pc.ram", 4 * PAGE, PAGE, guest.address, 0)])
    bench = make(guest, blocks=blocks)
    touch = guest.touch(6)
    with pytest.raises(UnexpectedEvent, match=f"fault at {guest.address + 6 * PAGE:#x}"):
        bench.read()
    guest.userfaultfd.unregister(guest.address, guest.length)
    assert touch.result() == bytes(PAGE)
