"""Host pages larger than the pages on the wire."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.ram.host_page import HostPageAssembly, HostPageInterrupted

PAGE = 4096
SIZE = 16 * PAGE


@pytest.fixture
def assembly() -> Iterator[HostPageAssembly]:
    made = HostPageAssembly(SIZE)
    yield made
    made.close()


def content(assembly: HostPageAssembly) -> bytes:
    return ctypes.string_at(assembly.address, SIZE)


@given(st.lists(st.sampled_from([None, 1, 2, 255]), min_size=16, max_size=16), st.data())
def test_any_mix_of_zero_and_other_pages_is_assembled_in_any_runs(
    fills: list[int | None], data: st.DataObject
) -> None:
    assembly = HostPageAssembly(SIZE)
    try:
        # What a former page left in the buffer must not shine through.
        assembly.add("b", 0, SIZE, memoryview(b"\xee" * SIZE))
        place = 0
        outcome: bool | None = None
        while place < 16:
            assert outcome is None
            run = 1
            while (
                place + run < 16
                and (fills[place + run] is None) == (fills[place] is None)
                and data.draw(st.booleans())
            ):
                run += 1
            fill = fills[place]
            payload = None
            if fill is not None:
                payload = memoryview(
                    b"".join(bytes([fills[place + i] or 0]) * PAGE for i in range(run))
                )
            outcome = assembly.add("b", 3 * SIZE + place * PAGE, run * PAGE, payload)
            place += run
        assert outcome is all(fill is None for fill in fills)
        if not outcome:
            assert content(assembly) == b"".join(bytes([fill or 0]) * PAGE for fill in fills)
        assert not assembly.unfinished
    finally:
        assembly.close()


def test_a_host_page_that_begins_in_its_middle_is_refused(assembly: HostPageAssembly) -> None:
    with pytest.raises(
        HostPageInterrupted, match="host page 0x10000 of block 'b' begins at 0x11000"
    ):
        assembly.add("b", SIZE + PAGE, PAGE, None)


@pytest.mark.parametrize(
    ("block", "offset"), [("b", SIZE), ("b", 2 * PAGE), ("b", 0), ("other", PAGE)]
)
def test_a_record_that_does_not_continue_the_page_is_refused(
    assembly: HostPageAssembly, block: str, offset: int
) -> None:
    assembly.add("b", 0, PAGE, None)
    with pytest.raises(HostPageInterrupted, match="has 4096 of 65536 bytes and is interrupted"):
        assembly.add(block, offset, PAGE, None)


def test_a_dropped_page_is_begun_anew(assembly: HostPageAssembly) -> None:
    assembly.add("b", 0, PAGE, memoryview(b"\1" * PAGE))
    assembly.drop()
    assert assembly.add("b", SIZE, SIZE, memoryview(b"\2" * SIZE)) is False
    assert content(assembly) == b"\2" * SIZE
