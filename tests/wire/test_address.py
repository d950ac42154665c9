"""Addresses of streams."""

from __future__ import annotations

import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.wire.address import Address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp:127.0.0.1:4444", Address("tcp", host="127.0.0.1", port=4444)),
        ("tcp:host-7.example.org:0", Address("tcp", host="host-7.example.org")),
        ("tcp:[::1]:65535", Address("tcp", host="::1", port=65535)),
        ("tcp:[fe80::1%eth0]:1", Address("tcp", host="fe80::1%eth0", port=1)),
        ("unix:/run/post copy:1.sock", Address("unix", path="/run/post copy:1.sock")),
        ("unix:relative", Address("unix", path="relative")),
    ],
)
def test_an_address_is_read_and_written_alike(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "write tcp:HOST:PORT"),
        ("127.0.0.1:4444", "write tcp:HOST:PORT"),
        ("udp:host:1", "'udp:host:1' is not an address"),
        ("tcp", "'tcp' is not an address"),
        ("tcp:host", "has no port"),
        ("tcp:[::1]", "has no port"),
        ("tcp::4444", "every address is tcp:0.0.0.0:4444"),
        ("tcp:host:", "port '' is not a number"),
        ("tcp:host:ssh", "port 'ssh' is not a number"),
        ("tcp:host:65536", "port '65536' is not a number from 0 to 65535"),
        ("tcp:host:-1", "port '-1' is not a number"),
        ("tcp:host:٣", "port '٣' is not a number"),
        ("tcp:::1:4444", "in brackets, tcp:[::1]:4444"),
        ("tcp:[127.0.0.1]:1", "in brackets is not an IPv6 address"),
        ("tcp:[]:1", "in brackets is not an IPv6 address"),
        ("tcp:a b:1", "'a b' is not a host name"),
        ("tcp:host\n:1", "is not a host name"),
        ("unix:", "has no path"),
        ("unix:a\0b", "has no path"),
        ("unix:/" + "x" * 107, "the path has 108 bytes"),
        ("unix:" + "ä" * 54, "the path has 108 bytes"),
    ],
)
def test_what_is_no_address_is_refused_with_what_to_write(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        Address.parse(text)


@given(
    st.one_of(
        st.ip_addresses().map(
            lambda ip: f"[{ip}]" if isinstance(ip, ipaddress.IPv6Address) else str(ip)
        ),
        st.from_regex(r"[a-z0-9_]([a-z0-9.-]{0,60}[a-z0-9])?", fullmatch=True),
    ),
    st.integers(0, 65535),
)
def test_every_tcp_address_comes_back_as_it_was_written(host: str, port: int) -> None:
    text = f"tcp:{host}:{port}"
    assert str(Address.parse(text)) == text


@given(st.text())
def test_any_other_text_is_refused_with_a_value_error_only(text: str) -> None:
    try:
        address = Address.parse(text)
    except ValueError:
        return
    assert Address.parse(str(address)) == address
