"""Lists of memory that never came, one file for each migration that was abandoned.

Whoever looks after the guest needs to know for longer than the daemon remembers which pages are
memory errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from postcopyd.incoming.report import MissingRange, Report

_BATCH: Final = 256
"""Ranges that are written in one turn of the event loop: other migrations have faults."""


class _Head(msgspec.Struct, frozen=True):
    """What the file holds, as JSON, beside the ranges themselves."""

    name: str
    """Of the migration."""
    time: str
    """When the list was made, as ISO 8601 has it."""
    vmm: str | None
    source: str | None
    length: int
    """Bytes that are missing."""
    ranges: int


def check_directory(directory: Path) -> None:
    """Check that lists can be written there.

    :raise OSError: if they cannot.
    """
    descriptor, name = tempfile.mkstemp(dir=directory)
    os.close(descriptor)
    Path(name).unlink()


async def write_list(directory: Path, report: Report, ranges: Iterator[MissingRange]) -> Path:
    """Write the list of an abandoned migration, little by little; return its path.

    :param ranges: all that is missing, in order.
    :raise OSError: if it cannot be written. Nothing is left then.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    head = _Head(
        name=report.name,
        time=now.isoformat(),
        vmm=report.vmm,
        source=report.peer,
        length=report.missing_length,
        ranges=report.missing_ranges,
    )
    path = directory / f"{report.name}-{now:%Y%m%dT%H%M%SZ}.missing.json"
    with _complete_or_not_at_all(path, directory / f"{report.name}.unfinished") as file:
        await _write(file, head, ranges)
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    return path


async def _write(file: BinaryIO, head: _Head, ranges: Iterator[MissingRange]) -> None:
    """Write one JSON object, with a line for each range."""
    file.write(msgspec.json.format(msgspec.json.encode(head)).removesuffix(b"\n}"))
    file.write(b',\n  "missing": [')
    before = b""
    while batch := list(islice(ranges, _BATCH)):
        for missing in batch:
            file.write(before + b"\n    " + msgspec.json.encode(missing))
            before = b","
        await asyncio.sleep(0)
    file.write(b"\n  ]\n}\n")


@contextlib.contextmanager
def _complete_or_not_at_all(path: Path, unfinished: Path) -> Iterator[BinaryIO]:
    """Have a file be at `path` if all of it was written.

    :param unfinished: where it is until then. What a process that was killed has left there is
        written over: whoever goes on with its migration lists again.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    descriptor = os.open(unfinished, flags, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink()
        raise
