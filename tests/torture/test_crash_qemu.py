"""A Linux guest moves between two real QEMUs, and the daemon is killed when it has half of it.

Before the devices are loaded a QEMU pair survives that only by an operator's hand, as
docs/reliability.md says; so the kills come after it. The source is told to resume, as a QEMU wants.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from tests.interop.moving import VERSIONS, check_moved, linux, receiving
from tests.interop.qemu import running_qemu, waiting_qemu
from tests.interop.qemu_versions import QemuVersion
from tests.torture.course import GOAL
from tests.torture.crash_points import FIRST
from tests.torture.crashing import restarted_daemon
from tests.torture.kills import Point, arm, assert_killed, happened
from tests.torture.sampling import Sampling, Tally
from tests.torture.victims import VICTIMS, Victim

_USUAL = 1
"""Cases of each version in a usual run."""
_LOADED = "after the journal says that the guest runs"
_POINTS = (
    "after the guest was loaded",
    "before faults are answered",
    "after a page is requested",
    "before pages are placed",
    "after UFFDIO_COPY",
)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_guest_of_qemu_arrives_though_the_daemon_is_killed(
    tmp_path: Path, version: QemuVersion, sampling: Sampling, tally: Callable[[str], Tally]
) -> None:
    cases = list(product(_POINTS, VICTIMS, (False, True)))
    numbers = sampling.numbers(f"crash QEMU {version}")
    outcomes = tally(f"crash points, QEMU {version}")
    outcomes.goal = GOAL  # every kill is under a guest that runs
    for number, (point, victim, preempt) in enumerate(
        numbers.sample(cases, sampling.count(_USUAL, len(cases)))
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        pause = await _move(directory, version, point, victim, preempt)
        outcomes.pauses.append(pause)
        outcomes.outcomes[f"ok ({victim} killed {point}{', preempt' if preempt else ''})"] += 1


async def _move(
    directory: Path, version: QemuVersion, point: str, victim: Victim, preempt: bool
) -> float:
    """Move a guest and see that all is well; return seconds of its longest access to a page."""
    machine = linux(version)
    async with (
        running_qemu(directory, machine) as source,
        waiting_qemu(directory, machine) as destination,
    ):
        if preempt:
            await source.set_capabilities("postcopy-preempt")
        kills: list[tuple[Point, Victim | None]] = [
            (FIRST[_LOADED], None),
            (FIRST[point], victim),
        ]
        with restarted_daemon(directory, arm(directory, kills)) as daemon:
            async with receiving(daemon, destination) as command:
                address = await command.address()
                await source.migrate(address)
                await source.start_postcopy()
                await source.paused()
                await source.resume(address)
                assert await source.migration_status("completed", "failed") == "completed"
                report = await command.report()
                assert report["received"] == report["length"]
        await check_moved(source, destination)
        assert_killed(kills, happened(directory))
        return max(beat.max_wait_us for beat in destination.heartbeat.beats) / 1e6
