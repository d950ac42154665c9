"""What /proc tells of a process: its memory and its descriptors."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<permissions>\S{4}) (?P<offset>[0-9a-f]+) "
    r"(?P<device>\S+) (?P<inode>\d+) *(?P<path>.*)"
)


@dataclass(frozen=True, slots=True)
class MappedRange:
    """One line of /proc/PID/maps."""

    start: int
    """Address of the first byte."""
    end: int
    """Address behind the last byte."""
    permissions: str
    """Such as ``rw-p``; ``s`` at the end for a shared mapping."""
    offset: int
    """Where in its file it begins, bytes."""
    device: str
    """Of its file, ``major:minor`` in hexadecimal."""
    inode: int
    """Of its file; 0 for anonymous memory."""
    path: str
    """Its file, such as ``/memfd:ram (deleted)``, or a name such as ``[heap]``; may be empty."""


@dataclass(frozen=True, slots=True)
class OpenDescriptor:
    """One entry of /proc/PID/fd."""

    number: int
    target: str
    """What it refers to, such as ``/dev/null``, ``socket:[123]``, ``anon_inode:[userfaultfd]``."""


def resident_bytes(pid: int | None = None) -> int:
    """Return how much memory a process has in RAM, pages that it shares included.

    :param pid: None for this process.
    :raise FileNotFoundError: if it has exited.
    """
    fields = (_directory(pid) / "statm").read_text().split()
    return int(fields[1]) * mmap.PAGESIZE


def mappings(pid: int | None = None) -> Iterator[MappedRange]:
    """Iterate over what a process has mapped, by address.

    :param pid: None for this process.
    :raise FileNotFoundError: if it has exited.
    :raise PermissionError: if we may not look at it.
    """
    with open(_directory(pid) / "maps", errors="surrogateescape") as maps:
        for line in maps:
            if match := _LINE.match(line):
                yield MappedRange(
                    int(match["start"], 16),
                    int(match["end"], 16),
                    match["permissions"],
                    int(match["offset"], 16),
                    match["device"],
                    int(match["inode"]),
                    match["path"],
                )


def open_descriptors(pid: int | None = None) -> list[OpenDescriptor]:
    """Return what a process has open, by number.

    :param pid: None for this process.
    :raise FileNotFoundError: if it has exited.
    :raise PermissionError: if we may not look at it.
    """
    found = []
    for entry in list((_directory(pid) / "fd").iterdir()):
        try:
            found.append(OpenDescriptor(int(entry.name), str(entry.readlink())))
        except FileNotFoundError:
            continue  # closed meanwhile, as the one that has listed the directory
    return sorted(found, key=lambda descriptor: descriptor.number)


def _directory(pid: int | None) -> Path:
    return Path(f"/proc/{pid or 'self'}")
