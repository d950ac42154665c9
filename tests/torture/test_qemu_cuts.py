"""A real QEMU source whose connection is cut at any byte after the switchover.

Between its package's first byte and the destination's RUN, and once it has handed everything to its
socket, a QEMU source cannot recover (docs/reliability.md), and a 7.2 not while it is recovering
either: there no cut is made. Each case follows from the seed and its number; the bytes are counted
from a moment that QEMU's own timing decides.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.interop.breaking_relay import BreakingRelay
from tests.interop.moving import VERSIONS, check_moved, linux, receiving
from tests.interop.qemu import running_qemu, waiting_qemu
from tests.interop.qemu_machine import Machine
from tests.interop.qemu_versions import QemuVersion
from tests.torture.broken_migrations import numbered
from tests.torture.sampling import Sampling, Tally

KINDS: Final[list[tuple[QemuVersion, bool]]] = [
    (version, preempt) for version in VERSIONS for preempt in (False, True)
]
MOST: Final = 64 << 20
"""Bytes behind the package within which all cuts are: the checker alone has 100 MiB."""
RECOVERED: Final = 256 << 10
"""Bytes after which a source that has come back is not recovering any more."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    numbered(metafunc, usual=2, full=24)


def make_cuts(version: QemuVersion, numbers: random.Random) -> list[int]:
    """After how many more bytes each cut is made."""
    places = numbers.choice((1, 2, 3, 5))
    cuts: list[int] = []
    for _ in range(places):
        earliest = RECOVERED if cuts and version == "7.2" else 0
        most = numbers.choice((4096, RECOVERED, MOST // places - RECOVERED))
        cuts.append(earliest + numbers.randrange(most))
    return cuts


async def test_a_qemu_source_that_is_cut_at_any_byte_is_resumed(
    tmp_path: Path, sampling: Sampling, tally: Callable[[str], Tally], number: int
) -> None:
    kinds = list(KINDS)
    sampling.numbers("QEMU cuts").shuffle(kinds)
    version, preempt = kinds[number % len(kinds)]
    numbers = sampling.numbers(f"QEMU cuts {number}")
    cuts = make_cuts(version, numbers)
    last = preempt and numbers.random() < 0.5
    print(f"{number}: {version}, {preempt=}, {cuts}, {last=}")
    machine = linux(version)
    with running_daemon(tmp_path) as daemon:
        try:
            pause = await move(daemon, tmp_path, machine, cuts, preempt=preempt, last=last)
        finally:
            print(daemon.log)
    matrix = tally("network: cuts of a QEMU source")
    matrix.outcomes[f"{version}{' with preempt' if preempt else ''} complete"] += 1
    matrix.pauses.append(pause)


async def move(
    daemon: RunningDaemon,
    directory: Path,
    machine: Machine,
    cuts: list[int],
    *,
    preempt: bool,
    last: bool,
) -> float:
    """Move a guest, with these cuts; return its longest wait for a page, in seconds."""
    async with (
        running_qemu(directory, machine) as source,
        waiting_qemu(directory, machine) as destination,
        receiving(daemon, destination, "moving") as command,
    ):
        if preempt:
            await source.set_capabilities("postcopy-preempt")
        port = int((await command.address()).rsplit(":", 1)[1])
        async with BreakingRelay(port).listening() as relay:
            await source.migrate(relay.uri)
            await source.start_postcopy()
            await destination.event("RESUME")
            following = iter(cuts)
            relay.cut_after(next(following), last=last)
            # A source that is told to resume too soon may pause again.
            for _ in range(3 * len(cuts)):
                if not await source.paused_unless_completed():
                    break
                if not relay.will_cut and (cut := next(following, None)) is not None:
                    relay.cut_after(cut, last=last)
                await source.resume(relay.uri)
            assert relay.cuts == len(cuts) or last
            assert await source.migration_status("completed", "failed") == "completed"
        report = await command.report()
        assert report["received"] == report["length"]
        await check_moved(source, destination)
        waited = max(beat.max_wait_us for beat in destination.heartbeat.beats) / 1e6
        # The guest's clock is an emulated one where its processor is.
        ours = report["fault_latency"]["maximum"] / 1e6
        print(f"longest wait: {waited:.3f} s by the guest's clock, {ours:.3f} s by the daemon's")
        return waited
