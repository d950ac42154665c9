"""What /proc tells of a process: its memory and its descriptors."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

_LINE = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<permissions>\S{4}) (?P<offset>[0-9a-f]+) "
    r"(?P<device>\S+) (?P<inode>\d+) *(?P<path>.*)"
)
_TABLE_SIZE = re.compile(r"^FDSize:\s+(\d+)$", re.MULTILINE)
_INNER_IDS = re.compile(r"^NSpid:\s+(.+)$", re.MULTILINE)


class MappedRange(msgspec.Struct, frozen=True):
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


class OpenDescriptor(msgspec.Struct, frozen=True):
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
                yield _mapped_range(match)


def mappings_with_flags(pid: int) -> Iterator[tuple[MappedRange, frozenset[str]]]:
    """Iterate over what a process has mapped, by address, with the flags of each range.

    The flags are those of VmFlags in /proc/PID/smaps (proc(5)), such as ``lo`` for locked memory
    and ``hg`` for huge pages advised. Telling them walks the process's page tables: it takes time.

    :raise FileNotFoundError: if it has exited.
    :raise PermissionError: if we may not look at it.
    """
    mapped: MappedRange | None = None
    with open(_directory(pid) / "smaps", errors="surrogateescape") as lines:
        for line in lines:
            if match := _LINE.match(line):
                mapped = _mapped_range(match)
            elif line.startswith("VmFlags:") and mapped is not None:
                yield mapped, frozenset(line.split()[1:])


def _mapped_range(match: re.Match[str]) -> MappedRange:
    return MappedRange(
        int(match["start"], 16),
        int(match["end"], 16),
        match["permissions"],
        int(match["offset"], 16),
        match["device"],
        int(match["inode"]),
        match["path"],
    )


def descriptor_table_size(pid: int) -> int:
    """Return a number that is above those of all descriptors of a process.

    Anybody may ask that; which ones it has open is for its own user to see.

    :raise FileNotFoundError: if it has exited.
    """
    status = (_directory(pid) / "status").read_text(errors="surrogateescape")
    match = _TABLE_SIZE.search(status)
    return int(match[1]) if match else 0


def threads_by_inner_id(pid: int) -> dict[int, int]:
    """Return the threads of a process: as its own pid namespace numbers them -> as ours does.

    :raise FileNotFoundError: if it has exited.
    """
    found = {}
    for entry in list((_directory(pid) / "task").iterdir()):
        try:
            status = (entry / "status").read_text(errors="surrogateescape")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        if match := _INNER_IDS.search(status):
            found[int(match[1].split()[-1])] = int(entry.name)
    return found


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
