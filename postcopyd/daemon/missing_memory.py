"""Lists of memory that never came, one file for each migration that was abandoned.

Whoever looks after the guest needs to know for longer than the daemon remembers which pages are
memory errors.
"""

from __future__ import annotations

import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from postcopyd.incoming.report import MissingRange, Report


class MissingMemory(msgspec.Struct, frozen=True):
    """What the file holds, as JSON."""

    name: str
    """Of the migration."""
    time: str
    """When it was abandoned, as ISO 8601 has it."""
    vmm: str | None
    source: str | None
    length: int
    """Bytes that are missing."""
    missing: list[MissingRange]


def check_directory(directory: Path) -> None:
    """Check that lists can be written there.

    :raise OSError: if they cannot.
    """
    descriptor, name = tempfile.mkstemp(dir=directory)
    os.close(descriptor)
    Path(name).unlink()


def write_list(directory: Path, report: Report) -> Path:
    """Write the list of an abandoned migration; return its path.

    :raise OSError: if it cannot be written. Nothing is left then.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    content = MissingMemory(
        name=report.name,
        time=now.isoformat(),
        vmm=report.vmm,
        source=report.peer,
        length=sum(missing.length for missing in report.missing),
        missing=report.missing,
    )
    path = directory / f"{report.name}-{now:%Y%m%dT%H%M%SZ}.missing.json"
    descriptor, name = tempfile.mkstemp(dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise
    return path
