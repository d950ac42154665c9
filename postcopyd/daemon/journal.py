"""Writes to systemd-journald in its native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL).

One datagram is one entry: `NAME=value` and a newline for each field, or, where the value has a
newline itself, the name, a newline, the length as 64 bits little-endian, the value and a newline.
An entry too large for a datagram goes into a sealed memory file, whose descriptor is sent.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Final, TextIO

from postcopyd.kernel import memory_file

DEFAULT_PATH: Final = "/run/systemd/journal/socket"

_FIELD_NAME_LIMIT: Final = 64

# What a datagram socket says whose journald has ended, and may have been started anew.
_UNCONNECTED: Final = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN)


def is_journal(stream: TextIO, journal_stream: str) -> bool:
    """Tell whether `stream` goes to the journal anyway.

    :param journal_stream: what systemd says in JOURNAL_STREAM: device and inode of the stream
        that it connected to the journal. A stream that was redirected since has others.
    """
    device, colon, inode = journal_stream.partition(":")
    if not (colon and device.isdecimal() and inode.isdecimal()):
        return False
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (status.st_dev, status.st_ino) == (int(device), int(inode))


def field_name(name: str) -> str:
    """Return `name` as journald takes it: capitals, digits and underscores, a capital first."""
    changed = "".join(
        letter if letter.isascii() and letter.isalnum() else "_" for letter in name
    ).upper()
    return changed.lstrip("_0123456789")[:_FIELD_NAME_LIMIT] or "FIELD"


def encode_entry(fields: Iterable[tuple[str, str]]) -> bytes:
    """Return one entry; the names must be what `field_name` returns."""
    entry = bytearray()
    for name, value in fields:
        encoded = value.encode(errors="surrogateescape")
        if b"\n" in encoded:
            length = len(encoded).to_bytes(8, "little")
            entry += name.encode() + b"\n" + length + encoded + b"\n"
        else:
            entry += name.encode() + b"=" + encoded + b"\n"
    return bytes(entry)


class Journal:
    """A connection to journald. Sending never waits: what does not fit is counted."""

    def __init__(self, path: str = DEFAULT_PATH) -> None:
        """Connect.

        :raise OSError: if there is no journald at `path`.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._path = path
        self.lost = 0
        """Entries that journald has not taken since the last one that it has."""
        try:
            self._connect()
        except OSError:
            self._socket.close()
            raise

    def send(self, fields: Iterable[tuple[str, str]]) -> None:
        """Write one entry. If journald does not take it, it is lost; the next one says how many."""
        entry = encode_entry(fields)
        if self.lost:
            entry += encode_entry([("POSTCOPYD_ENTRIES_LOST", str(self.lost))])
        try:
            try:
                self._send(entry)
            except OSError as error:
                if error.errno not in _UNCONNECTED:
                    raise
                self._connect()
                self._send(entry)
            self.lost = 0
        except OSError:
            self.lost += 1

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._socket.close()

    def _connect(self) -> None:
        if not Path(self._path).is_socket():
            raise FileNotFoundError(
                errno.ENOENT, "no journald listens here: is this system run by systemd?", self._path
            )
        self._socket.connect(self._path)

    def _send(self, entry: bytes) -> None:
        try:
            self._socket.send(entry)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_in_memory_file(entry)

    def _send_in_memory_file(self, entry: bytes) -> None:
        descriptor = memory_file.create("postcopyd-journal-entry", len(entry))
        try:
            rest = memoryview(entry)
            while rest:
                rest = rest[os.pwrite(descriptor, rest, len(entry) - len(rest)) :]
            memory_file.seal(descriptor)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
            self._socket.sendmsg([b""], rights)
        finally:
            os.close(descriptor)
