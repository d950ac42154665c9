"""Device state of any kind goes through a package and comes out as it went in."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from postcopyd.wire.device_state import unwrap_device_state, wrap_device_state
from postcopyd.wire.package import parse_package
from postcopyd.wire.stream_writer import device_section, package, ping

QEMU = device_section(3, "timer", bytes(24)) + device_section(4, "cpu", b"\1" * 100)


@given(st.binary(max_size=300))
@example(b"")
@example(QEMU)
@example(b'{"vcpus": 2}')
@example(wrap_device_state(b"blob"))
@example(wrap_device_state(wrap_device_state(b"blob")))
@example(ping(3))
@example(QEMU + ping(3))
@example(package(QEMU))
def test_what_goes_in_comes_out_through_a_package(state: bytes) -> None:
    contents = parse_package(package(wrap_device_state(state))[9:])
    assert contents.pings == (3,)
    assert unwrap_device_state(contents.device_state) == state


def test_qemus_own_sections_are_sent_as_they_are() -> None:
    assert wrap_device_state(QEMU) == QEMU
    assert unwrap_device_state(QEMU) == QEMU
