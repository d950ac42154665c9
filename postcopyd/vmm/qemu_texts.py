"""What QEMU's human monitor prints about memory, 7.2 and 10.0 alike (docs/qemu-wire.md, 6)."""

from __future__ import annotations

import re
from typing import Final

import msgspec

_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

_BLOCK: Final = re.compile(
    r" *(?P<name>\S*) +(?P<size>\d+) (?P<unit>[KMG])iB +0x[0-9a-f]+ +0x(?P<used>[0-9a-f]+)"
    r" +0x(?P<total>[0-9a-f]+)(?: +0x(?P<address>[0-9a-f]+) +r[ow])?\s*"
)
_VIEW: Final = re.compile(r"^FlatView #", re.MULTILINE)
_MEMORY_SPACE: Final = re.compile(r'^ AS "memory", ', re.MULTILINE)
_PART: Final = re.compile(
    r"^ +(?P<start>[0-9a-f]{16})-[0-9a-f]{16} \(prio -?\d+, ram\): (?P<name>.+?)"
    r"(?: @(?P<offset>[0-9a-f]{16}))?(?: KVM)?\r?$",
    re.MULTILINE,
)
_ADDRESS: Final = re.compile(r"Host virtual address for 0x[0-9a-f]+ .* is 0x([0-9a-f]+)\s*")


class UnknownText(ValueError):
    """A QEMU that prints something else than those that are known; the text quotes it."""


class ListedBlock(msgspec.Struct, frozen=True):
    """A line of ``info ramblock``."""

    name: str
    page_size: int
    """Bytes."""
    used: int
    """Bytes in use; what the source calls its length."""
    total: int
    """The most that it can grow to, bytes."""
    address: int | None
    """Where it is mapped in the process; 7.2 does not tell."""


class MappedPart(msgspec.Struct, frozen=True):
    """A piece of a RAM block that the guest has in its address space."""

    name: str
    guest_address: int
    offset: int
    """Where in the block it begins, bytes."""


def parse_blocks(text: str) -> list[ListedBlock]:
    """Parse ``info ramblock``; blocks without a name, which never migrate, are left out.

    :raise UnknownText: if a line is none of a block.
    """
    found = []
    for line in text.splitlines()[1:]:
        match = _BLOCK.fullmatch(line)
        if match is None:
            raise UnknownText(f"a RAM block that reads {line.strip()!r}")
        if match["name"]:
            found.append(
                ListedBlock(
                    name=match["name"],
                    page_size=int(match["size"]) * _UNITS[match["unit"]],
                    used=int(match["used"], 16),
                    total=int(match["total"], 16),
                    address=int(match["address"], 16) if match["address"] else None,
                )
            )
    return found


def parse_guest_memory(text: str) -> list[MappedPart]:
    """Parse ``info mtree -f``: the RAM in the address space that is called memory.

    :raise UnknownText: if that address space is missing.
    """
    for view in _VIEW.split(text):
        if _MEMORY_SPACE.search(view):
            return [
                MappedPart(match["name"], int(match["start"], 16), int(match["offset"] or "0", 16))
                for match in _PART.finditer(view)
            ]
    raise UnknownText('guest memory without an address space "memory"')


def parse_host_address(text: str) -> int:
    """Parse ``gpa2hva``.

    :raise UnknownText: if it is no address.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise UnknownText(f"an address that reads {text.strip()!r}")
    return int(match[1], 16)
