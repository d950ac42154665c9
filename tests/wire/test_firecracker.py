"""Firecracker's message: three generations, any split, its rules, and nothing else."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.firecracker import Region, RegionsReader
from postcopyd.wire.handoff import BLOCK_LIMIT, FIRST_MESSAGE_LIMIT

HUGE = 2 << 20
# Page size fields of each generation for memory of 4096 byte pages, then for 2 MiB ones.
GENERATIONS: dict[str, list[dict[str, int]]] = {
    "1.1 to 1.6": [{}],
    "1.7 to 1.11": [{"page_size_kib": 4096}, {"page_size_kib": HUGE}],
    "1.12 and later": [
        {"page_size": 4096, "page_size_kib": 4096},
        {"page_size": HUGE, "page_size_kib": HUGE},
    ],
    "without the deprecated field": [{"page_size": 4096}, {"page_size": HUGE}],
}
SIZES = [sizes for generation in GENERATIONS.values() for sizes in generation]


def region(**fields: Any) -> dict[str, Any]:
    return {"base_host_virt_addr": 0x7F0000000000, "size": 1 << 30, "offset": 0} | fields


def text_of(*regions: dict[str, Any]) -> bytes:
    return json.dumps(regions, separators=(",", ":")).encode()


def read(text: bytes) -> tuple[Region, ...]:
    regions = RegionsReader().feed(text)
    assert regions is not None
    return regions


@pytest.mark.parametrize("sizes", SIZES)
def test_every_generation_gives_address_length_offset_and_page_size(sizes: dict[str, int]) -> None:
    second = region(base_host_virt_addr=0x7F8000000000, size=1 << 31, offset=1 << 30)
    regions = read(text_of(region() | sizes, second | sizes))
    page_size = sizes.get("page_size", sizes.get("page_size_kib", 4096))
    assert [(item.address, item.length, item.offset, item.page_size) for item in regions] == [
        (0x7F0000000000, 1 << 30, 0, page_size),
        (0x7F8000000000, 1 << 31, 1 << 30, page_size),
    ]


def test_page_size_counts_before_page_size_kib() -> None:
    (only,) = read(text_of(region(page_size=HUGE, page_size_kib=4096)))
    assert only.page_size == HUGE


def test_unknown_fields_are_ignored_whatever_is_in_them() -> None:
    unknown = {"gpa_start": 0, "is_guest_memfd": False, "note": '][}{"\\', "more": [{"a": []}]}
    (only,) = read(text_of(region(**unknown)))
    assert only.length == 1 << 30


@given(data=st.data())
def test_any_split_of_the_text_asks_for_more_until_it_is_complete(data: st.DataObject) -> None:
    fields = data.draw(st.dictionaries(st.text(max_size=5), st.text(max_size=8), max_size=3))
    known = {"base_host_virt_addr", "size", "offset", "page_size", "page_size_kib"}
    unknown = {name: value for name, value in fields.items() if name not in known}
    text = text_of(region(**unknown, page_size_kib=4096), region(offset=1 << 30))
    cuts = sorted(set(data.draw(st.lists(st.integers(1, len(text) - 1), max_size=8))))
    reader = RegionsReader()
    for start, end in zip([0, *cuts], cuts, strict=False):
        assert reader.feed(text[start:end]) is None
    regions = reader.feed(text[cuts[-1] if cuts else 0 :])
    assert regions is not None
    assert regions == read(text)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"page_size": 8192}, "region 1: page size 8192"),
        ({"page_size_kib": 4}, "region 1: page size 4 "),
        ({"page_size": 0}, "region 1: page size 0"),
        ({"page_size": HUGE}, "region 1: page size 2097152, but 4096 in region 0"),
        ({"base_host_virt_addr": 0x7F0000000800}, "region 1: base_host_virt_addr 0x7f0000000800"),
        ({"size": 4097}, "region 1: size 0x1001"),
        ({"offset": 1}, "region 1: offset 0x1"),
        ({"is_guest_memfd": True}, "region 1: is_guest_memfd"),
        ({"is_guest_memfd": 1}, "is_guest_memfd"),
        ({"size": -4096}, "size"),
        ({"size": 1 << 63}, "size"),
        ({"offset": "0"}, "offset"),
        ({"page_size": 4096.0}, "page_size"),
        ({"page_size_kib": True}, "page_size_kib"),
    ],
)
def test_a_wrong_value_is_refused_by_region_and_field(fields: dict[str, Any], names: str) -> None:
    with pytest.raises(ProtocolError, match=names):
        read(text_of(region(), region(**fields)))


@pytest.mark.parametrize("missing", ["base_host_virt_addr", "size", "offset"])
def test_a_missing_field_is_refused_by_name(missing: str) -> None:
    fields = region()
    del fields[missing]
    with pytest.raises(ProtocolError, match=missing):
        read(text_of(fields))


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"[{}]",
        b"[1]",
        b"[}",
        b"]",
        b"{}",
        b"[,{}]",
        b"\xff[]",
        b'["\xff"]',
        b'[{"base_host_virt_addr":"\\ud800"}]',
        text_of(region()) + b"\0",
        text_of(region()) * 2,
        text_of(*[region()] * (BLOCK_LIMIT + 1)),
        b"[" * 100_000 + b"]" * 100_000,
        b'[{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
    ],
)
def test_what_is_no_such_message_is_a_protocol_error(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        RegionsReader().feed(text)


def test_a_text_without_end_is_refused_at_the_limit() -> None:
    reader = RegionsReader()
    piece = b" " * (1 << 16)
    assert reader.feed(b"[") is None
    for _ in range(15):
        assert reader.feed(piece) is None
    with pytest.raises(ProtocolError, match="more than 1048576 bytes"):
        reader.feed(piece)


def test_every_byte_is_looked_at_once_however_small_the_pieces_are() -> None:
    """Brackets in a string, sent one by one, must not have the text parsed again and again."""
    reader = RegionsReader()
    assert reader.feed(b'["') is None
    for _ in range(FIRST_MESSAGE_LIMIT - 2):
        assert reader.feed(b"]") is None
    assert reader.pending == FIRST_MESSAGE_LIMIT


@given(data=st.data())
def test_any_bytes_give_regions_or_more_or_the_protocol_error(data: st.DataObject) -> None:
    valid = text_of(region(page_size=4096, page_size_kib=4096), region(offset=1 << 30))
    start = data.draw(st.integers(0, len(valid)))
    end = data.draw(st.integers(start, len(valid)))
    piece = data.draw(st.sampled_from([b"", valid[start:end] * 2]) | st.binary(max_size=8))
    text = data.draw(st.binary(max_size=200) | st.just(valid[:start] + piece + valid[end:]))
    reader = RegionsReader()
    try:
        for place in range(0, len(text), 11):
            regions = reader.feed(text[place : place + 11])
            if regions is not None:
                assert all(item.length % item.page_size == 0 for item in regions)
                break
    except ProtocolError as error:
        assert str(error)
