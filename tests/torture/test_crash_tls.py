"""A migration over TLS, a SIGKILL at any instant of it, and somebody else who tries to get in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.daemon.named_source import ALLOWED, VM, NamedSource, named_source
from tests.daemon.whole_migration import (
    Image,
    assert_sent,
    running_guest,
)
from tests.support import LIMIT, wait_until
from tests.torture.crashing import SLOW, check_memory, says
from tests.torture.sampling import Sampling, Tally

_USUAL, _FULL = 1, 40
"""Cases of each victim."""
_TWICE = 0.3
"""How often a second kill follows."""
_FIRST, _SECOND = 2.0, 0.6
"""Seconds: within which the first one comes after the source has been started, and the second one
after that."""
_PAUSE = 0.02
"""Seconds from one try of who may not get in to the next."""
_OWN = {"/control", "/handoff"}
"""What the service manager keeps when there is no migration."""

_KILLS: dict[str, Callable[[NamedSource], None]] = {
    "worker": lambda it: it.daemon.kill_worker(),
    "supervisor": NamedSource.kill_supervisor,
    "all": NamedSource.kill_all,
}


@pytest.mark.parametrize("victim", _KILLS)
def test_a_migration_over_tls_completes_whenever_its_daemon_is_killed(
    tmp_path: Path, victim: str, sampling: Sampling, tally: Callable[[str], Tally]
) -> None:
    numbers = sampling.numbers(f"crash TLS {victim}")
    outcomes = tally(f"crash instants over TLS, {victim} killed")
    failures = []
    for number in range(sampling.count(_USUAL, _FULL)):
        instants = [numbers.uniform(0, _FIRST)]
        if numbers.random() < _TWICE:
            instants.append(numbers.uniform(0, _SECOND))
        kind = numbers.choice(("memory-file", "anonymous"))
        directory = tmp_path / str(number)
        directory.mkdir()
        try:
            pause = _migrate(directory, kind, instants, _KILLS[victim])
            if pause is not None:
                outcomes.pauses.append(pause)
            outcomes.outcomes["not while it ran" if pause is None else "while it ran"] += 1
        except AssertionError as error:
            failures.append(f"{number}, {kind}, {instants}: {error}")
            outcomes.outcomes["failed"] += 1
    assert not failures, "\n\n".join(failures)


def _migrate(
    directory: Path, kind: str, instants: list[float], kill: Callable[[NamedSource], None]
) -> float | None:
    """Move a guest through a daemon that is killed.

    :return: its longest access, in seconds; None if none of the kills came while it ran and not all
        of its memory was here.
    """
    image = Image(directory / "image", seed=10)
    with (
        named_source(directory, timeouts="close = 2") as it,
        running_guest(it.daemon, VM, kind, "tests.torture.checker_vmm", str(SLOW.work)) as guest,
    ):
        (listen,) = says(guest)["listen"]
        killed = []
        source = image.start_sending(listen, "--max-bandwidth", SLOW.bandwidth, *it.options)
        try:
            with _tried_by_a_stranger(it):
                for seconds in instants:
                    time.sleep(seconds)
                    killed.append(time.monotonic())
                    kill(it)
                    for migration in it.daemon.client.list():  # of one that has ended none is left
                        assert migration["allowed_sources"] == [ALLOWED]
                assert_sent(source)
        finally:
            source.kill()
        began, ended, end = says(guest)["began"], says(guest)["ended"], says(guest)
        longest: float = end.pop("longest")
        assert end == {"complete": True, "changed": 0}, end
        check_memory(image, guest)
        it.assert_nobody_else_was_let_in()
        wait_until(lambda: set(it.daemon.manager.stored) == _OWN)
        return longest if any(began <= moment <= ended for moment in killed) else None


@contextmanager
def _tried_by_a_stranger(it: NamedSource) -> Iterator[None]:
    """Have somebody with the other name try to get in, again and again."""
    said: list[bytes] = []
    over = threading.Event()
    trying = threading.Thread(target=partial(_try, it, it.port, over, said), daemon=True)
    trying.start()
    try:
        yield
    finally:
        over.set()
        trying.join(2 * LIMIT)
    assert not trying.is_alive()
    assert not any(said), said
    assert it.refusals


def _try(it: NamedSource, port: int, over: threading.Event, said: list[bytes]) -> None:
    while not over.wait(_PAUSE):
        with suppress(OSError):  # nobody is there any more
            said.append(it.try_as_a_stranger(port))
