"""Staging: what comes before the switchover, written into files, never through a mapping."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.incoming.staging import BlockStage
from postcopyd.incoming.vmm import HandedBlock
from postcopyd.kernel import memory_file
from postcopyd.ram.block import BlockTable, RamBlock
from postcopyd.ram.page_map import PageMap
from tests.incoming.guest import HUGE, PAGE

PAGES = 16


class Bench:
    """A stage over private memory, or over a memory file that stands for the VMM's."""

    def __init__(self, *, shared: bool, page_size: int = PAGE, sealable: bool = True) -> None:
        self.block = RamBlock("pc.ram", PAGES * page_size, page_size, page_size, 0)
        self.page_map = PageMap(BlockTable([self.block]))
        self.maps = self.page_map[0]
        self.file: int | None = None
        if shared:
            huge = page_size if page_size != PAGE else None
            self.file = memory_file.create("guest", self.block.length, huge, sealable)
        handed = HandedBlock("pc.ram", page_size, self.block.length, page_size, self.file, 0)
        staging = None if shared else memory_file.create("staging", self.block.length)
        try:
            self.stage = BlockStage(self.block, handed, self.maps, staging)
        except OSError:
            self.page_map.close()
            if self.file is not None:
                os.close(self.file)
            raise

    def content(self, page: int) -> bytes:
        if self.file is not None:
            return os.pread(self.file, PAGE, page * PAGE)
        return ctypes.string_at(self.stage.address_of(page * PAGE, PAGE), PAGE)

    def allocated(self) -> int:
        if self.file is None:
            return 0
        return os.fstat(self.file).st_blocks * 512

    def close(self) -> None:
        self.stage.close()
        self.page_map.close()
        if self.file is not None:
            os.close(self.file)


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(**arguments: object) -> Bench:
        made.append(Bench(**arguments))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for bench in made:
        bench.close()


def page(fill: int) -> memoryview:
    return memoryview(bytes([fill]) * PAGE)


@given(
    st.booleans(),
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, PAGES - 1), st.integers(1, 255)),
            st.tuples(st.just("zero"), st.integers(0, PAGES - 1), st.integers(1, 3)),
            st.tuples(st.just("discard"), st.integers(0, PAGES - 1), st.integers(1, 3)),
        ),
        max_size=40,
    ),
)
def test_whatever_comes_in_whatever_order_the_last_word_counts(
    shared: bool, steps: list[tuple[str, int, int]]
) -> None:
    bench = Bench(shared=shared)
    model: dict[int, int] = {}
    try:
        for what, first, number in steps:
            if what == "write":
                bench.stage.write(first * PAGE, page(number))
                model[first] = number
                continue
            pages = range(first, min(first + number, PAGES))
            if what == "zero":
                bench.stage.write_zeros(first * PAGE, len(pages) * PAGE)
                model.update(dict.fromkeys(pages, 0))
            else:
                bench.stage.discard(first * PAGE, len(pages) * PAGE)
                for gone in pages:
                    model.pop(gone, None)
        for place in range(PAGES):
            fill = model.get(place)
            assert bench.maps.received[place] == (fill is not None)
            assert bench.maps.zero[place] == (fill == 0)
            assert bench.maps.staged[place] == (bool(fill) and not shared)
            assert bench.content(place) == bytes([fill or 0]) * PAGE
    finally:
        bench.close()


def test_pages_for_shared_memory_are_in_the_vmms_file_and_nowhere_else(
    make: Callable[..., Bench],
) -> None:
    bench = make(shared=True)
    bench.stage.write(3 * PAGE, page(7))
    assert bench.stage.direct
    assert bench.content(3) == bytes([7]) * PAGE
    assert not bench.maps.staged.any()


def test_a_discard_gives_the_memory_back(make: Callable[..., Bench]) -> None:
    bench = make(shared=True)
    for place in range(PAGES):
        bench.stage.write(place * PAGE, page(1))
    assert bench.allocated() == PAGES * PAGE
    bench.stage.discard(0, 10 * PAGE)
    assert bench.allocated() == 6 * PAGE
    bench.stage.empty()
    assert bench.allocated() == 0
    assert not bench.maps.received.any()


def test_zero_pages_take_no_memory(make: Callable[..., Bench]) -> None:
    bench = make(shared=True)
    bench.stage.write_zeros(0, PAGES * PAGE)
    assert bench.allocated() == 0
    assert bench.maps.zero.count() == PAGES


def test_a_memory_file_that_the_vmm_shrinks_is_written_without_harm(
    make: Callable[..., Bench],
) -> None:
    bench = make(shared=True)
    assert bench.file is not None
    os.ftruncate(bench.file, PAGE)
    bench.stage.write(5 * PAGE, page(9))
    assert bench.content(5) == bytes([9]) * PAGE


def test_a_file_that_takes_no_writes_is_an_error_and_not_a_signal(
    make: Callable[..., Bench],
) -> None:
    bench = make(shared=True)
    assert bench.file is not None
    fcntl.fcntl(bench.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(PermissionError):
        bench.stage.write(0, page(1))


def test_huge_memory_files_are_written_and_sealed_against_shrinking(
    make: Callable[..., Bench], huge_pages: Callable[[int], None]
) -> None:
    huge_pages(PAGES)
    bench = make(shared=True, page_size=HUGE)
    assert bench.file is not None
    bench.stage.write(HUGE + PAGE, page(4))
    bench.stage.write_zeros(HUGE, PAGE)
    assert bench.maps.received[1] and not bench.maps.zero[1]
    with pytest.raises(PermissionError):
        os.ftruncate(bench.file, HUGE)
    view = mmap.mmap(bench.file, 2 * HUGE)
    assert view[HUGE : HUGE + 2 * PAGE] == bytes(PAGE) + bytes([4]) * PAGE
    view.close()


def test_a_huge_memory_file_that_cannot_be_sealed_is_refused_with_what_to_do(
    huge_pages: Callable[[int], None],
) -> None:
    huge_pages(PAGES)
    with pytest.raises(OSError, match="create it with MFD_ALLOW_SEALING"):
        Bench(shared=True, page_size=HUGE, sealable=False)


def test_an_empty_huge_page_pool_is_an_error_and_not_a_signal() -> None:
    with pytest.raises(OSError, match="Cannot allocate memory"):
        Bench(shared=True, page_size=HUGE)
