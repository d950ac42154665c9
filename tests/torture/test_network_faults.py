"""A migration through a network that trickles, delays, falls silent and says things twice.

Each case follows from the seed and its number: see test_network_cuts.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.whole_migration import Image
from tests.torture.broken_migrations import (
    BREAK_AFTER,
    CONFIGURATION,
    Case,
    check_arrival,
    numbered,
)
from tests.torture.faulty_relay import Fault, Kind
from tests.torture.sampling import Sampling, Tally
from tests.torture.test_network_cuts import somewhere

KINDS: Final[tuple[Kind, ...]] = ("silence", "stale", "duplicate", "trickle", "delay", "half-close")
FOR_GOOD: Final = 3600.0
SHORT: Final = BREAK_AFTER / 4
"""Seconds after which a connection goes on."""

pytestmark = pytest.mark.usefixtures("soon_in_doubt")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    numbered(metafunc, usual=len(KINDS), full=60)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path_factory.mktemp("daemon"), CONFIGURATION) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("source") / "image", seed=2)


def make_fault(kind: Kind, numbers: random.Random) -> Fault:
    place = somewhere(numbers)
    way, after = place.way, place.after
    match kind:
        case "silence":
            # It comes back while nobody has noticed, about when they do, or never.
            seconds = numbers.choice((SHORT, numbers.uniform(0.5, 2.0) * BREAK_AFTER, FOR_GOOD))
            return Fault(way, after, kind, seconds=seconds)
        case "stale":
            # The source has gone, and something on the way holds the destination's connection.
            return Fault("forward", after, kind, seconds=numbers.choice((SHORT, FOR_GOOD)))
        case "duplicate":
            size = numbers.choice((1, 4, numbers.randrange(1, 400), 60_000))
            after = max(after, size) if way == "forward" else after
            return Fault(way, after, kind, size, numbers.choice((SHORT, FOR_GOOD)))
        case "trickle":
            return Fault(way, after, kind, numbers.randrange(1, 5000))
        case "delay":
            return Fault(way, after, kind, seconds=numbers.uniform(0.0, SHORT))
        case _:
            return Fault(way, after, kind)


def make_case(number: int, numbers: random.Random) -> Case:
    """Each kind in turn, on the first connection and perhaps on those after it, or with a cut."""
    first = KINDS[number % len(KINDS)]
    connections: list[tuple[Fault, ...]] = []
    while not connections or numbers.random() < 0.5:
        kind = numbers.choice(KINDS) if connections else first
        faults = [make_fault(kind, numbers)]
        if numbers.random() < 0.5:
            faults.append(somewhere(numbers))
        connections.append(tuple(faults))
    return Case(
        number,
        kind=numbers.choice(("anonymous", "memory-file")),
        precopy_passes=numbers.choice((0, 0, 1)),
        bandwidth=numbers.choice((5_000_000, 20_000_000, 100_000_000)),
        faults=tuple(connections),
    )


async def test_a_migration_through_a_bad_network_arrives(
    daemon: RunningDaemon,
    image: Image,
    sampling: Sampling,
    tally: Callable[[str], Tally],
    number: int,
) -> None:
    case = make_case(number, sampling.numbers(f"network faults {number}"))
    await check_arrival(daemon, image, case, tally("network: faults"))
