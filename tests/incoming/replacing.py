"""A VMM that could not load its devices, and guests for those that take its place."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from postcopyd.incoming.states import State
from tests.incoming.engine import Engine
from tests.incoming.guest import PAGE, Guest

MakeEngine = Callable[..., Engine]
MakeGuest = Callable[..., Guest]

KINDS = {
    "private to private": (False, False),
    "private to memory file": (False, True),
    "memory file to private": (True, False),
    "memory file to memory file": (True, True),
}


@pytest.fixture
async def make_guest() -> AsyncIterator[MakeGuest]:
    made: list[Guest] = []

    def make(**options: object) -> Guest:
        made.append(Guest(register=False, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for guest in made:
        # Whoever unmaps what is watched waits, while anybody has a copy of the userfaultfd.
        with contextlib.suppress(OSError):
            guest.userfaultfd.unregister(guest.address, guest.length)
        guest.close()


async def refuse_to_load(engine: Engine) -> None:
    """Have the first VMM refuse its device state."""
    assert engine.migration.state is State.LISTENING
    engine.vmm.refuses_to_load = True
    engine.vmm.may_load.set()
    await engine.reach(State.PAUSED)


async def half_way(engine: Engine, content: bytes) -> None:
    """A quarter comes in pre-copy, a quarter after the switchover; nothing is loaded yet."""
    quarter = len(content) // 4
    engine.vmm.may_load.clear()
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", content, range(0, 2 * quarter, PAGE))
    await engine.source.switch_over({"pc.ram": [(quarter, 3 * quarter)]})
    await engine.source.postcopy("pc.ram", content, range(quarter, 2 * quarter, PAGE))
    await engine.source.wait_for_pong(4)
    await engine.reach(State.LISTENING)
