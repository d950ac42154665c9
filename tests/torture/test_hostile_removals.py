"""A VMM that gives memory back without end: what it costs the faults of others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from statistics import median, quantiles

import pytest

from postcopyd.incoming.states import State
from tests.incoming.engine import Engine
from tests.incoming.guest import PAGE
from tests.torture.bystander import Bystander, bystander
from tests.torture.guest_memory import GuestElsewhere, engine_for
from tests.torture.sampling import Sampling, Tally

_PAGES = (64 << 30) // PAGE
_THREADS = 16
_FLOOD = (
    "[threading.Thread(daemon=True, target=lambda: [libc.madvise("
    "ctypes.c_void_p(mapping.address), ctypes.c_size_t(mapping.length), 4) "
    "for _ in iter(int, 1)]).start() for _ in range({threads})]"
)


def p99(latencies: list[float]) -> float:
    return quantiles(latencies, n=100)[98]


async def latencies_beside(seconds: float, tally: Tally, what: str) -> list[float]:
    async with bystander() as others:
        await asyncio.sleep(seconds)
    _say(others, tally, what)
    return others.latencies


def _say(others: Bystander, tally: Tally, what: str) -> None:
    milliseconds = [latency * 1000 for latency in others.latencies]
    tally.outcomes[
        f"faults {what} (p50 {median(milliseconds):.2f} ms, p99 {p99(milliseconds):.2f} ms, "
        f"max {max(milliseconds):.2f} ms)"
    ] += len(milliseconds)


@pytest.mark.timeout(300)
async def test_a_flood_of_removals_does_not_starve_the_faults_of_others(
    sampling: Sampling, tally: Callable[[str], Tally]
) -> None:
    told = tally("removals without end")
    seconds = sampling.count(1, 20)
    alone = await latencies_beside(seconds, told, "alone")
    guest = GuestElsewhere(_PAGES)
    engine: Engine = engine_for(guest)
    try:
        engine.attach()
        await engine.source.advise()
        await engine.source.switch_over({"pc.ram": [(0, guest.length)]})
        await engine.reach(State.RUNNING)
        await guest.ask(_FLOOD.format(threads=_THREADS))
        beside = await latencies_beside(seconds, told, "beside it")
        assert engine.migration.state is State.RUNNING
    finally:
        guest.process.kill()
        await engine.close()
    assert median(beside) < median(alone) + 0.03
