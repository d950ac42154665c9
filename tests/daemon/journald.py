"""A datagram socket that takes journald's place."""

from __future__ import annotations

import socket
from pathlib import Path


def decode_entry(entry: bytes) -> list[tuple[str, bytes]]:
    """Read an entry as the protocol's description says, not as the writer does it."""
    fields = []
    while entry:
        line, _, rest = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        fields.append((name.decode(), value))
        entry = rest
    return fields


class FakeJournald:
    """Takes entries at a path and reads them."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(10)

    def entry(self) -> dict[str, str]:
        """The next entry; no field may be there twice."""
        fields = decode_entry(self._socket.recv(1 << 20))
        assert len(dict(fields)) == len(fields)
        return {name: value.decode() for name, value in fields}

    def close(self) -> None:
        self._socket.close()
