"""A migration whose connection is cut, at any byte, either way, any number of times.

Each case follows from the seed and its number, so ``--full --seed SEED -k 'any_byte and 17'``
repeats one of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.whole_migration import LENGTHS, Image
from tests.torture.broken_migrations import CONFIGURATION, Case, check_arrival, numbered
from tests.torture.faulty_relay import CUTS, Fault
from tests.torture.sampling import Sampling, Tally

SENT: Final = sum(LENGTHS.values()) * 3 // 4
"""Bytes that go forward at least: every fourth page is zero."""
SAID: Final = (40, 400, 4000)
"""Bytes that come back: the answers to pings, then requests, of which there may be few or many."""
SETUP: Final = 600
"""Bytes within which the package is, where there is no pre-copy."""
RESUMING: Final = 60
"""Bytes of the questions of a source that comes back; the answers to them are more."""

SWALLOWING: Final = 0.2
"""Seconds in which bytes are swallowed."""

pytestmark = pytest.mark.usefixtures("soon_in_doubt")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    numbered(metafunc, usual=12, full=200)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path_factory.mktemp("daemon"), CONFIGURATION) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("source") / "image", seed=1)


def somewhere(numbers: random.Random) -> Fault:
    """A cut somewhere in a migration, most often among its pages."""
    kind = numbers.choice(CUTS)
    size = numbers.randrange(1, 100_000) if kind == "swallow" else 0
    chance = numbers.random()
    if chance < 0.3:
        return Fault("backward", numbers.randrange(numbers.choice(SAID)), kind, size, SWALLOWING)
    if chance < 0.45:
        return Fault("forward", numbers.randrange(SETUP), kind, size, SWALLOWING)
    return Fault("forward", numbers.randrange(SENT), kind, size, SWALLOWING)


def while_it_resumes(numbers: random.Random) -> Fault:
    """A cut within the questions and answers of a source that comes back, or just behind them."""
    kind = numbers.choice(CUTS)
    if numbers.random() < 0.5:
        return Fault("backward", numbers.randrange(1000), kind, 1, SWALLOWING)
    return Fault("forward", numbers.randrange(2 * RESUMING), kind, 1, SWALLOWING)


def make_case(number: int, numbers: random.Random) -> Case:
    cuts = [somewhere(numbers)]
    while numbers.random() < 0.5:
        cuts.append(numbers.choice((somewhere, while_it_resumes))(numbers))
    return Case(
        number,
        kind=numbers.choice(("anonymous", "memory-file")),
        precopy_passes=numbers.choice((0, 0, 1)),
        bandwidth=numbers.choice((None, 5_000_000, 20_000_000, 100_000_000)),
        faults=tuple((cut,) for cut in cuts),
    )


async def test_a_migration_that_is_cut_at_any_byte_arrives(
    daemon: RunningDaemon,
    image: Image,
    sampling: Sampling,
    tally: Callable[[str], Tally],
    number: int,
) -> None:
    case = make_case(number, sampling.numbers(f"network cuts {number}"))
    await check_arrival(daemon, image, case, tally("network: cuts"))
