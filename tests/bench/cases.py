"""What is measured: each case is one stream, run into the floor and into postcopyd."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from postcopyd.wire import stream_writer
from postcopyd.wire.messages import BlockEntry

PAGE = 4096
HUGE = 2 << 20
BLOCK = "pc.ram"
SECTION = 2


@dataclass(frozen=True, slots=True)
class Case:
    """One stream and one guest."""

    name: str
    order: str
    """Of the background: none, contiguous, scattered, zero."""
    length: int
    """Bytes of memory."""
    page_size: int = PAGE
    faults: int = 0
    """How many missing pages the guest touches, at most."""
    beside: Case | None = None
    """What comes again and again meanwhile, for another guest."""

    @property
    def pages(self) -> int:
        """Target pages."""
        return self.length // PAGE


def cases(quick: bool) -> list[Case]:
    """Return all cases; `quick` ones only show that everything works."""
    size = 16 << 20 if quick else 1 << 30
    faults = 50 if quick else 4000
    small = size if quick else size // 4
    full = Case("the other", "contiguous", size)
    return [
        Case("fault, idle", "none", small, faults=faults),
        Case("fault, another guest's at full rate", "none", small, faults=faults, beside=full),
        Case("fault, background at full rate", "contiguous", size, faults=1 << 20),
        Case("contiguous 4 KiB", "contiguous", size),
        Case("scattered 4 KiB", "scattered", size),
        Case("zero pages", "zero", size),
        Case("2 MiB pages", "contiguous", size // 2, page_size=HUGE),
    ]


def write_preamble(path: Path, case: Case) -> int:
    """Write the stream up to the package and the PING behind it; return its length."""
    block = BlockEntry(BLOCK, case.length, case.page_size)
    stream = b"".join(
        (
            stream_writer.configuration("bench"),
            stream_writer.open_return_path(),
            stream_writer.ping(1),
            stream_writer.advise(case.page_size, PAGE),
            stream_writer.StreamWriter(SECTION).ram_start([block]),
            stream_writer.discard(BLOCK, [(0, case.length)]),
            stream_writer.ping(2),
            stream_writer.package(b""),
            stream_writer.ping(4),
        )
    )
    path.write_bytes(stream)
    return len(stream)
