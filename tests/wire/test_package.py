"""The device package, taken apart by rule and not by offset."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.wire import stream_writer as writer
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import Package
from postcopyd.wire.package import check_package, parse_package
from tests.wire.streams import CAPTURES, DEVICES, captured, read

sections = st.lists(st.binary(max_size=60), max_size=4).map(
    lambda payloads: b"".join(
        writer.device_section(number, "device", payload) for number, payload in enumerate(payloads)
    )
)


def inside(device_state: bytes, pings: list[int]) -> bytes:
    return writer.package(device_state, pings)[9:]


@given(sections, st.lists(st.integers(0, 0xFFFFFFFF), max_size=4))
def test_any_sections_and_any_number_of_pings_come_back(
    device_state: bytes, pings: list[int]
) -> None:
    contents = parse_package(inside(device_state, pings))
    assert contents.device_state == device_state
    assert contents.pings == tuple(pings)


def test_a_section_whose_content_looks_like_pings_is_not_stripped() -> None:
    device_state = writer.device_section(1, "cpu", writer.ping(3) * 3)
    contents = parse_package(inside(device_state, [3, 0x42]))
    assert contents.device_state == device_state
    assert contents.pings == (3, 0x42)


@pytest.mark.parametrize("name", CAPTURES)
def test_a_real_package_loses_only_its_ends(name: str) -> None:
    data = next(event.data for event in read(captured(name)) if isinstance(event, Package))
    contents = parse_package(data)
    assert data == data[:5] + contents.device_state + writer.ping(3) + data[-5:]
    assert contents.device_state[0] == 0x04


LISTEN, RUN = inside(b"", [])[:5], inside(b"", [])[5:]


@pytest.mark.parametrize(
    ("data", "why", "position"),
    [
        (b"", "begins with nothing, not with POSTCOPY_LISTEN", 100),
        (RUN, "not with POSTCOPY_LISTEN", 100),
        (LISTEN, "not with POSTCOPY_RUN", 100),
        (LISTEN + DEVICES, "not with POSTCOPY_RUN", 100),
        (LISTEN + LISTEN + RUN, r"command 4 \(POSTCOPY_LISTEN\) in the package", 105),
        (LISTEN + b"\x08\x01\x00\0\0" + RUN, r"command 256 \(unknown\) in the package", 105),
        (LISTEN + b"\x00" + RUN, "section type 0x00 in the package", 105),
        (LISTEN + DEVICES[:-5] + RUN, "has no footer", 105 + len(DEVICES) - 5),
        (LISTEN + DEVICES + writer.switchover_start() + RUN, "no footer", 105 + len(DEVICES) + 5),
        (LISTEN + b"\x04" + RUN, "no footer", 106),
    ],
)
def test_a_wrong_package_is_refused_by_name(data: bytes, why: str, position: int) -> None:
    with pytest.raises(ProtocolError, match=why) as refusal:
        check_package(data, 100)
    assert refusal.value.position == position
    with pytest.raises(ProtocolError, match=why):
        parse_package(data)
