"""The list of what never came, which is kept for whoever looks after the guest."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopyd.daemon.missing_memory import write_list
from postcopyd.incoming.report import MissingRange, Report

PAGE = 4096


def report_of(ranges: list[MissingRange]) -> Report:
    return Report(
        "vm0",
        "abandoned",
        failure=None,
        vmm="pid 7",
        peer="192.0.2.1:4",
        machine=None,
        missing=ranges[:1],
        missing_ranges=len(ranges),
        missing_length=sum(missing.length for missing in ranges),
    )


@pytest.mark.parametrize("number", [0, 1, 3, 1000])
async def test_it_names_every_range(tmp_path: Path, number: int) -> None:
    ranges = [MissingRange(f"block {i % 3}", i * PAGE, PAGE) for i in range(number)]
    path = await write_list(tmp_path, report_of(ranges), iter(ranges))
    listed = json.loads(path.read_text())
    assert [MissingRange(**missing) for missing in listed.pop("missing")] == ranges
    del listed["time"]
    assert listed == {
        "name": "vm0",
        "vmm": "pid 7",
        "source": "192.0.2.1:4",
        "length": number * PAGE,
        "ranges": number,
    }
    assert list(tmp_path.iterdir()) == [path]


async def test_what_else_there_is_to_do_is_done_meanwhile(tmp_path: Path) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    at_work = asyncio.create_task(others())
    ranges = [MissingRange("pc.ram", i * PAGE, PAGE) for i in range(100_000)]
    await write_list(tmp_path, report_of(ranges), iter(ranges))
    at_work.cancel()
    assert turns >= 300


async def test_a_list_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    def ranges() -> Iterator[MissingRange]:
        yield from (MissingRange("pc.ram", i * PAGE, PAGE) for i in range(1000))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        await write_list(tmp_path, report_of([]), ranges())
    assert list(tmp_path.iterdir()) == []


async def test_nothing_is_left_of_a_list_whose_writer_was_killed(tmp_path: Path) -> None:
    class Killed(BaseException):
        """The end of a process, but for what that would leave."""

    unfinished: list[tuple[Path, bytes]] = []

    def ranges() -> Iterator[MissingRange]:
        yield from (MissingRange("pc.ram", i * PAGE, PAGE) for i in range(10_000))
        unfinished.extend((path, path.read_bytes()) for path in tmp_path.iterdir())
        raise Killed

    with pytest.raises(Killed):
        await write_list(tmp_path, report_of([]), ranges())
    ((left, content),) = unfinished
    left.write_bytes(content)
    path = await write_list(tmp_path, report_of([]), iter([]))
    assert json.loads(path.read_text())["missing"] == []
    assert list(tmp_path.iterdir()) == [path]
