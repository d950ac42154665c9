"""Lists of memory that never came, one file for each migration that was abandoned.

Whoever looks after the guest needs to know for longer than the daemon remembers which pages are
memory errors. So a list that cannot be written is written later (`MissingList`), from what its
migration holds on to meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from postcopyd.daemon import event_log
from postcopyd.incoming.report import MissingRange, Report

_FIRST_PAUSE: Final = 2.0
_LONGEST_PAUSE: Final = 60.0
"""Seconds until a list that could not be written is tried again; they double from one to the
other."""

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
    with _complete_or_not_at_all(path, _unfinished(directory, report.name)) as file:
        await asyncio.to_thread(_reserve, file.fileno(), least_size(report))
        await _write(file, head, ranges)
        file.truncate()  # what was reserved is no part of it
        await asyncio.to_thread(os.fsync, file.fileno())
    return path


def least_size(report: Report) -> int:
    """Return bytes that the list of an abandoned migration takes at least; most often 4 in 5."""
    shortest = (MissingRange(block.name, 0, block.page_size) for block in report.blocks)
    return report.missing_ranges * min((len(_line(it)) for it in shortest), default=0)


def _unfinished(directory: Path, name: str) -> Path:
    return directory / f"{name}.unfinished"


def _reserve(descriptor: int, length: int) -> None:
    """Take that much room, or none: to use up what there is would be in everybody's way.

    :raise OSError: if there is not that much.
    """
    if length:
        try:
            os.posix_fallocate(descriptor, 0, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not every file system can
                raise


async def _write(file: BinaryIO, head: _Head, ranges: Iterator[MissingRange]) -> None:
    """Write one JSON object, with a line for each range."""
    file.write(msgspec.json.format(msgspec.json.encode(head)).removesuffix(b"\n}"))
    file.write(b',\n  "missing": [')
    before = b""
    while batch := list(islice(ranges, _BATCH)):
        for missing in batch:
            file.write(before + _line(missing))
            before = b","
        await asyncio.sleep(0)
    file.write(b"\n  ]\n}\n")


def _line(missing: MissingRange) -> bytes:
    return b"\n    " + msgspec.json.encode(missing)


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
        unfinished.unlink(missing_ok=True)
        raise


class MissingList:
    """The list of one migration: written as soon as it can be, unless it is given up."""

    def __init__(self, name: str, directory: Path) -> None:
        """Write nothing yet."""
        self._name = name
        self._directory = directory
        self._given_up_because: str | None = None
        self._last_try = asyncio.Event()
        self.path: str | None = None
        """Where it is, once it is written."""
        self.failure: str | None = None
        """Why it cannot be written, or was given up."""
        self.stuck = asyncio.Event()
        """Set while it cannot be written, and is tried again."""

    async def write(self, report: Report, ranges: Callable[[], Iterator[MissingRange]]) -> None:
        """Return when it is written or given up.

        :param report: of the migration, which has ended.
        :param ranges: gives all that is missing, in order.
        """
        pause = _FIRST_PAUSE
        while True:
            try:
                path = await write_list(self._directory, report, ranges())
            except OSError as error:
                if self._given_up_because is not None:
                    self._is_given_up(error, report)
                    return
                self._is_stuck(error, report)
            else:
                self._is_written(path)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._last_try.wait()
            pause = min(2 * pause, _LONGEST_PAUSE)

    def give_up(self, because: str) -> None:
        """Try once at most from now on: what is under way, or once more."""
        if self._given_up_because is None:
            self._given_up_because = because
            self.stuck.clear()
            self._last_try.set()

    def _is_stuck(self, error: OSError, report: Report) -> None:
        reason = self._reason(error)
        self.failure = f"{reason}; tried again until there is room"
        if not self.stuck.is_set():
            self.stuck.set()
            event_log.log_list_waits(self._name, reason, least_size(report))

    def _is_given_up(self, error: OSError, report: Report) -> None:
        reason = self._reason(error)
        self.failure = f"{reason}; given up: {self._given_up_because}"
        event_log.log_list_given_up(
            self._name, reason, str(self._given_up_because), report.missing_ranges
        )

    def _is_written(self, path: Path) -> None:
        self.path, self.failure = str(path), None
        self.stuck.clear()
        event_log.log_list(self._name, self.path)

    def _reason(self, error: OSError) -> str:
        return f"{_unfinished(self._directory, self._name)}: {error.strerror or error}"
