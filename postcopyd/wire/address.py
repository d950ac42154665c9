"""Where a stream listens or connects to: `tcp:HOST:PORT` or `unix:PATH`."""

from __future__ import annotations

import ipaddress
import re
from typing import Final, Literal

import msgspec

_UNIX_PATH_LIMIT: Final = 107
"""Bytes that fit sun_path in front of its NUL (unix(7))."""
_PORT_LIMIT: Final = 65535
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?\Z")
_FORMS: Final = "write tcp:HOST:PORT, tcp:[IPV6]:PORT or unix:PATH"


class Address(msgspec.Struct, frozen=True):
    """An address of a stream. `str()` gives the text that `parse` takes."""

    kind: Literal["tcp", "unix"]
    host: str = ""
    """A name or an IP address, without brackets; empty for "unix"."""
    port: int = 0
    """0 to 65535, where 0 lets a listener choose; 0 for "unix"."""
    path: str = ""
    """Path of the socket, absolute or relative; empty for "tcp"."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return the address that `text` is.

        :raise ValueError: if it is none; the text says why, and how one is written.
        """
        kind, colon, rest = text.partition(":")
        if colon and kind == "tcp":
            return cls._parse_tcp(text, rest)
        if colon and kind == "unix":
            return cls._parse_unix(text, rest)
        raise ValueError(f"{text!r} is not an address: {_FORMS}")

    @classmethod
    def _parse_tcp(cls, text: str, rest: str) -> Address:
        host, colon, port = rest.rpartition(":")
        if not colon or host.startswith("[") != host.endswith("]"):
            raise ValueError(f"{text!r} has no port: {_FORMS}")
        if not (port.isascii() and port.isdigit() and int(port) <= _PORT_LIMIT):
            raise ValueError(f"{text!r}: port {port!r} is not a number from 0 to {_PORT_LIMIT}")
        if host.startswith("["):
            host = host[1:-1]
            try:
                ipaddress.IPv6Address(host)
            except ValueError:
                raise ValueError(f"{text!r}: {host!r} in brackets is not an IPv6 address") from None
        elif not host:
            raise ValueError(f"{text!r} has no host; every address is tcp:0.0.0.0:{port}")
        elif ":" in host:
            raise ValueError(f"{text!r}: an IPv6 address is written in brackets, tcp:[::1]:4444")
        elif not _HOST_NAME.match(host):
            raise ValueError(f"{text!r}: {host!r} is not a host name or an IP address")
        return cls("tcp", host=host, port=int(port))

    @classmethod
    def _parse_unix(cls, text: str, path: str) -> Address:
        if not path or "\0" in path:
            raise ValueError(f"{text!r} has no path: {_FORMS}")
        length = len(path.encode(errors="surrogateescape"))
        if length > _UNIX_PATH_LIMIT:
            raise ValueError(
                f"{text!r}: the path has {length} bytes, a Unix socket's has at most "
                f"{_UNIX_PATH_LIMIT}: use a shorter or a relative one"
            )
        return cls("unix", path=path)

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"
