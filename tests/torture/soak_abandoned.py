"""What an abandoned guest has to keep: memory that has come is as it was sent, and never zeros."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.daemon.whole_migration import LENGTHS, PAGE, Image

_PATIENCE: Final = 90.0
"""Seconds until a list has been written, with everything that happens to who writes it."""


@contextlib.contextmanager
def standing_still(process: int) -> Iterator[None]:
    """Have a VMM run no more: a memory error would be its end, and that of what is to be done."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)


class MemoryFiles:
    """The memory files of a VMM, which stay when it has gone."""

    def __init__(self, process: int) -> None:
        self._blocks: dict[str, int] = {}
        by_length = {length: name for name, length in LENGTHS.items()}
        for entry in Path(f"/proc/{process}/fd").iterdir():
            if os.readlink(entry).startswith("/memfd:"):
                length = entry.stat().st_size
                assert stat.S_ISREG(entry.stat().st_mode)
                if length in by_length:
                    self._blocks[by_length[length]] = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
        assert self._blocks.keys() == LENGTHS.keys(), f"there are only {sorted(self._blocks)}"

    def close(self) -> None:
        """Let go of them."""
        for descriptor in self._blocks.values():
            os.close(descriptor)

    def wrong_pages(self, image: Image, missing: set[tuple[str, int]]) -> list[str]:
        """Return the pages that came and are not as they were sent, or did not and hold something.

        :param missing: block and offset of each page that never came.
        """
        wrong = []
        for name, descriptor in self._blocks.items():
            sent, here = image.memory[name], os.pread(descriptor, LENGTHS[name], 0)
            for offset in range(0, LENGTHS[name], PAGE):
                page = here[offset : offset + PAGE]
                expected = sent[offset : offset + PAGE]
                if (name, offset) in missing:
                    expected = bytes(PAGE)
                if page != expected:
                    zeros = " reads as zeros" if page == bytes(PAGE) else ""
                    wrong.append(f"{name} {offset:#x}{zeros}")
        return wrong


async def missing_pages(records: Path, name: str) -> set[tuple[str, int]]:
    """Wait for the list of what is missing of a migration; return block and offset of each page."""
    async with asyncio.timeout(_PATIENCE):
        while not (lists := list(records.glob(f"{name}-*.missing.json"))):
            await asyncio.sleep(0.05)
    listed = json.loads(lists[0].read_text())
    assert listed["name"] == name
    missing = {
        (each["block"], offset)
        for each in listed["missing"]
        for offset in range(each["offset"], each["offset"] + each["length"], PAGE)
    }
    assert len(missing) * PAGE == listed["length"], "the list is wrong about its length"
    return missing


def remove_lists(records: Path, name: str) -> None:
    """Remove what there is of them: a successor of who has written one may write another."""
    for path in records.glob(f"{name}-*.missing.json"):
        path.unlink()
