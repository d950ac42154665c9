"""One run of one setup."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Final

from tests.bench.runs import RunFailed
from tests.bench_vm.processor_time import ProcessorTime
from tests.bench_vm.receivers import receive_with_postcopyd, receive_with_qemu
from tests.bench_vm.setups import Setup
from tests.bench_vm.warm import warm
from tests.bench_vm.window import Moments, Window, heartbeats_cover, measured
from tests.daemon.daemon_process import RunningDaemon
from tests.interop.qemu import event_time, running_qemu, waiting_qemu
from tests.interop.qemu_machine import Machine

_WARM: Final = 50
"""Heartbeats before the migration: the guest's first accesses to its memory are slow."""
_ROUNDS: Final = 1
"""The switchover comes while the memory goes for the first time: most of it is missing then."""


async def run(setup: Setup, machine: Machine, daemon: RunningDaemon) -> Window:
    """Migrate the machine, booted anew, and measure.

    :raise RunFailed: if the guest has not arrived whole; its figures mean nothing.
    """
    try:
        return await _run(setup, machine, daemon)
    except AssertionError as error:  # what the helpers of the tests fail with
        raise RunFailed(f"QEMU {setup.version}, {setup.name}: {error}") from error
    except TimeoutError as error:
        raise RunFailed(f"QEMU {setup.version}, {setup.name}: no answer in time") from error


async def _run(setup: Setup, machine: Machine, daemon: RunningDaemon) -> Window:
    ours = setup.receiver == "postcopyd"
    with tempfile.TemporaryDirectory(prefix="postcopyd-bench-vm-") as directory_name:
        directory = Path(directory_name)
        async with (
            running_qemu(directory, machine) as source,
            waiting_qemu(directory, machine) as destination,
            receive_with_postcopyd(daemon, destination)
            if ours
            else receive_with_qemu(destination, setup.preempt) as reception,
        ):
            if setup.preempt:
                await source.set_capabilities("postcopy-preempt")
            await source.heartbeats(_WARM)
            await asyncio.to_thread(warm, 2 * machine.memory)
            time = await ProcessorTime.of(destination, daemon.worker if ours else None)
            await source.migrate(reception.uri, postcopy_bandwidth=0)
            await source.precopy_rounds(_ROUNDS)
            await source.start_postcopy()
            state = await source.migration_status("completed", "failed", "postcopy-paused")
            cpu = time.seconds()
            assert state == "completed", f"the source is {state}"
            moments = Moments(
                stopped=event_time(await source.event("STOP")),
                resumed=event_time(await destination.event("RESUME")),
                completed=event_time(source.events("MIGRATION")[-1]),
            )
            blocked = await reception.blocked()
            while not heartbeats_cover(moments, destination.heartbeat.beats):
                await destination.heartbeats(1)
            destination.heartbeat.assert_no_bad_page()
            return measured(
                moments,
                source.heartbeat.beats,
                destination.heartbeat.beats,
                blocked=blocked,
                cpu=cpu,
            )
