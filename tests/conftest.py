"""Fixtures that every room uses."""

from __future__ import annotations

import asyncio
import fcntl
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from tests.support import LIMIT, belongings
from tests.torture.sampling import Sampling, Tally

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_TOTAL = _POOL / "nr_hugepages"


_tallies: dict[str, Tally] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let whoever starts the tests say how much of the matrices they go through."""
    matrices = parser.getgroup("matrices of tests/torture")
    matrices.addoption("--full", action="store_true", help="go through every case")
    matrices.addoption("--seed", type=int, help="take the cases and instants of an earlier run")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print what came of the matrices, and how to repeat them."""
    if _tallies:
        terminalreporter.section("matrices")
        terminalreporter.write_line(f"repeat with --seed {_seed(config)}")
        for tally in _tallies.values():
            for line in tally.lines():
                terminalreporter.write_line(line)


_drawn_seed = random.SystemRandom().randrange(1 << 32)


def _seed(config: pytest.Config) -> int:
    given: int | None = config.getoption("--seed")
    return _drawn_seed if given is None else given


@pytest.fixture(scope="session")
def sampling(pytestconfig: pytest.Config) -> Sampling:
    """How much of a matrix this run goes through."""
    return Sampling(pytestconfig.getoption("--full"), _seed(pytestconfig))


@pytest.fixture(scope="session")
def tally() -> Callable[[str], Tally]:
    """Return the tally of a matrix, which is printed at the end."""
    return lambda matrix: _tallies.setdefault(matrix, Tally(matrix))


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every test on the event loop that the daemon runs on: it differs where it matters."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def huge_pages() -> Iterator[Callable[[int], None]]:
    """Make sure that at least `count` free 2 MiB pages are in the pool; put it back afterwards.

    The pool is the machine's, so another test run that wants it waits until this test is over.
    """
    with _TOTAL.open() as total:
        fcntl.flock(total, fcntl.LOCK_EX)
        before = _TOTAL.read_text()

        def free() -> int:
            in_pool, promised = (
                int((_POOL / name).read_text()) for name in ("free_hugepages", "resv_hugepages")
            )
            return in_pool - promised

        def reserve(count: int) -> None:
            # More than once: what others still use of a pool that was made smaller is counted
            # first when it grows, and the kernel adds only what it finds at that moment.
            give_up = time.monotonic() + LIMIT
            while (missing := count - free()) > 0:
                assert time.monotonic() < give_up, "the machine has no memory for huge pages"
                _TOTAL.write_text(str(int(_TOTAL.read_text()) + missing))

        yield reserve
        _TOTAL.write_text(before)


@pytest.fixture
def assert_nothing_left() -> Iterator[None]:
    """Count what this process holds before and after the test: the test must leave nothing."""
    before = belongings()
    yield
    # Less than before is no fault of this test: a thread of an earlier one may just have ended.
    assert not belongings() - before
